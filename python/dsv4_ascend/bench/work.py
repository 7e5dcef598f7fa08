"""Operators with their bytes and operations, timed beside torch's formulations in one run."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from dsv4_ascend.bench.machine import LimitProbe, Limits, last_level_cache
from dsv4_ascend.bench.timing import Timing, interleaved, seconds_of
from dsv4_backend import OPERATORS, dispatch

Call = Callable[[], Any]
_T = TypeVar("_T")
REFERENCE = "reference"
HOPELESS = 3.0
"""A formulation that takes so many times the fastest one's time is tried once, not repeated: bf16
products of torch take minutes where the processor has none.
"""
_SHORT = 0.1
"""Seconds of a first call from which on it is believed."""


@dataclass(frozen=True)
class Work:
    """A call of an operator, or of several in turn, and what does the same: torch's formulations,
    or a kernel of another engine.

    what: operator and shape in words; traffic: bytes that must be read and written at least once,
    weights and caches as stored; flops: a multiply-add is two.
    """

    operator: str
    what: str
    tokens: int
    traffic: int
    flops: int
    ran: str
    ours: Call
    peers: Mapping[str, Call]


@dataclass(frozen=True)
class Row:
    """Work that was timed. peer: the fastest of what does the same; ratio: its median over ours,
    above 1 where ours is faster; of_limit: the least time by `Limits` over ours; left_out: seconds
    of the one call of `HOPELESS` formulations.
    """

    operator: str
    what: str
    tokens: int
    ran: str
    traffic: int
    flops: int
    ours: Timing
    peer: str
    peer_timing: Timing
    peers: dict[str, Timing]
    left_out: dict[str, float]
    ratio: float
    bytes_per_second: float
    flops_per_second: float
    of_limit: float


def cold_bytes() -> int:
    """More than caches hold: twice the last-level cache."""
    return 2 * last_level_cache()


def copies(size: int) -> int:
    """How many tensors of `size` bytes are more than caches hold."""
    return max(1, -(-cold_bytes() // max(1, size)))


def cold(make: Callable[[], _T], size: int) -> list[_T]:
    """As many values of `size` bytes each as are needed so that the next one is in no cache."""
    return [make() for _ in range(copies(size))]


def rotating(function: Callable[..., Any], *sets: Sequence[Any]) -> Call:
    """A call of `function` with the next value of every set; each set has its own length."""
    turns = [itertools.cycle(values) for values in sets]
    return lambda: function(*map(next, turns))


def plain(name: str) -> Callable[..., Any]:
    """The reference of an operator: torch operations, without checks or dispatch."""
    return OPERATORS[name].plain_reference


def ran(name: str, *arguments: Any) -> str:
    """What runs a call: a kernel by name, or the reference."""
    chosen = dispatch.support(name, *arguments)
    return chosen.reason if chosen else REFERENCE


def size_of(*tensors: torch.Tensor) -> int:
    """Bytes of all tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def measure(
    works: Sequence[Work], rounds: int, probe: LimitProbe | None = None, pause: float = 0.0
) -> tuple[Limits, list[Row]]:
    """Time all work, its peers and the machine's limits in one interleaved run, with a pause of
    so many seconds between two blocks of calls.
    """
    probe = probe or LimitProbe()
    trials = [{peer: _trial(call) for peer, call in work.peers.items()} for work in works]
    calls: dict[tuple[int, str], Call] = {(-1, name): call for name, call in probe.calls.items()}
    for i, work in enumerate(works):
        calls[i, ""] = work.ours
        calls |= {(i, peer): work.peers[peer] for peer in contenders(trials[i])}
    timings = interleaved(calls, rounds, partial(time.sleep, pause) if pause else None)
    limits = probe.limits({name: timings[-1, name] for name in probe.calls})
    rows = []
    for i, work in enumerate(works):
        own = {name: timing for (j, name), timing in timings.items() if i == j}
        rows.append(_row(work, own, trials[i], limits))
    return limits, rows


def _trial(call: Call) -> float:
    """Seconds of one call: of the second, if the first is so short that beginnings count."""
    first = seconds_of(call, 1)
    return first if first >= _SHORT else seconds_of(call, 1)


def contenders(trials: Mapping[str, float]) -> list[str]:
    """Formulations that may be the fastest, by one call of each."""
    least = min(trials.values())
    return [name for name, seconds in trials.items() if seconds <= HOPELESS * least]


def _row(work: Work, own: Mapping[str, Timing], trials: Mapping[str, float], limits: Limits) -> Row:
    ours, peers = own[""], {name: timing for name, timing in own.items() if name}
    best = min(peers, key=lambda peer: peers[peer].median)
    return Row(
        work.operator,
        work.what,
        work.tokens,
        work.ran,
        work.traffic,
        work.flops,
        ours,
        best,
        peers[best],
        peers,
        {name: seconds for name, seconds in trials.items() if name not in peers},
        peers[best].median / ours.median,
        work.traffic / ours.median,
        work.flops / ours.median,
        limits.seconds(work.traffic, work.flops) / ours.median,
    )
