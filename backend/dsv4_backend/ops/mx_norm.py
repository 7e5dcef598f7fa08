"""RMS normalisation to MX rows on Ascend A5 (spec/deployments.md 3)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dsv4_backend.contract import Tolerance, operator
from dsv4_backend.ops.formats import E4M3_MAX, block_scale, divide_blocks, round_e4m3, split_blocks
from dsv4_backend.ops.mx import MX_BLOCK
from dsv4_backend.ops.norm import rms_norm
from dsv4_backend.ops.quant import FP8_WEIGHT_FLOOR
from dsv4_backend.relations import require


class MxRows(NamedTuple):
    """e4m3 codes [M, K] with e8m0 scales [M, ceil(K/32)]."""

    codes: torch.Tensor
    scale: torch.Tensor


NAN_SCALE = 255


def quantise_mx(rows: torch.Tensor) -> MxRows:
    """fp32 rows [.., K], scales rounded up, without the floor that `act_quant` has."""
    blocks = split_blocks(rows, MX_BLOCK)
    scale = block_scale(blocks, E4M3_MAX, FP8_WEIGHT_FLOOR)
    unknown = (scale == NAN_SCALE).unsqueeze(-1)
    ratios = divide_blocks(blocks, scale).masked_fill(unknown, 0.0)
    codes = round_e4m3(ratios).flatten(-2)[..., : rows.shape[-1]]
    return MxRows(codes.contiguous(), scale.view(torch.float8_e8m0fnu))


@operator(
    "rms_norm_mx(Tensor x, Tensor weight, float eps) -> (Tensor q, Tensor scale)",
    rows=(5, 7),
    arguments={"x": "bf16|f16 [..., K]", "weight": "bf16|f16 like x [K]", "eps": "a number >= 0"},
    relations=(require("x", "K >= 1", "0 channels", "at least 1"),),
    tolerance=Tolerance(
        reason="the cases keep every value 2^-18 of itself away from the ties of its code and from "
        "the borders of its block's scale, so every bit is decided"
    ),
)
def rms_norm_mx(
    x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm`, then MX-FP8 codes of its fp32 values: nothing is rounded in between.

    x: [..., K] bf16 or fp16, K >= 1; weight: [K] alike; eps: added to the mean square. Returns q
    e4m3 [..., K] and scale e8m0 [..., ceil(K/32)]: the smallest power of two that no value of the
    block exceeds 448 times of. Unlike in `act_quant` no magnitude is too small for a scale of its
    own; a block of zeros has no promised scale; one with NaN or infinity has a NaN scale and codes
    0. Zero rows give empty results. No gradient. Source: aclnnRmsNormDynamicMxQuant scaleAlg 1,
    spec/deployments.md 3, spec/v4.md 3.1.
    """
    return quantise_mx(rms_norm.reference(x.detach().float(), weight.detach(), eps))
