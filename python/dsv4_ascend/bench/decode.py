"""Suites `decode` and `prefill`: tokens per second of the shipped small model,
and what of a step is spent outside its operators.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from dsv4_ascend.bench.sections import Section, quartiles, seconds
from dsv4_ascend.bench.timing import Timing, interleaved
from dsv4_ascend.model.cache import CachedSequence, PagedCache
from dsv4_ascend.model.model import Model, load
from dsv4_ascend.model.step import make_step
from dsv4_ascend.tiny.release import SHIPPED
from dsv4_backend.contract import Operator
from dsv4_backend.ops.sampling import sample

PROFILES = "official", "ideal"
BATCHES = 1, 8


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts that are read, of the context before decoding, and steps in a call."""

    prompts: tuple[int, ...] = (128, 512, 2048)
    context: int = 128
    steps: int = 16


@dataclass(frozen=True)
class Speed:
    """One row. timing: of one step of decode, or of a prompt; outside: share of its time that no
    operator takes, found in a run of its own.
    """

    profile: str
    what: str
    tokens: int
    timing: Timing
    tokens_per_second: float
    outside: float


class _Decode:
    """Greedy steps behind a context; every call repeats the same ones."""

    def __init__(self, model: Model, batch: int, of: Lengths) -> None:
        self.network, self.batch, self.steps = model.network, batch, of.steps
        self.cache, self.sequences = _sequences(model, batch, of.context + of.steps)
        prompts = torch.randint(2, model.config.vocab_size, (batch, of.context))
        _run(self, list(prompts))
        self.tokens = batch

    def __call__(self) -> None:
        """`steps` steps, which are forgotten afterwards."""
        ids = torch.full((self.batch,), 2)
        for _ in range(self.steps):
            ids = _run(self, list(ids[:, None]))
        for sequence in self.sequences:
            self.cache.rollback(sequence, self.steps)


class _Prefill:
    """A prompt into an empty cache, every call the same."""

    steps = 1

    def __init__(self, model: Model, tokens: int) -> None:
        self.network, self.tokens = model.network, tokens
        self.cache, self.sequences = _sequences(model, 1, tokens)
        self.prompt = torch.randint(2, model.config.vocab_size, (tokens,))

    def __call__(self) -> None:
        """One step, whose blocks are given back."""
        _run(self, [self.prompt])
        for sequence in self.sequences:
            self.cache.free(sequence)


def _sequences(model: Model, batch: int, tokens: int) -> tuple[PagedCache, list[CachedSequence]]:
    cache = model.new_cache(max_sequences=batch, max_tokens=tokens, max_step_tokens=tokens)
    return cache, [cache.new_sequence() for _ in range(batch)]


def _run(job: _Decode | _Prefill, tokens: Sequence[torch.Tensor]) -> torch.Tensor:
    """One step of all sequences -> each one's next token."""
    step = make_step(job.cache, job.sequences, tokens)
    streams = job.network.run_layers(*step)
    logits = job.network.logits(streams[step.batch.last_rows])
    return sample(logits, torch.ones_like(logits), 0.0, 1.0)


def decode(rounds: int, of: Lengths | None = None) -> list[Speed]:
    """Steps of batches of 1 and 8 in both profiles, in one interleaved run."""
    of = of or Lengths()
    makers = {f"batch {batch}": partial(_Decode, batch=batch, of=of) for batch in BATCHES}
    return _speeds(makers, rounds)


def prefill(rounds: int, of: Lengths | None = None) -> list[Speed]:
    """Prompts of every length in both profiles, each in one step, in one interleaved run."""
    lengths = (of or Lengths()).prompts
    return _speeds({f"{n:,} tokens": partial(_Prefill, tokens=n) for n in lengths}, rounds)


def _speeds(
    makers: Mapping[str, Callable[[Model], _Decode | _Prefill]], rounds: int
) -> list[Speed]:
    torch.manual_seed(0)
    with torch.inference_mode():
        models = {profile: load(SHIPPED, profile=profile) for profile in PROFILES}
        jobs = {
            (profile, what): make(model)
            for profile, model in models.items()
            for what, make in makers.items()
        }
        timings = interleaved(jobs, rounds)
        shares = {
            name: median(share_outside(job) for _ in range(rounds)) for name, job in jobs.items()
        }
    return [_speed(*name, jobs[name], timings[name], shares[name]) for name in jobs]


def _speed(
    profile: str, what: str, job: _Decode | _Prefill, of_call: Timing, outside: float
) -> Speed:
    timing = Timing(*(t / job.steps for t in (of_call.median, of_call.low, of_call.high)))
    return Speed(profile, what, job.tokens, timing, job.tokens / timing.median, outside)


def share_outside(run: Callable[[], object]) -> float:
    """Share of a call's time that is not inside operators.

    Inside: from the call of an operator in Python to its result, checks and dispatch among it.
    """
    inside, clock, call = 0.0, time.perf_counter, Operator.__call__

    def timed(operator: Operator, *args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        start = clock()
        try:
            return call(operator, *args, **kwargs)
        finally:
            inside += clock() - start

    with patch.object(Operator, "__call__", timed):
        start = clock()
        run()
        whole = clock() - start
    return 1 - inside / whole


def section(rows: list[Speed], title: str) -> Section:
    """The table of a suite."""
    return Section(
        f"The shipped small model: {title}",
        ("profile", "what", "tokens/s", "one step", "quartiles", "outside operators"),
        [
            [
                row.profile,
                row.what,
                f"{row.tokens_per_second:,.0f}",
                seconds(row.timing.median),
                quartiles(row.timing),
                f"{100 * row.outside:.0f} %",
            ]
            for row in rows
        ],
        (
            "a step ends with the next token of every sequence (greedy);"
            f" decode: {Lengths.steps} steps a sample behind {Lengths.context} tokens",
            "outside operators: share of a step that is spent neither in an operator nor in its"
            " checks and dispatch, measured in a run of its own by a clock around every call",
        ),
        text=(0, 1),
    )
