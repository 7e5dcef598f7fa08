"""Proof of expert routing (spec/v4.md 5.1): cases, oracles, named faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from dsv4_backend.contract import Case, Draw, Operator, compute
from dsv4_backend.ops.gate import (
    LOGIT_UNIT,
    SCORE_UNIT,
    _route,
    expert_scores,
    fold_gate,
    gate_hash,
    gate_hash_folded,
    gate_topk,
    gate_topk_folded,
    normalise,
    select_largest,
    sqrt_softplus,
)
from dsv4_backend.proofs.numerics import Array, round_to, wide


def _scores(x: Array, weight: Array) -> Array:
    """sqrt(ln(1 + e^l)) of every token and expert; fp32 holds no softplus below e^-104."""
    return np.sqrt(round_to(np.float32, np.logaddexp(0, wide(x) @ wide(weight).T)))


def _weights(scores: Array, ids: Array, route_scale: float) -> Array:
    chosen: Array = np.take_along_axis(scores, ids, 1)
    shares: Array = chosen / chosen.sum(1, keepdims=True)
    return shares * route_scale


@gate_topk.oracle
def _(x: Array, weight: Array, bias: Array, k: int, route_scale: float) -> tuple[Array, Array]:
    scores = _scores(x, weight)
    ids = np.zeros((len(x), k), np.int32)
    for t, values in enumerate(scores + bias):
        rank = [(0, 0, e) if np.isnan(v) else (1, -v, e) for e, v in enumerate(values)]
        ids[t] = [e for *_, e in sorted(rank)[:k]]
    return _weights(scores, ids, route_scale), ids


@gate_hash.oracle
def _(
    x: Array, weight: Array, token: Array, tid2eid: Array, route_scale: float
) -> tuple[Array, Array]:
    ids = tid2eid[token].astype(np.int32)
    return _weights(_scores(x, weight), ids, route_scale), ids


@gate_topk_folded.oracle
def _(x: Array, weight: Array, bias: Array, k: int, route_scale: float) -> tuple[Array, Array]:
    """A logit is 4096 products, a score 64 of the bias."""
    result: tuple[Array, Array] = gate_topk.golden(
        wide(x) * 64, wide(weight) * 64, wide(bias) * 64, k, route_scale
    )
    return result


@gate_hash_folded.oracle
def _(
    x: Array, weight: Array, token: Array, tid2eid: Array, route_scale: float
) -> tuple[Array, Array]:
    result: tuple[Array, Array] = gate_hash.golden(
        wide(x) * 64, wide(weight) * 64, token, tid2eid, route_scale
    )
    return result


_SHAPES = (
    (0, 64, 8, 2),
    (1, 1, 1, 1),
    (3, 7, 5, 5),
    (5, 130, 9, 2),
    (17, 64, 256, 6),
    (4, 512, 384, 6),
)
"""(T, d, E, k)."""
_GOLDEN_LOGITS = (-50.0, -20.0, -5.0, -1.0, 0.0, 1.0, 5.0, 20.0, 25.0, 100.0)


def _router(
    draw: Draw, tokens: int, d: int, experts: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """X and weight with logits of about unit variance."""
    return draw.normal(tokens, d, dtype=dtype), draw.normal(experts, d, scale=d**-0.5, dtype=dtype)


def _far_logits(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """X and weight: a token whose scores are all 0 in fp32,
    one of large scores, one with a single score.
    """
    x = torch.tensor([[1.0, 0.0], [-0.5, 0.0], [0.0, 1.0]], dtype=dtype)
    return x, torch.tensor([[-200.0, -1.0], [-300.0, -200.0], [-150.0, -160.0]], dtype=dtype)


@gate_topk.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in (("ideal", torch.float32), ("official", torch.bfloat16)):
        for tokens, d, experts, k in _SHAPES:
            x, weight = _router(draw, tokens, d, experts, dtype)
            bias = draw.normal(experts, scale=0.3)
            yield Case(f"{tokens}x{d}, {k} of {experts}", profile, (x, weight, bias, k, 1.5))
        logits = torch.tensor(_GOLDEN_LOGITS, dtype=dtype).unsqueeze(1)
        golden = (torch.ones(2, 1, dtype=dtype), logits, torch.zeros(len(logits)), len(logits), 2.5)
        yield Case("golden logits", profile, golden)
        small = (
            draw.integers(12, 6, low=-1, high=2).to(dtype),
            draw.integers(16, 6, low=-1, high=2).to(dtype),
        )
        yield Case("many ties", profile, (*small, torch.zeros(16), 6, 1.5))
        x, weight = _router(draw, 14, 32, 16, dtype)
        yield Case(
            "bias decides, strided", profile, (x[::2], weight, draw.normal(16, scale=3.0), 4, 1.5)
        )
        special = draw.normal(3, 32, dtype=dtype)
        special[1, 4] = float("nan")
        yield Case("NaN token", profile, (special, weight, draw.normal(16), 4, 2.5))
    for profile, dtype in (("ideal", torch.float32), ("official", torch.bfloat16)):
        yield Case("scores of 0", profile, (*_far_logits(dtype), torch.zeros(3), 2, 1.5))


@gate_hash.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in (("ideal", torch.float32), ("official", torch.bfloat16)):
        for tokens, d, experts, k in _SHAPES:
            x, weight = _router(draw, tokens, d, experts, dtype)
            table = torch.stack([draw.permutation(experts)[:k] for _ in range(29)])
            ids = draw.integers(tokens, high=29)
            yield Case(f"{tokens}x{d}, {k} of {experts}", profile, (x, weight, ids, table, 1.5))
        logits = torch.tensor(_GOLDEN_LOGITS, dtype=dtype).unsqueeze(1)
        table = draw.permutation(len(logits)).int().unsqueeze(0)
        golden = (
            torch.ones(2, 1, dtype=dtype),
            logits,
            torch.zeros(2, dtype=torch.int64),
            table,
            2.5,
        )
        yield Case("golden logits", profile, golden)
        x, weight = _router(draw, 14, 32, 16, dtype)
        repeated = torch.tensor([[3, 3, 1], [0, 2, 0], [15, 15, 15]], dtype=torch.int32)
        yield Case(
            "repeated experts, strided",
            profile,
            (x[::2], weight, draw.integers(7, high=3), repeated, 1.5),
        )
        special = draw.normal(3, 32, dtype=dtype)
        special[1, 4] = float("nan")
        yield Case("NaN token", profile, (special, weight, draw.integers(3, high=3), repeated, 2.5))
    table = torch.tensor([[2, 0], [1, 2]])
    for profile, dtype in (("ideal", torch.float32), ("official", torch.bfloat16)):
        router = _far_logits(dtype)
        yield Case("scores of 0", profile, (*router, torch.tensor([0, 1, 1]), table, 1.5))


def _folded(case: Case) -> Case:
    x, weight, third, *rest = case.arguments
    if third.is_floating_point():
        return replace(case, arguments=(x, *fold_gate(weight, third), *rest))
    return replace(case, arguments=(x, fold_gate(weight, None)[0], third, *rest))


def _cases_of(plain: Operator) -> Callable[[Draw], Iterator[Case]]:
    make = plain.make_cases
    assert make is not None
    return lambda draw: map(_folded, make(draw))


gate_topk_folded.cases(_cases_of(gate_topk))
gate_hash_folded.cases(_cases_of(gate_hash))

_WRONG_SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sigmoid scores": torch.sigmoid,
    "softmax scores": lambda logits: logits.softmax(-1),
    "root left out": F.softplus,
    "softplus that overflows": lambda logits: logits.exp().log1p().sqrt(),
    "ReLU instead of softplus": lambda logits: F.relu(logits).sqrt(),
    "scores rounded to bf16": lambda logits: sqrt_softplus(logits).bfloat16().to(logits.dtype),
    "logits rounded to bf16": lambda logits: sqrt_softplus(logits.bfloat16().to(logits.dtype)),
}
for _contract in (gate_topk, gate_hash, gate_topk_folded, gate_hash_folded):
    _contract.wrong_step(sqrt_softplus, _WRONG_SCORES)
    _contract.wrong_arguments({"route_scale left out": {"route_scale": 1.0}})
    _contract.no_output_fault("ids: one NaN", "ids are integers")


def _over_all_experts(scores: torch.Tensor, ids: torch.Tensor, route_scale: float) -> torch.Tensor:
    return scores.gather(1, ids) / scores.sum(-1, keepdim=True) * route_scale


def _equal_weights(scores: torch.Tensor, ids: torch.Tensor, route_scale: float) -> torch.Tensor:
    return torch.full_like(scores.gather(1, ids), route_scale / ids.shape[1])


Outputs = tuple[torch.Tensor, torch.Tensor]
for _contract in (gate_topk, gate_topk_folded):
    _contract.wrong_arguments({"bias ignored in the selection": {"bias": torch.zeros_like}})
    _contract.wrong_steps(
        {
            "bias enters the weights": {
                _route: lambda s, bias, *rest: _route(s + bias, bias * 0, *rest)
            },
            "ids in rising order": {
                select_largest: lambda v, k: select_largest(v, k).sort(-1).values
            },
            "normalised over all experts": {normalise: _over_all_experts},
        }
    )
_UNFOLDED_WEIGHT = {"weight": lambda weight: weight * LOGIT_UNIT}
gate_topk_folded.wrong_arguments(
    {
        "weight not folded": _UNFOLDED_WEIGHT,
        "bias not folded": {"bias": lambda bias: bias * SCORE_UNIT},
        "bias folded like the weight": {"bias": lambda bias: bias / SCORE_UNIT},
    }
)
gate_hash_folded.wrong_arguments({"weight not folded": _UNFOLDED_WEIGHT})


@gate_topk.fault("bias added to the logits")
def _(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, k: int, route_scale: float
) -> Outputs:
    logits = compute(x) @ compute(weight).T
    ids = select_largest(sqrt_softplus(logits + bias), k)
    return normalise(sqrt_softplus(logits), ids, route_scale), ids.int()


@gate_topk.fault("ties take the larger expert id")
def _(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, k: int, route_scale: float
) -> Outputs:
    weights, ids = gate_topk.reference(x, weight.flip(0), bias.flip(0), k, route_scale)
    return weights, weight.shape[0] - 1 - ids


for _contract in (gate_hash, gate_hash_folded):
    _contract.wrong_arguments(
        {
            "experts of the token before": {"input_ids": lambda ids: ids.roll(1)},
            "position instead of token id": lambda a: a._replace(
                input_ids=torch.arange(a.x.shape[0]) % a.tid2eid.shape[0]
            ),
            "ids in rising order": {"tid2eid": lambda table: table.sort(-1).values},
        }
    )
    _contract.wrong_step(normalise, {"equal weights": _equal_weights})


@gate_hash.fault("experts chosen by score")
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    table: torch.Tensor,
    route_scale: float,
) -> Outputs:
    scores = expert_scores(x, weight)
    return _route(scores, torch.zeros_like(scores[:1]), table.shape[1], route_scale)


for _contract in (gate_topk, gate_topk_folded):
    _contract.equivalent(
        "select_largest: True -> False (2)",
        "torch's sort on the CPU keeps the order of equals either way",
    )
