"""Proof of MX experts in one step (spec/deployments.md 3, 4): cases, oracle, named faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from dsv4_backend.contract import Case, Draw
from dsv4_backend.faults import on_bytes
from dsv4_backend.ops.moe import moe_dispatch
from dsv4_backend.ops.mx import mxfp8_gemm, quantize_weight_mxfp8
from dsv4_backend.ops.mx_moe import mx_moe
from dsv4_backend.ops.mx_tiles import mxfp4_tiled_grouped_gemm, pack_mxfp4
from dsv4_backend.ops.quant import act_quant, quantize_weight_fp4
from dsv4_backend.ops.swiglu import clamped_swiglu
from dsv4_backend.proofs.bounds import NO_ROWS_OF_NOTHING
from dsv4_backend.proofs.by_expert import WRONG_SUMS, explain_experts
from dsv4_backend.proofs.mx import PROFILE, product, sum_of_blocks, undecided
from dsv4_backend.proofs.mx_tiles import in_rows
from dsv4_backend.proofs.numerics import (
    BF16,
    Array,
    cast,
    fp4_values,
    quantise_fp8,
    wide,
)
from dsv4_backend.proofs.quant import ACT_QUANT_EQUIVALENTS
from dsv4_backend.proofs.rounding_rows import NO_257TH_CODE
from dsv4_backend.proofs.swiglu import WRONG_HALVES


class Arguments(NamedTuple):
    """Of `mx_moe`."""

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


class _Expert(NamedTuple):
    """Values [2m, d] with scales, [d, m] with scales."""

    w13: Array
    w13_scale: Array
    w2: Array
    w2_scale: Array

    def run(self, row: Array, limit: float) -> Array:
        """float64 [d] of bf16 values, of a row [d]."""
        codes, scale = quantise_fp8(row[None], 32)
        sums = sum_of_blocks(codes, scale, self.w13, self.w13_scale)
        codes, scale = quantise_fp8(product(sums, limit), 32)
        return wide(sum_of_blocks(codes, scale, self.w2, self.w2_scale)[0])


def _experts(a: Any) -> tuple[list[_Expert], _Expert]:
    """The routed ones and the shared one, of arrays."""
    routed = [
        _Expert(
            fp4_values(in_rows(a.w13[e])),
            a.w13_scale[e],
            fp4_values(in_rows(a.w2[e])),
            a.w2_scale[e],
        )
        for e in range(len(a.w13))
    ]
    shared = a.shared_w13, a.shared_w13_scale, a.shared_w2, a.shared_w2_scale
    return routed, _Expert(*shared)


@mx_moe.oracle
def _(*arguments: Any) -> Array:
    """Token by token and choice by choice; nothing is sorted."""
    a = Arguments(*arguments)
    routed, shared = _experts(a)
    out = np.zeros(a.x.shape)
    for t, row in enumerate(a.x):
        out[t] = shared.run(row, a.limit)
        for weight, e in zip(a.weights[t], a.ids[t], strict=True):
            out[t] += float(weight) * routed[e].run(row, a.limit)
    return cast(BF16, out)


def _rows(draw: Draw, t: int, d: int) -> torch.Tensor:
    """bf16 [t, d] of another size in every row; the largest of 32 are 448 times a power of two."""
    values = draw.normal(t, d).clamp(-2, 2)
    values[:, ::32] = 7
    return (values * torch.exp2(draw.integers(t, 1, low=-4, high=2).float())).bfloat16()


def _fp4(draw: Draw, experts: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiles and scales of that many weights [n, k]."""
    pairs = [quantize_weight_fp4(draw.normal(n, k) * k**-0.5) for _ in range(experts)]
    parts = ([p.view(torch.uint8) for p in part] for part in zip(*pairs, strict=True))
    codes, scales = map(torch.stack, parts)
    return pack_mxfp4.reference(codes.view(torch.int8)), scales.view(torch.float8_e8m0fnu)


def _drawn(draw: Draw, sizes: tuple[int, ...], limit: float) -> Arguments:
    """Arguments of (tokens, choices, experts, m, d)."""
    t, k, experts, m, d = sizes
    ids = torch.stack([draw.permutation(experts)[:k] for _ in range(t)]) if t else torch.zeros(0, k)
    return Arguments(
        _rows(draw, t, d),
        draw.uniform(t, k, low=0.1),
        ids.int(),
        *_fp4(draw, experts, 2 * m, d),
        *_fp4(draw, experts, d, m),
        *quantize_weight_mxfp8(draw.spread(2 * m, d) * 2.0**-6),
        *quantize_weight_mxfp8(draw.normal(d, m) * m**-0.5),
        limit,
    )


def _is_decided(a: Arguments) -> bool:
    """Whether no hidden code hangs on the last bits of fp32."""
    codes, scale = act_quant.reference(a.x, 32)
    rows, offsets, order = moe_dispatch.reference(codes, a.ids, len(a.w13))
    of_rows = scale.view(torch.uint8)[order // a.ids.shape[1]].view(scale.dtype)
    routed = mxfp4_tiled_grouped_gemm.reference(rows, of_rows, a.w13, a.w13_scale, offsets)
    shared = mxfp8_gemm.reference(codes, scale, a.shared_w13, a.shared_w13_scale)
    return not any(undecided(sums, a.limit).any() for sums in (routed, shared))


def _decided(draw: Draw, *sizes: int, limit: float = 10.0) -> Arguments:
    while not _is_decided(drawn := _drawn(draw, sizes, limit)):
        pass
    return drawn


def _outweighed_rows(draw: Draw) -> Arguments:
    """The first channel of 32 is so large that the others have few bits, and its weight is 0."""
    while True:
        a = _decided(draw, 3, 2, 4, 64, 64)
        x = draw.normal(3, 64)
        x[:, ::32] = -(7 * 2.0**14)
        own = on_bytes(lambda b: b.masked_fill(torch.arange(b.shape[-1]) % 32 == 0, 0))
        # The first nibble of a row of a tile.
        tiles = on_bytes(lambda b: torch.where(torch.arange(b.shape[-1]) == 0, b & 0xF0, b))
        a = a._replace(x=x.bfloat16(), w13=tiles(a.w13), shared_w13=own(a.shared_w13))
        if _is_decided(a):
            return a


@mx_moe.cases
def _(draw: Draw) -> Iterator[Case]:
    for sizes in (
        (0, 2, 4, 32, 32),
        (1, 1, 1, 32, 32),
        (1, 6, 8, 128, 64),
        (3, 2, 5, 64, 96),
        (5, 3, 4, 128, 64),
    ):
        name = "{} tokens, {} of {} experts, {}x{}".format(*sizes)
        yield Case(name, PROFILE, tuple(_decided(draw, *sizes)))
    yield Case("a narrow clamp", PROFILE, tuple(_decided(draw, 2, 2, 3, 32, 64, limit=0.3017)))
    yield Case("large channels without a weight", PROFILE, tuple(_outweighed_rows(draw)))
    small = _decided(draw, 2, 2, 3, 64, 64)
    below = on_bytes(lambda b: b + 30)
    small = small._replace(
        x=small.x * 2.0**-30,
        w13_scale=below(small.w13_scale),
        shared_w13_scale=below(small.shared_w13_scale),
    )
    if _is_decided(small):
        yield Case("rows below the floor", PROFILE, tuple(small))
    a = _decided(draw, 4, 2, 3, 128, 64)
    strided = a._replace(
        x=torch.stack([a.x, a.x], 2)[..., 0],
        shared_w2=a.shared_w2.mT.contiguous().mT,
        weights=torch.stack([a.weights, a.weights], 2)[..., 0],
    )
    yield Case("strided", PROFILE, tuple(strided))
    same = a._replace(ids=torch.zeros_like(a.ids))
    if _is_decided(same):
        yield Case("all tokens to one expert, twice each", PROFILE, tuple(same))
    x, weights = a.x.clone(), a.weights.clone()
    x[0], x[1, 3], weights[3] = 0.0, torch.nan, 0.0
    yield Case("NaN, zeros", PROFILE, tuple(a._replace(x=x, weights=weights)))


_Edit = Callable[[torch.Tensor], torch.Tensor]
_NEXT_ROWS: _Edit = on_bytes(lambda b: b.roll(1, -2))
mx_moe.wrong_arguments(
    {
        "weights of the next choice": {"weights": lambda w: w.roll(1, -1)},
        "weights left out": {"weights": torch.ones_like},
        "ids of the next token": {"ids": lambda ids: ids.roll(1, 0)},
        "scales of w13 of the next row": {"w13_scale": _NEXT_ROWS},
        "scales of w2 of the next row": {"w2_scale": _NEXT_ROWS},
        "scales of the shared w13 of the next row": {"shared_w13_scale": _NEXT_ROWS},
        "scales of the shared w2 of the next row": {"shared_w2_scale": _NEXT_ROWS},
        "halves of w13 swapped": {
            "w13": lambda w: w.roll(w.shape[2] // 2, 2),
            "w13_scale": on_bytes(lambda b: b.roll(b.shape[1] // 2, 1)),
        },
        "nibbles of w2 swapped": {"w2": on_bytes(lambda b: b << 4 | b >> 4)},
        "tiles of w13 in another order": {"w13": lambda w: w.roll(1, 2)},
        "shared expert left out": {"shared_w2": torch.zeros_like},
        "routed experts left out": {"w2": torch.zeros_like},
    }
)
mx_moe.wrong_step(clamped_swiglu, WRONG_HALVES)
mx_moe.wrong_steps(WRONG_SUMS)
explain_experts(mx_moe)
_NO_NUMBERS = "codes of a block without numbers are NaN, whatever its scale"
mx_moe.equivalent(*NO_257TH_CODE)
mx_moe.explain(
    ACT_QUANT_EQUIVALENTS,
    NO_ROWS_OF_NOTHING,
    dict.fromkeys(
        (
            "scale_bytes: 255 -> 256 (2)",
            "scale_bytes: rounded_up.clamp(max=255) -> rounded_up",
        ),
        _NO_NUMBERS,
    ),
    {"by_expert: 0 -> 1": "without rows any expert gives the width alone"},
)
mx_moe.explain(
    {
        "split_blocks: -x.shape[-1] -> x.shape[-1]": "channels are multiples of 32",
        "moe_dispatch: 1 -> 2": "experts beyond the last have no rows",
        "moe_dispatch: True -> False": "choices are put back, whatever the order within an expert",
    },
    dict.fromkeys(
        (
            "add_choices: shared.float() -> shared",
            "add_choices: choices[:, j].float() -> choices[:, j]",
        ),
        "bf16 meets fp32, and the result is fp32 without the cast too",
    ),
)
