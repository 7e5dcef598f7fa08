"""Proof of steps of a layer in MX formats (spec/deployments.md 3, 4): cases, oracles, faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from dsv4_backend.contract import Case, Draw
from dsv4_backend.faults import on_bytes
from dsv4_backend.ops.formats import block_scale
from dsv4_backend.ops.int8_moe import add_choices
from dsv4_backend.ops.moe import moe_dispatch
from dsv4_backend.ops.mx import mxfp8_gemm, quantize_weight_mxfp8
from dsv4_backend.ops.mx_layer import mx_moe, mx_output_projection, quantise_mx, rms_norm_mx
from dsv4_backend.ops.mx_tiles import mxfp4_tiled_grouped_gemm, pack_mxfp4
from dsv4_backend.ops.norm import rms_norm
from dsv4_backend.ops.quant import act_quant, quantize_weight_fp4
from dsv4_backend.ops.swiglu import clamped_swiglu
from dsv4_backend.proofs.bounds import NO_ROWS_OF_NOTHING
from dsv4_backend.proofs.by_expert import explain_experts
from dsv4_backend.proofs.mx import PROFILE, SCALE_EDITS, product, sum_of_blocks, undecided
from dsv4_backend.proofs.mx_tiles import in_rows
from dsv4_backend.proofs.numerics import (
    BF16,
    E4M3,
    E8M0,
    Array,
    cast,
    fp4_values,
    per_channel,
    quantise,
    quantise_fp8,
    wide,
)
from dsv4_backend.proofs.quant import ACT_QUANT_EQUIVALENTS
from dsv4_backend.proofs.rounding_rows import NO_257TH_CODE
from dsv4_backend.proofs.swiglu import WRONG_HALVES

_NO_FLOOR = 448 * 2.0**-126
_MARGIN = 2.0**-18


def _normed(x: Array, weight: Array, eps: float) -> Array:
    length = np.sqrt(np.square(wide(x)).mean(-1, keepdims=True) + eps)
    return np.asarray(wide(x) / length * wide(weight))


@rms_norm_mx.oracle
def _(x: Array, weight: Array, eps: float) -> tuple[Array, Array]:
    codes, scales = quantise(E4M3, _normed(x, weight, eps), 32, _NO_FLOOR)
    unknown = np.isnan(per_channel(scales, 32, x.shape[-1]))
    return np.where(unknown, np.zeros_like(codes), codes), cast(E8M0, scales)


def _norm_arguments(
    draw: Draw, dtype: torch.dtype, shape: tuple[int, ...], eps: float = 1e-6, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Rows none of whose codes or scales hangs on the last bits of fp32."""
    weight = 1 + 0.3 * draw.normal(shape[-1], dtype=dtype)
    x = torch.zeros(0, shape[-1], dtype=dtype)
    while len(x) < int(np.prod(shape[:-1])):
        row = draw.spread(1, shape[-1], dtype=dtype) * scale
        exact = _normed(row.float().numpy(), weight.float().numpy(), eps)
        (low, of_low), (high, of_high) = (
            quantise(E4M3, exact * (1 + side * _MARGIN), 32, _NO_FLOOR) for side in (-1, 1)
        )
        if np.array_equal(wide(low), wide(high)) and np.array_equal(of_low, of_high):
            x = torch.cat([x, row])
    return x.view(shape), weight, eps


@rms_norm_mx.cases
def _(draw: Draw) -> Iterator[Case]:
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        for shape in ((0, 64), (1, 1), (3, 7), (5, 64), (2, 3, 130), (6, 256)):
            arguments = _norm_arguments(draw, dtype, shape)
            yield Case(f"{'x'.join(map(str, shape))}, {name}", PROFILE, arguments)
        x, weight, eps = _norm_arguments(draw, dtype, (4, 192))
        strided = torch.stack([x, x], 2)[..., 0]
        yield Case(f"strided, {name}", PROFILE, (strided, weight, eps))
        tiny = _norm_arguments(draw, dtype, (3, 128), 0.25, 2.0**-12)
        yield Case(f"epsilon matters, values below 1e-4, {name}", PROFILE, tiny)
        special = x.clone()
        special[0, 3], special[1, 70] = torch.nan, torch.nan
        yield Case(f"NaN, {name}", PROFILE, (special, weight, eps))


rms_norm_mx.wrong_arguments(
    {
        "epsilon left out": {"eps": 0.0},
        "weight left out": {"weight": torch.ones_like},
        "weight of the next channel": {"weight": lambda weight: weight.roll(1)},
        "mean subtracted": {"x": lambda x: x - x.float().mean(-1, keepdim=True).to(x.dtype)},
    }
)
rms_norm_mx.wrong_steps(
    {
        "rounded to bf16 before the codes": {
            rms_norm.reference: lambda *given: rms_norm.reference(*given).bfloat16().float()
        },
        "floor of 1e-4": {block_scale: lambda b, largest, _: block_scale(b, largest, 1e-4)},
        "largest code 240": {block_scale: lambda b, _, floor: block_scale(b, 240.0, floor)},
        "scales of the next block": {
            quantise_mx: lambda rows: (
                quantise_mx(rows).codes,
                on_bytes(lambda b: b.roll(1, -1))(quantise_mx(rows).scale),
            )
        },
    }
)


@mx_output_projection.oracle
def _(o: Array, weight: Array, scale: Array) -> Array:
    """Group after group."""
    heads = o.reshape(len(o), len(weight), weight.shape[2])
    parts = []
    for g, (matrix, of_matrix) in enumerate(zip(weight, scale, strict=True)):
        codes, of_codes = quantise_fp8(heads[:, g], 32)
        parts.append(sum_of_blocks(codes, of_codes, matrix, of_matrix))
    return np.concatenate(parts, 1)


def _groups(draw: Draw, groups: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = quantize_weight_mxfp8(draw.normal(groups * n, k) * k**-0.5)
    return codes.unflatten(0, (groups, n)), scales.unflatten(0, (groups, n))


def _heads(draw: Draw, t: int, h: int, d: int) -> torch.Tensor:
    """bf16 [t, h, d] of another size in every 16 channels; the largest are 448 times a power."""
    powers = torch.exp2(draw.integers(t, h, -(-d // 16), low=-6, high=4).float())
    sizes = powers.repeat_interleave(16, -1)[..., :d]
    values = draw.normal(t, h, d).clamp(-2, 2) * sizes
    values[..., ::16] = 7 * sizes[..., ::16]
    return values.bfloat16()


def _outweighed(
    draw: Draw, t: int, h: int, d: int, groups: int, n: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first channel of 32 is so large that the others have few bits, and its weight is 0."""
    o = draw.normal(t, h, d)
    o[..., ::32] = -(7 * 2.0**14)
    o[:, 0, 0] *= 2.0**4
    codes, scales = _groups(draw, groups, n, h * d // groups)
    codes = on_bytes(lambda b: b.masked_fill(torch.arange(b.shape[-1]) % 32 == 0, 0))(codes)
    return o.bfloat16(), codes, scales


@mx_output_projection.cases
def _(draw: Draw) -> Iterator[Case]:
    for t, h, d, g, n in (
        (0, 2, 64, 2, 8),
        (1, 1, 1, 1, 1),
        (3, 4, 64, 2, 16),
        (5, 4, 64, 4, 24),
        (2, 6, 20, 3, 7),
        (4, 8, 128, 2, 32),
    ):
        o = _heads(draw, t, h, d)
        weight = _groups(draw, g, n, h * d // g)
        yield Case(f"{t} tokens, {h} heads of {d}, {g} groups to {n}", PROFILE, (o, *weight))
    o = _heads(draw, 8, 4, 128)[::2, :, ::2]
    codes, scales = _groups(draw, 2, 16, 128)
    yield Case("strided", PROFILE, (o, codes.mT.contiguous().mT, scales))
    yield Case("large channels without a weight", PROFILE, _outweighed(draw, 3, 4, 64, 2, 16))
    small, below = _heads(draw, 3, 4, 64) * 2.0**-30, on_bytes(lambda b: b + 30)
    codes, scales = _groups(draw, 2, 16, 128)
    yield Case("rows below the floor", PROFILE, (small, codes, below(scales)))
    special = o.clone()
    special[1, 2, 3], special[2], special[3, 1, 5] = torch.nan, 0.0, torch.inf
    yield Case("NaN, infinity, a row of zeros", PROFILE, (special, codes, scales))


mx_output_projection.wrong_arguments(
    {
        **{f"weight scales {name}": {"scale": edit} for name, edit in SCALE_EDITS.items()},
        "groups of the next heads": {"o": lambda o: o.roll(1, 1)},
        "weights of the first group for all": {
            "weight": lambda w: w[:1].expand_as(w),
            "scale": lambda s: s[:1].expand_as(s),
        },
        "heads interleaved over groups": lambda a: a._replace(
            o=a.o.unflatten(1, (-1, a.weight.shape[0])).transpose(1, 2).flatten(1, 2)
            if a.o.shape[1] % a.weight.shape[0] == 0
            else a.o
        ),
    }
)
mx_output_projection.wrong_steps(
    {
        "heads in one scale per 128 channels": {
            act_quant.reference: lambda x, _: (
                (codes := act_quant.reference(x, 128))[0],
                _repeated(codes[1], x.shape[-1]),
            )
        }
    }
)


def _repeated(scale: torch.Tensor, channels: int) -> torch.Tensor:
    """Scales per 128 channels as scales per 32."""
    four = scale.view(torch.uint8).repeat_interleave(4, -1)
    return four[..., : -(-channels // 32)].contiguous().view(scale.dtype)


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
mx_moe.wrong_steps(
    {
        "shared expert weighed too": {
            add_choices: lambda shared, choices, weights: add_choices(
                shared * weights[:, :1], choices, weights
            )
        },
        "last choice left out": {
            add_choices: lambda shared, choices, weights: add_choices(
                shared, choices[:, :-1], weights
            )
        },
    }
)
explain_experts(mx_moe)
_FP32 = "rows are fp32 already, and the weight takes part in fp32"
_NO_SUCH_CASE = "a sum of squares in fp32 decides no magnitude that is exactly 448 powers of two"
rms_norm_mx.explain(
    ACT_QUANT_EQUIVALENTS,
    NO_ROWS_OF_NOTHING,
    dict.fromkeys(
        (
            "compute: x.float() -> x",
            "compute: x.dtype == torch.float64 -> x.dtype != torch.float64",
            "rms_norm: compute(x) -> x",
            "rms_norm: weight.to(wide.dtype) -> weight",
            "rms_norm: (scaled * weight.to(wide.dtype)).to(x.dtype) -> "
            "scaled * weight.to(wide.dtype)",
        ),
        _FP32,
    ),
    dict.fromkeys(
        ("scale_bytes: 0 -> 1", "scale_bytes: bits & 8388607 -> bits | 8388607"), _NO_SUCH_CASE
    ),
    {
        "block_scale: blocks.abs().amax(-1).float().clamp(min=floor) -> "
        "blocks.abs().amax(-1).float()": "only blocks of zeros lie below the floor",
        "quantise_mx: FP8_WEIGHT_FLOOR -> FP8_WEIGHT_FLOOR * 2": "no normed value is so small",
    },
)
explain_experts(mx_output_projection)
_NO_NUMBERS = "codes of a block without numbers are NaN, whatever its scale"
for _op in (mx_output_projection, mx_moe):
    _op.equivalent(*NO_257TH_CODE)
    _op.explain(
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
mx_output_projection.explain(
    dict.fromkeys(
        (
            "compute: x.dtype == torch.float64 -> x.dtype != torch.float64",
            "compute: x.float() -> x",
        ),
        "quotients of bf16 and a power of two are exact in bf16 too, or far below e4m3",
    )
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
