"""Quantisation of activations with one fp32 scale per row,
as Ascend's DynamicQuant (spec/deployments.md 1).
"""

from __future__ import annotations

import torch

from dsv4_backend.contract import Tolerance, operator
from dsv4_backend.ops.formats import E4M3_MAX, round_e4m3
from dsv4_backend.ops.norm import rms_norm
from dsv4_backend.relations import require

INT8_MAX = 127.0
_EXACT = Tolerance(
    reason="one fp32 division per row and one per value, then one rounding: every bit is decided"
)
_ROWS = {"x": "bf16|f16 [..., K]"}
_SOME_CHANNELS = (require("x", "K >= 1", "0 channels", "at least 1"),)
Codes = tuple[torch.Tensor, torch.Tensor]


def row_scale(rows: torch.Tensor, largest: float) -> torch.Tensor:
    """fp32 [...]: largest magnitude of every fp32 row [..., K] over `largest`;
    NaN where the row is not finite.
    """
    amax = rows.abs().amax(-1)
    return torch.where(amax.isfinite(), amax / largest, torch.nan)


def over_scale(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Rows [..., K] / scale [...], 0 where the scale is 0 or NaN."""
    divisor = scale.unsqueeze(-1)
    return torch.where(divisor > 0, rows / divisor, 0.0)


def round_int8(x: torch.Tensor) -> torch.Tensor:
    """int8 nearest to clamp(x, -127, 127), ties to even."""
    return x.round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)


def quantise_int8(rows: torch.Tensor) -> Codes:
    """(int8 [..., K], fp32 [...]) of fp32 rows."""
    scale = row_scale(rows, INT8_MAX)
    return round_int8(over_scale(rows, scale)), scale


def quantise_e4m3(rows: torch.Tensor) -> Codes:
    """(e4m3 [..., K], fp32 [...]) of fp32 rows; codes are 0x7F under a NaN scale."""
    scale = row_scale(rows, E4M3_MAX)
    ratios = over_scale(rows, scale).masked_fill(scale.isnan().unsqueeze(-1), torch.nan)
    return round_e4m3(ratios), scale


@operator(
    "int8_token_quant(Tensor x) -> (Tensor q, Tensor scale)",
    rows=(7,),
    arguments=_ROWS,
    relations=_SOME_CHANNELS,
    tolerance=_EXACT,
)
def int8_token_quant(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes of every row with one fp32 scale: x is about q * scale.

    x: [..., K] bf16 or fp16, K >= 1. Returns q int8 [..., K], scale fp32 [...]. scale = fp32(max
    |x| / 127); q = fp32(x / scale) rounded to nearest, ties to even, within +-127. A row of zeros:
    0 and 0, and so where the scale is 0; a row with NaN or infinity: scale NaN, codes 0. Zero rows
    give empty results. No gradient. Source: aclnnDynamicQuant, spec/deployments.md 1,
    spec/v4.md 10 (column VA).
    """
    return quantise_int8(x.detach().float())


@operator(
    "rms_norm_int8(Tensor x, Tensor weight, float eps) -> (Tensor q, Tensor scale)",
    rows=(5, 7),
    arguments={"x": "bf16|f16 [..., K]", "weight": "bf16|f16 like x [K]", "eps": "a number >= 0"},
    relations=_SOME_CHANNELS,
    tolerance=Tolerance(
        reason="fp32 sums of squares in any order keep a scale within 4e-6; the cases keep every "
        "value away from the middle between two codes",
        **{"a2a3-int8": (1e-9, 4e-6)},
    ),
)
def rms_norm_int8(
    x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm`, then `int8_token_quant` of its fp32 values: nothing is rounded in between.

    x: [..., K] bf16 or fp16, K >= 1; weight: [K] alike; eps: added to the mean square. Returns q
    int8 [..., K], scale fp32 [...]. A row with NaN or infinity: scale NaN, codes 0; a row that the
    weight or x makes all zeros has no promised scale. Zero rows give empty results. No gradient.
    Source: aclnnRmsNormDynamicQuant (built-in), spec/deployments.md 1, spec/v4.md 3.1.
    """
    return quantise_int8(rms_norm.reference(x.detach().float(), weight.detach(), eps))


@operator(
    "fp8_token_quant(Tensor x) -> (Tensor q, Tensor scale)",
    rows=(7,),
    arguments=_ROWS,
    relations=_SOME_CHANNELS,
    tolerance=_EXACT,
)
def fp8_token_quant(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 codes of every row with one fp32 scale, which is no power of two: x is about q * scale.

    x: [..., K] bf16 or fp16, K >= 1. Returns q float8_e4m3fn [..., K], scale fp32 [...]. scale =
    fp32(max |x| / 448); q = fp32(x / scale) rounded to nearest even. A row of zeros: +0 and 0, and
    so where the scale is 0; a row with NaN or infinity: scale NaN, codes 0x7F. Zero rows give
    empty results. No gradient. Source: aclnnDynamicQuantV2 on A5, spec/deployments.md 1,
    spec/v4.md 10 (column VA).
    """
    return quantise_e4m3(x.detach().float())
