"""Proof of W8A8 experts in one step: cases, oracle, named faults (spec/deployments.md 2, 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from dsv4_backend.contract import Case, Draw
from dsv4_backend.ops.int8 import quantize_weight_int8, scaled
from dsv4_backend.ops.int8_moe import hidden, int8_moe
from dsv4_backend.ops.swiglu import clamped_swiglu
from dsv4_backend.ops.token_quant import round_int8
from dsv4_backend.proofs.bounds import INT8_RATIOS
from dsv4_backend.proofs.by_expert import WRONG_SUMS, explain_experts
from dsv4_backend.proofs.int8 import ALREADY_FP32, SAME_SCALED, SAME_SUMS
from dsv4_backend.proofs.numerics import BF16, Array, cast, wide
from dsv4_backend.proofs.swiglu import WRONG_HALVES
from dsv4_backend.proofs.token_quant import SAME_CODES, int8_codes, token_codes

PROFILE = "a2a3-int8"
_MARGIN = 2.0**-12


class _Expert(NamedTuple):
    """w13 [2m, d], its scales [2m], w2 [d, m], its scales [d]."""

    w13: Array
    w13_scale: Array
    w2: Array
    w2_scale: Array


def _hidden(codes: Array, scale: Array, expert: _Expert, limit: float) -> Array:
    """float64 [m] of one row: what is quantised for w2."""
    sums = expert.w13.astype(np.int64) @ codes.astype(np.int64)
    both = wide(sums.astype(np.float32) * expert.w13_scale.astype(np.float32) * scale)
    g, u = np.split(both, 2)
    g, u = np.minimum(g, limit), np.clip(u, -limit, limit)
    return np.asarray(g / (1 + np.exp(-g)) * u)


def _run(codes: Array, scale: Array, expert: _Expert, limit: float) -> Array:
    """[d] in bf16 of one row and one expert."""
    h = _hidden(codes, scale, expert, limit)
    step = np.float32(np.abs(h).max() / 127 if np.isfinite(h).all() else np.nan)
    inner = int8_codes(h / step) if step > 0 else np.zeros(h.shape, np.int8)
    sums = expert.w2.astype(np.int64) @ inner.astype(np.int64)
    return cast(BF16, sums.astype(np.float32) * wide(expert.w2_scale).astype(np.float32) * step)


@int8_moe.oracle
def _(
    x: Array,
    weights: Array,
    ids: Array,
    w13: Array,
    w13_scale: Array,
    w2: Array,
    w2_scale: Array,
    shared_w13: Array,
    shared_w13_scale: Array,
    shared_w2: Array,
    shared_w2_scale: Array,
    limit: float,
) -> Array:
    """Token by token and choice by choice; nothing is sorted."""
    codes, scales = token_codes(x, 127, int8_codes)
    shared = _Expert(shared_w13, shared_w13_scale, shared_w2, shared_w2_scale)
    out = np.zeros(x.shape)
    with np.errstate(all="ignore"):
        for t, (row, scale) in enumerate(zip(codes, scales, strict=True)):
            out[t] = wide(_run(row, scale, shared, limit))
            for weight, e in zip(weights[t], ids[t], strict=True):
                chosen = _Expert(w13[e], w13_scale[e], w2[e], w2_scale[e])
                out[t] += float(weight) * wide(_run(row, scale, chosen, limit))
    return cast(BF16, out)


class Arguments(NamedTuple):
    """Of `int8_moe`."""

    x: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor
    w13: torch.Tensor
    w13_scale: torch.Tensor
    w2: torch.Tensor
    w2_scale: torch.Tensor
    shared_w13: torch.Tensor
    shared_w13_scale: torch.Tensor
    shared_w2: torch.Tensor
    shared_w2_scale: torch.Tensor
    limit: float


def _weight(draw: Draw, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_weight_int8(draw.normal(*shape) * shape[-1] ** -0.5)


def _drawn(draw: Draw, t: int, k: int, experts: int, m: int, d: int, limit: float) -> Arguments:
    """Rows of sizes from far below 1 to beyond the clamp; ids of a token differ."""
    size = torch.tensor([1.0, 30.0, 0.05, 4.0]).repeat(t)[:t, None]
    w2, w2_scale = _weight(draw, experts, d, m)
    ids = torch.stack([draw.permutation(experts)[:k] for _ in range(t)]) if t else torch.zeros(0, k)
    return Arguments(
        (draw.normal(t, d) * size).bfloat16(),
        draw.uniform(t, k, low=0.1),
        ids.int(),
        *_weight(draw, experts, 2 * m, d),
        w2,
        w2_scale.bfloat16(),
        *_weight(draw, 2 * m, d),
        *_weight(draw, d, m),
        limit,
    )


def _is_decided(a: Arguments) -> bool:
    """Whether no hidden value lies so near a tie that the last bits of fp32 decide its code."""
    codes, scales = token_codes(a.x.float().numpy(), 127, int8_codes)
    experts = [(t, a.w13[e], a.w13_scale[e]) for t, row in enumerate(a.ids.tolist()) for e in row]
    experts += [(t, a.shared_w13, a.shared_w13_scale) for t in range(len(codes))]
    for t, w13, scale in experts:
        expert = _Expert(w13.numpy(), scale.numpy(), np.zeros(0), np.zeros(0))
        h = _hidden(codes[t], scales[t], expert, a.limit)
        ratio = h / (np.abs(h).max() / 127)
        if (np.abs(np.abs(ratio - np.floor(ratio)) - 0.5) < _MARGIN).any():
            return False
    return True


def _decided(
    draw: Draw, t: int, k: int, experts: int, m: int, d: int, limit: float = 10.0
) -> Arguments:
    while not _is_decided(drawn := _drawn(draw, t, k, experts, m, d, limit)):
        pass
    return drawn


@int8_moe.cases
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
        w2_scale=torch.stack([a.w2_scale, a.w2_scale], 2)[..., 0],
    )
    yield Case("strided", PROFILE, tuple(strided))
    same = a._replace(ids=torch.zeros_like(a.ids))
    yield Case("all tokens to one expert, twice each", PROFILE, tuple(same))
    x, weights = a.x.clone(), a.weights.clone()
    x[0], x[1, 3], x[2, 0], weights[3] = 0.0, torch.nan, torch.inf, 0.0
    special = a._replace(x=x, weights=weights)
    yield Case("NaN, infinity, zeros", PROFILE, tuple(special))


_Edit = Callable[[torch.Tensor], torch.Tensor]
_NEXT: _Edit = lambda s: s.roll(1, -1)  # noqa: E731
int8_moe.wrong_arguments(
    {
        "weights of the next choice": {"weights": _NEXT},
        "weights left out": {"weights": torch.ones_like},
        "weights in bf16": {"weights": lambda w: (w * 1.02).bfloat16().float()},
        "ids of the next token": {"ids": lambda ids: ids.roll(1, 0)},
        "channel scales of w13 of the next": {"w13_scale": _NEXT},
        "channel scales of w2 of the next": {"w2_scale": _NEXT},
        "channel scales of the shared w13 of the next": {"shared_w13_scale": _NEXT},
        "channel scales of the shared w2 of the next": {"shared_w2_scale": _NEXT},
        "halves of w13 swapped": {
            "w13": lambda w: w.roll(w.shape[1] // 2, 1),
            "w13_scale": lambda s: s.roll(s.shape[1] // 2, 1),
        },
        "shared expert left out": {"shared_w2": torch.zeros_like},
        "routed experts left out": {"w2": torch.zeros_like},
    }
)
int8_moe.wrong_step(clamped_swiglu, WRONG_HALVES)
int8_moe.wrong_steps(
    {
        **WRONG_SUMS,
        "codes cut instead of rounded": {round_int8: lambda x: round_int8(x.trunc())},
        "rounded to bf16 before the SwiGLU": {
            scaled: lambda *arguments: scaled(*arguments).bfloat16().float()
        },
        "row scales of the first row": {
            hidden: lambda rows, *rest: hidden(
                rows._replace(scale=rows.scale[:1].expand_as(rows.scale).contiguous()), *rest
            )
        },
    }
)
explain_experts(int8_moe)
_NOBODYS = "experts beyond the last have no rows"
_WIDENED = "bf16 meets fp32, and the result is fp32 without the cast too"
int8_moe.explain(
    SAME_CODES,
    INT8_RATIOS,
    SAME_SUMS,
    dict.fromkeys(
        (
            "exact_product: _EXACT_TERMS -> _EXACT_TERMS + 1",
            "exact_product: _EXACT_TERMS -> _EXACT_TERMS + 1 (2)",
        ),
        "one term more still fits into 24 bits, and no row of a case is as long",
    ),
    SAME_SCALED,
    ALREADY_FP32,
    dict.fromkeys(("int8_moe: 0 -> 1", "moe_dispatch: 1 -> 2"), _NOBODYS),
    dict.fromkeys(
        (
            "add_choices: shared.float() -> shared",
            "add_choices: choices[:, j].float() -> choices[:, j]",
            "int8_moe: w2_scale.float() -> w2_scale",
        ),
        _WIDENED,
    ),
    {
        "moe_dispatch: True -> False": "choices are put back, whatever the order within an expert",
        "round_int8: x.round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8) -> "
        "x.round().clamp(-INT8_MAX, INT8_MAX)": "the products are of the same numbers",
    },
)
