"""MX products of Ascend A5: e4m3 rows with one scale per 32 channels (spec/deployments.md 3, 4).

The rows come from `act_quant` with block 32: that is aclnnDynamicMxQuantV3 with scaleAlg 1
(exponent rounded up) and maxLowBound 1e-4.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dsv4_backend.contract import DEPLOYMENTS, Tolerance, operator
from dsv4_backend.experts import by_expert
from dsv4_backend.ops.formats import (
    E4M3_MAX,
    block_scale,
    divide_blocks,
    e4m3_values,
    round_e4m3,
    scale_values,
    split_blocks,
)
from dsv4_backend.ops.quant import FP8_WEIGHT_FLOOR, act_quant, dequantize_fp4
from dsv4_backend.ops.swiglu import LIMIT, clamped_swiglu, gate_and_up
from dsv4_backend.relations import covered, require

MX_BLOCK = 32
_TOLERANCE = Tolerance(
    reason="fp32 sums of up to 1024 products, sums and terms up to size 8, in any order stay "
    "within 5e-6; the one cast to bf16 may then land on the other neighbour (2^-8)",
    **dict.fromkeys(DEPLOYMENTS, (5e-6, 2**-7)),
)
_ROWS = {"x": "e4m3 [T, K]", "x_scale": "e8m0 [T, K^32]"}
_FP8_WEIGHT = {"weight": "e4m3 [E, N, K]", "weight_scale": "e8m0 [E, N, K^32]"}
_FP4_WEIGHT = {"weight": "i8 [E, N, K/2]", "weight_scale": "e8m0 [E, N, K/32]"}
Values = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def dequantize_mx(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(float8_e4m3fn [..., K], float8_e8m0fnu [..., ceil(K/32)]) -> fp32 [..., K], exact."""
    return (
        e4m3_values(codes)
        * scale_values(scale).repeat_interleave(MX_BLOCK, -1)[..., : codes.shape[-1]]
    )


@operator(
    "mxfp8_gemm(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale) -> Tensor",
    rows=(9,),
    arguments={**_ROWS, "weight": "e4m3 [N, K]", "weight_scale": "e8m0 [N, K^32]"},
    tolerance=_TOLERANCE,
)
def mxfp8_gemm(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor:
    """`x W^T` of two MX-FP8 matrices.

    x: float8_e4m3fn [T, K] with x_scale float8_e8m0fnu [T, ceil(K/32)] (`act_quant` with block
    32); weight: float8_e4m3fn [N, K] with weight_scale float8_e8m0fnu [N, ceil(K/32)]. Returns
    bf16 [T, N] out of fp32 sums, cast once. Zero tokens give [0, N]. Source: aclnnQuantMatmulV5,
    groupSize [1,1,32]; spec/deployments.md 3, spec/v4.md 6.3.
    """
    return (dequantize_mx(x, x_scale) @ dequantize_mx(weight, weight_scale).T).bfloat16()


def grouped(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    expert_offsets: torch.Tensor,
    values: Values,
) -> torch.Tensor:
    """bf16 [T, N]: rows times the transposed values(weight[e], weight_scale[e])
    of their expert e.
    """
    rows = dequantize_mx(x, x_scale)

    def product(e: int, part: slice) -> torch.Tensor:
        return rows[part] @ values(weight[e], weight_scale[e]).T

    return by_expert(expert_offsets, rows, product).bfloat16()


@operator(
    "mxfp8_grouped_gemm(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, "
    "Tensor expert_offsets) -> Tensor",
    rows=(10, 17),
    arguments={**_ROWS, **_FP8_WEIGHT, "expert_offsets": "i32 [E+1]"},
    relations=covered("weight", "T"),
    tolerance=_TOLERANCE,
)
def mxfp8_grouped_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    expert_offsets: torch.Tensor,
) -> torch.Tensor:
    """`mxfp8_gemm` of every row with the weight of its expert,
    or with that of its group of heads (wo_a).

    x, x_scale: as for `mxfp8_gemm`, rows sorted by expert; weight: float8_e4m3fn [E, N, K] with
    weight_scale float8_e8m0fnu [E, N, ceil(K/32)]; expert_offsets: int32 [E+1], from 0 to T, never
    falling. Returns bf16 [T, N]. Source: aclnnGroupedMatmul, aclnnTransposeQuantBatchMatMul;
    spec/deployments.md 3, spec/v4.md 4.7, 5.2.
    """
    return grouped(x, x_scale, weight, weight_scale, expert_offsets, dequantize_mx)


@operator(
    "mxfp4_grouped_gemm(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, "
    "Tensor expert_offsets) -> Tensor",
    rows=(10,),
    arguments={**_ROWS, **_FP4_WEIGHT, "expert_offsets": "i32 [E+1]"},
    relations=(
        *covered("weight", "T"),
        require(
            "x",
            f"K % {MX_BLOCK} == 0",
            "{K} channels",
            f"a multiple of {MX_BLOCK}, one weight scale per {MX_BLOCK}",
        ),
    ),
    tolerance=_TOLERANCE,
)
def mxfp4_grouped_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    expert_offsets: torch.Tensor,
) -> torch.Tensor:
    """`x W^T` of every MX-FP8 row with the MX-FP4 weight of its expert.

    x, x_scale, expert_offsets: as for `mxfp8_grouped_gemm`, K a multiple of 32; weight: int8 [E,
    N, K/2], e2m1 codes, low nibble = even k; weight_scale: float8_e8m0fnu [E, N, K/32]. Returns
    bf16 [T, N]. Source: aclnnGroupedMatmulWeightNz A8W4 MX; spec/deployments.md 3,
    spec/v4.md 5.2, 6.3.
    """
    return grouped(x, x_scale, weight, weight_scale, expert_offsets, dequantize_fp4)


@operator(
    "mx_swiglu_quant(Tensor x, float limit) -> (Tensor q, Tensor scale)",
    rows=(19,),
    arguments={"x": "bf16 [M, n]", "limit": LIMIT},
    relations=(gate_and_up("x"),),
    tolerance=Tolerance(
        reason="the cases keep every product 2^-18 of itself away from the ties of its code and "
        "from the borders of its block's scale, so every bit is decided"
    ),
)
def mx_swiglu_quant(x: torch.Tensor, limit: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`silu(min(g, limit)) * clamp(u, -limit, limit)` as MX-FP8,
    quantised straight from fp32: the input of w2.

    x: bf16 [M, 2m], the m channels of w1 x (g), then those of w3 x (u); limit: > 0, as in
    `swiglu`. Returns q e4m3 [M, m] and scale e8m0 [M, ceil(m/32)], by the rule of `act_quant` with
    block 32 on the fp32 product: no rounding to bf16 before it, and no routing weight. Zero rows
    give empty results. Source: built-in aclnnSwigluGroupQuant quantMode 1;
    spec/deployments.md 4, spec/v4.md 5.2, 6.1.
    """
    gate, up = x.chunk(2, -1)
    q, scale = act_quant.reference(clamped_swiglu(gate, up, limit), MX_BLOCK)
    return q, scale


def quantize_weight_mxfp8(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float [..., N, K] -> (float8_e4m3fn [..., N, K], float8_e8m0fnu [..., N, ceil(K/32)]),
    one scale per 32 inputs.

    The exponent is rounded up, so that no value saturates: scaleAlg 1. Source:
    spec/deployments.md 3, 5.
    """
    blocks = split_blocks(w, MX_BLOCK)
    scale = block_scale(blocks, E4M3_MAX, FP8_WEIGHT_FLOOR)
    codes = round_e4m3(divide_blocks(blocks, scale)).flatten(-2)[..., : w.shape[-1]]
    return codes.contiguous(), scale.view(torch.float8_e8m0fnu)
