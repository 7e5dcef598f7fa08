"""Proof of sampling (spec/v4.md 8.2): cases, oracle, named faults."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from dsv4_backend.contract import Case, Draw
from dsv4_backend.ops.sampling import MIN_TEMPERATURE, nucleus, sample
from dsv4_backend.proofs.numerics import Array


@sample.oracle
def _(logits: Array, noise: Array, temperature: float, top_p: float) -> Array:
    rows = zip(logits, noise, strict=True)
    return np.array([_pick(row, race, temperature, top_p) for row, race in rows], np.int64)


def _pick(logits: Array, noise: Array, temperature: float, top_p: float) -> int:
    """The token of one row;
    the first in rank is a candidate, others if they and all behind hold > 1 - top_p.
    """
    if temperature == 0:
        return int(np.argmax(logits))
    weights = np.exp((logits - logits.max()) / max(temperature, 1e-5))
    ranked = np.argsort(-weights, kind="stable")
    left = np.cumsum(weights[ranked[::-1]])[::-1]  # a token and all behind it
    outside = ranked[1:][left[1:] <= (1 - top_p) * left[0]]
    scores = weights / noise
    scores[outside] = -np.inf
    return int(np.argmax(scores))


def _exponential(draw: Draw, *shape: int) -> torch.Tensor:
    return -torch.log1p(-draw.uniform(*shape, low=1e-6, high=1 - 1e-6))


@sample.cases
def _(draw: Draw) -> Iterator[Case]:
    for tokens, vocab in ((0, 7), (1, 1), (64, 33), (16, 1031), (2, 129280)):
        logits, noise = draw.normal(tokens, vocab, scale=2.0), _exponential(draw, tokens, vocab)
        for temperature, top_p in ((0.0, 1.0), (1.0, 1.0), (0.6, 0.9), (1.7, 0.3)):
            yield Case(
                f"{tokens}x{vocab} T {temperature} p {top_p}",
                "ideal",
                (logits, noise, temperature, top_p),
            )
    logits, noise = draw.normal(24, 40, scale=2.0)[::2, ::2], _exponential(draw, 12, 40)[:, ::2]
    yield Case("strided", "ideal", (logits, noise, 0.8, 0.7))
    forbidden = draw.normal(20, 9).masked_fill(draw.uniform(20, 9) < 0.6, -math.inf)
    forbidden[:, 8] = -3.0
    for temperature in (0.0, 1.0):
        yield Case(
            f"forbidden ids T {temperature}",
            "ideal",
            (forbidden, _exponential(draw, 20, 9), temperature, 1.0),
        )
    yield from _tie_cases(draw)


def _tie_cases(draw: Draw) -> Iterator[Case]:
    levels, equal = draw.integers(32, 50, high=4).float(), torch.ones(32, 50)
    yield Case("ties, greedy", "ideal", (levels, _exponential(draw, 32, 50), 0.0, 1.0))
    yield Case("ties of logit and noise", "ideal", (levels, equal, 1.0, 1.0))
    noise = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0], [3.0, 3.0, 1.0, 1.0]])
    yield Case("ties of rank at top_p", "ideal", (torch.zeros(3, 4), noise, 1.0, 0.5))
    close = torch.tensor([[1.0, 1.0 + 1e-6], [-2.0, -2.0 - 1e-6]])
    yield Case(
        "greedy, nearly a tie", "ideal", (close, torch.tensor([[0.1, 8.0], [8.0, 0.1]]), 0.0, 1.0)
    )
    cold = torch.tensor([[5.0, 4.99, -9.0], [1.0, 3.0, 2.99]])
    yield Case(
        "temperature below its floor",
        "ideal",
        (cold, torch.tensor([[9.0, 0.1, 0.1], [0.1, 9.0, 0.1]]), 1e-30, 0.5),
    )
    # Closer than the floor: there the race decides, at half of it the best, at twice another one.
    close = torch.tensor([[0.0, -2e-6], [-2e-6, 0.0], [0.0, -4e-6], [-4e-6, 0.0]])
    race = torch.tensor([[1.0, 0.5], [0.5, 1.0], [1.0, 0.8], [0.8, 1.0]])
    yield Case("temperature below its floor, close ids", "ideal", (close, race, 1e-30, 1.0))
    rare = torch.tensor([[0.0, -20.0], [-20.0, 0.0], [0.0, -20.0]])
    noise = torch.tensor([[1.0, 1e-12], [1e-12, 1.0], [1.0, 1e-6]])
    yield Case("rare ids at top_p 1", "ideal", (rare, noise, 1.0, 1.0))
    logits, noise = draw.normal(12, 9, scale=2.0), _exponential(draw, 12, 9)
    for top_p in (1e-46, 1e-39, 1e-20):  # 0 in fp32, subnormal there, nothing beside 1 in fp64
        yield Case(f"top_p {top_p} leaves the best", "ideal", (logits, noise, 1.0, top_p))


sample.no_output_fault("one NaN", "ids are integers")


def _without_crossing(a: Any) -> Any:
    probabilities = torch.softmax(a.logits / max(a.temperature, MIN_TEMPERATURE), -1)
    best_first, order = torch.sort(probabilities, dim=-1, descending=True, stable=True)
    outside = (best_first.cumsum(-1) > a.top_p) & (torch.arange(a.logits.shape[1]) > 0)
    return _forbidding(a, torch.zeros_like(outside).scatter(-1, order, outside))


def _forbidding(a: Any, outside: torch.Tensor) -> Any:
    return a._replace(logits=a.logits.masked_fill(outside & (a.top_p < 1), -math.inf), top_p=1.0)


def _without_last(logits: torch.Tensor) -> torch.Tensor:
    return logits.masked_fill(
        torch.arange(logits.shape[1]) == max(1, logits.shape[1] - 1), -math.inf
    )


sample.wrong_arguments(
    {
        "temperature ignored": {"temperature": lambda temperature: 1.0 if temperature else 0.0},
        "logits multiplied by the temperature": {"temperature": lambda t: 1 / t if t else 0.0},
        "top_p ignored": {"top_p": 1.0},
        "token that crosses top_p left out": _without_crossing,
        "top_p on probabilities before the temperature": lambda a: _forbidding(
            a, nucleus(torch.softmax(a.logits, -1), a.top_p) == 0
        ),
        "noise left out": {"noise": torch.ones_like},
        "multiplied by the noise": {"noise": lambda noise: 1 / noise},
        "noise of the previous token": {"noise": lambda noise: noise.roll(1, 0)},
        "temperature 0 still draws": {"temperature": lambda t: max(t, MIN_TEMPERATURE)},
        "last id never chosen": {"logits": _without_last},
    }
)


@sample.fault("ties to the larger id")
def _(logits: torch.Tensor, noise: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    return (
        logits.shape[1] - 1 - sample.reference(logits.flip(-1), noise.flip(-1), temperature, top_p)
    )


sample.equivalent(
    "nucleus: MIN_TOP_P -> MIN_TOP_P * 2", "both lie far below the probability of any best token"
)
sample.equivalent("nucleus: True -> False (2)", "torch sorts stably on a CPU anyway")
