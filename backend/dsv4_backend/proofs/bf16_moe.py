"""Proof of experts in bf16 in one step: cases, oracle, named faults (spec/deployments.md 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from dsv4_backend.contract import Case, Draw
from dsv4_backend.ops.bf16_moe import bf16_moe, expert_rows
from dsv4_backend.ops.int8_moe import add_choices
from dsv4_backend.ops.swiglu import clamped_swiglu, swiglu
from dsv4_backend.proofs.by_expert import WRONG_SUMS, explain_experts
from dsv4_backend.proofs.numerics import (
    BF16,
    Array,
    cast,
    decided_products,
    far_from_bf16_ties,
    round_to,
    wide,
)
from dsv4_backend.proofs.swiglu import WRONG_PRODUCTS

PROFILE = "bf16"


def _hidden(x: Array, w13: Array, limit: float) -> Array:
    """float64 [m] of one row, before it is rounded."""
    g, u = np.split(round_to(BF16, wide(w13) @ wide(x)), 2)
    g, u = np.minimum(g, limit), np.clip(u, -limit, limit)
    return np.asarray(g / (1 + np.exp(-g)) * u)


def _run(x: Array, w13: Array, w2: Array, limit: float) -> Array:
    """float64 [d] of one row and one expert, rounded to bf16."""
    return round_to(BF16, wide(w2) @ round_to(BF16, _hidden(x, w13, limit)))


@bf16_moe.oracle
def _(
    x: Array,
    weights: Array,
    ids: Array,
    w13: Array,
    w2: Array,
    shared_w13: Array,
    shared_w2: Array,
    limit: float,
) -> Array:
    """Token by token and choice by choice; nothing is sorted."""
    out = np.zeros(x.shape)
    with np.errstate(all="ignore"):
        for t, row in enumerate(x):
            out[t] = _run(row, shared_w13, shared_w2, limit)
            for weight, e in zip(weights[t], ids[t], strict=True):
                out[t] += float(weight) * _run(row, w13[e], w2[e], limit)
    return cast(BF16, out)


class Arguments(NamedTuple):
    """Of `bf16_moe`."""

    x: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor
    w13: torch.Tensor
    w2: torch.Tensor
    shared_w13: torch.Tensor
    shared_w2: torch.Tensor
    limit: float


def _eighths(draw: Draw, *shape: int) -> torch.Tensor:
    """Multiples of 1/8 up to 2, whose products fp32 sums exactly in any order."""
    return (draw.integers(*shape, low=-16, high=17) / 8).bfloat16()


class Sizes(NamedTuple):
    """Of a case: tokens, of how many experts each chooses how many, their width, channels."""

    tokens: int
    k: int
    experts: int
    m: int
    d: int


def _decided(draw: Draw, *sizes: int, limit: float = 10.0) -> Arguments:
    """Rows of sizes from far below 1 to beyond the clamp; ids of a token differ.

    Tokens are drawn until fp32 decides all hidden values of theirs, then rows of w2 until it
    decides all their products.
    """
    s = Sizes(*sizes)
    scale = torch.tensor([1.0, 32.0, 2.0**-4, 4.0]).repeat(s.tokens)[: s.tokens]
    root = 2.0 ** -round(np.log2(s.d) / 2)
    ids = torch.stack([draw.permutation(s.experts)[: s.k] for _ in range(max(s.tokens, 1))])[
        : s.tokens
    ]
    w13 = _eighths(draw, s.experts + 1, 2 * s.m, s.d) * root
    x = torch.zeros(s.tokens, s.d, dtype=torch.bfloat16)
    inputs: list[list[Array]] = [[] for _ in range(s.experts + 1)]
    for t, row in enumerate(ids.tolist()):
        own = [*row, s.experts]
        hidden = None
        while hidden is None or not all(map(far_from_bf16_ties, hidden)):
            x[t] = _eighths(draw, s.d) * scale[t]
            token = x[t].float().numpy()
            hidden = [_hidden(token, w13[e].float().numpy(), limit) for e in own]
        for e, h in zip(own, hidden, strict=True):
            inputs[e].append(round_to(BF16, h))
    w2 = torch.stack([_decided_weight(draw, s, given) for given in inputs])
    return Arguments(
        x,
        draw.uniform(s.tokens, s.k, low=0.1),
        ids.int(),
        w13[:-1],
        w2[:-1],
        w13[-1],
        w2[-1],
        limit,
    )


def _decided_weight(draw: Draw, s: Sizes, hidden: list[Array]) -> torch.Tensor:
    """W2 [d, m] of an expert with such hidden rows."""
    weight = torch.zeros(s.d, s.m, dtype=torch.bfloat16)
    open_ = torch.ones(s.d, dtype=torch.bool)
    while open_.any():
        weight[open_] = draw.normal(int(open_.sum()), s.m, scale=s.m**-0.5, dtype=torch.bfloat16)
        if not hidden:
            break
        decided = decided_products(np.stack(hidden), wide(weight.float().numpy())).all(0)
        open_ = torch.from_numpy(~decided)
    return weight


@bf16_moe.cases
def _(draw: Draw) -> Iterator[Case]:
    for sizes in (
        (0, 2, 4, 32, 16),
        (1, 1, 1, 1, 1),
        (1, 6, 8, 32, 64),
        (3, 2, 5, 7, 33),
        (7, 3, 4, 24, 40),
        (2, 6, 6, 64, 160),
    ):
        name = "{} tokens, {} of {} experts, {}x{}".format(*sizes)
        yield Case(name, PROFILE, tuple(_decided(draw, *sizes)))
    yield Case("a narrow clamp", PROFILE, tuple(_decided(draw, 4, 2, 3, 16, 24, limit=0.3017)))
    a = _decided(draw, 4, 2, 3, 32, 64)
    strided = a._replace(
        x=torch.stack([a.x, a.x], 2)[..., 0],
        w13=a.w13.mT.contiguous().mT,
        shared_w2=a.shared_w2.T.contiguous().T,
    )
    yield Case("strided", PROFILE, tuple(strided))
    same = a._replace(ids=torch.zeros_like(a.ids))
    yield Case("all tokens to one expert, twice each", PROFILE, tuple(same))
    x, weights = a.x.clone(), a.weights.clone()
    x[0], x[1, 3], x[2, 0], weights[3] = 0.0, torch.nan, torch.inf, 0.0
    yield Case("NaN, infinity, zeros", PROFILE, tuple(a._replace(x=x, weights=weights)))


_Edit = Callable[[torch.Tensor], torch.Tensor]
_HALVES: _Edit = lambda w: w.roll(w.shape[-2] // 2, -2)  # noqa: E731
bf16_moe.wrong_arguments(
    {
        "weights of the next choice": {"weights": lambda w: w.roll(1, -1)},
        "weights left out": {"weights": torch.ones_like},
        "weights in bf16": {"weights": lambda w: (w * 1.02).bfloat16().float()},
        "ids of the next token": {"ids": lambda ids: ids.roll(1, 0)},
        "halves of w13 swapped": {"w13": _HALVES},
        "halves of the shared w13 swapped": {"shared_w13": _HALVES},
        "no clamp": {"limit": math.inf},
        "shared expert left out": {"shared_w2": torch.zeros_like},
        "routed experts left out": {"w2": torch.zeros_like},
        "w2 of the next expert": {"w2": lambda w: w.roll(1, 0)},
    }
)
bf16_moe.wrong_step(clamped_swiglu, WRONG_PRODUCTS)
bf16_moe.wrong_steps(
    {
        **WRONG_SUMS,
        "sum in bf16": {
            add_choices: lambda shared, choices, weights: sum(
                (choices[:, j] * weights[:, j : j + 1].bfloat16() for j in range(choices.shape[1])),
                shared,
            )
        },
        "hidden rows not rounded": {
            swiglu.reference: lambda gate, up, weights, limit: (
                clamped_swiglu(gate, up, limit).mul(1.02).to(gate.dtype)
            )
        },
        "no rows for the last expert": {
            expert_rows: lambda rows, w13, w2, offsets, limit: expert_rows(
                rows, w13, w2 * (torch.arange(len(w2)) < len(w2) - 1)[:, None, None], offsets, limit
            )
        },
    }
)
explain_experts(bf16_moe)
bf16_moe.explain(
    dict.fromkeys(
        (
            "swiglu: 1 -> 2",
            "swiglu: weights.to(h.dtype) -> weights",
            "swiglu: weights.to(h.dtype).unsqueeze(-1) * h -> "
            "weights.to(h.dtype).unsqueeze(-1) / h",
        ),
        "the SwiGLU is given no weights here",
    ),
    dict.fromkeys(
        (
            "add_choices: shared.float() -> shared",
            "add_choices: choices[:, j].float() -> choices[:, j]",
        ),
        "bf16 meets fp32, and the sum is fp32 too",
    ),
    {
        "moe_dispatch: True -> False": "choices are put back, whatever the order within an expert",
        "bf16_moe: 0 -> 1": "experts beyond the last have no rows",
    },
)
