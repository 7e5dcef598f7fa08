"""Proof of RMS normalisation to MX rows (spec/deployments.md 3): cases, oracle, named faults."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from dsv4_backend.contract import Case, Draw
from dsv4_backend.faults import on_bytes
from dsv4_backend.ops.formats import block_scale
from dsv4_backend.ops.mx_norm import quantise_mx, rms_norm_mx
from dsv4_backend.ops.norm import rms_norm
from dsv4_backend.proofs.bounds import NO_ROWS_OF_NOTHING
from dsv4_backend.proofs.mx import PROFILE
from dsv4_backend.proofs.numerics import (
    E4M3,
    E8M0,
    Array,
    cast,
    per_channel,
    quantise,
    rms_normed,
    wide,
)
from dsv4_backend.proofs.quant import ACT_QUANT_EQUIVALENTS

_NO_FLOOR = 448 * 2.0**-126
_MARGIN = 2.0**-18


@rms_norm_mx.oracle
def _(x: Array, weight: Array, eps: float) -> tuple[Array, Array]:
    codes, scales = quantise(E4M3, rms_normed(x, weight, eps), 32, _NO_FLOOR)
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
        exact = rms_normed(row.float().numpy(), weight.float().numpy(), eps)
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
