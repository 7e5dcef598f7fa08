"""Interleaved timing: whatever slows the machine for a moment slows all that is compared."""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

BLOCK_SECONDS = 2e-3
"""One sample is a block of calls at least this long: the clock and the loop vanish in it."""


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median over rounds, and its quartiles."""

    median: float
    low: float
    high: float


class TimesItself(ABC):
    """A call that is made elsewhere, by a clock of its own."""

    def __call__(self) -> object:
        """One call."""
        return self.seconds(1)

    @abstractmethod
    def seconds(self, count: int) -> float:
        """Seconds of `count` calls."""


_Name = TypeVar("_Name", bound=Hashable)


def interleaved(
    calls: Mapping[_Name, Callable[[], object]],
    rounds: int,
    between: Callable[[], object] | None = None,
) -> dict[_Name, Timing]:
    """Time every call in turn, `rounds` (>= 2) times over; `between` runs after a block of calls,
    untimed.
    """
    lengths = {name: _calls_per_block(call) for name, call in calls.items()}
    samples: dict[_Name, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if between is not None:
                between()
            samples[name].append(seconds_of(call, lengths[name]) / lengths[name])
    return {name: _timing(seconds) for name, seconds in samples.items()}


def _calls_per_block(call: Callable[[], object]) -> int:
    count = 1
    while (seconds := seconds_of(call, count)) < BLOCK_SECONDS:
        count = max(2 * count, int(count * BLOCK_SECONDS / max(seconds, 1e-9)))
    return count


def seconds_of(call: Callable[[], object], count: int) -> float:
    """Seconds of `count` calls."""
    if isinstance(call, TimesItself):
        return call.seconds(count)
    start = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - start


def _timing(seconds: list[float]) -> Timing:
    low, median, high = statistics.quantiles(seconds, n=4)
    return Timing(median, low, high)
