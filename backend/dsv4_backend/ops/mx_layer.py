"""Whole steps of a layer on Ascend A5: norm and MX rows, the heads' output projection, the experts
(spec/deployments.md 3, 4).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from dsv4_backend.contract import Tolerance, operator
from dsv4_backend.ops.formats import E4M3_MAX, block_scale, divide_blocks, round_e4m3, split_blocks
from dsv4_backend.ops.int8_moe import add_choices
from dsv4_backend.ops.moe import moe_dispatch
from dsv4_backend.ops.mx import MX_BLOCK, mx_swiglu_quant, mxfp8_gemm, mxfp8_grouped_gemm
from dsv4_backend.ops.mx_tiles import mxfp4_tiled_grouped_gemm
from dsv4_backend.ops.norm import rms_norm
from dsv4_backend.ops.quant import FP8_WEIGHT_FLOOR, act_quant
from dsv4_backend.ops.swiglu import LIMIT
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
    arguments={"x": "bf16|f16 [..., K]", "weight": "float [K]", "eps": "a number >= 0"},
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

    x: [..., K] bf16 or fp16, K >= 1; weight: [K] float; eps: added to the mean square. Returns q
    e4m3 [..., K] and scale e8m0 [..., ceil(K/32)]: the smallest power of two that no value of the
    block exceeds 448 times of. Unlike in `act_quant` no magnitude is too small for a scale of its
    own; a block of zeros has no promised scale; one with NaN or infinity has a NaN scale and codes
    0. Zero rows give empty results. No gradient. Source: aclnnRmsNormDynamicMxQuant scaleAlg 1,
    spec/deployments.md 3.
    """
    return quantise_mx(rms_norm.reference(x.detach().float(), weight, eps))


@operator(
    "mx_output_projection(Tensor o, Tensor weight, Tensor scale) -> Tensor",
    rows=(17,),
    arguments={
        "o": "bf16 [T, H, D]",
        "weight": "e4m3 [G, R, K]",
        "scale": "e8m0 [G, R, K^32]",
    },
    relations=(
        require("o", "H * D == G * K", "{H} heads of {D} channels", "{G * K} channels in all"),
        require("weight", "G >= 1 and K >= 1", "shape {sizes(weight)}", "at least one group"),
    ),
    tolerance=mxfp8_gemm.tolerance,
)
def mx_output_projection(
    o: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Each group of heads in MX-FP8 times its rows of wo_a.

    o: bf16 [T, H, D]; weight: e4m3 [G, R, K] with scale e8m0 [G, R, ceil(K/32)], K = H*D/G. The K
    channels of a group are quantised by `act_quant` with block 32. Returns bf16 [T, G*R]: fp32
    sums, cast once. Zero tokens give an empty result. Source: aclnnTransposeQuantBatchMatMul;
    spec/deployments.md 3, spec/v4.md 4.7.
    """
    groups, tokens = weight.shape[0], o.shape[0]
    rows = o.flatten(1).unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)
    offsets = torch.arange(groups + 1, dtype=torch.int32, device=o.device) * tokens
    codes = act_quant.reference(rows, MX_BLOCK)
    z = mxfp8_grouped_gemm.reference(*codes, weight, scale, offsets)
    return z.view(groups, tokens, weight.shape[1]).transpose(0, 1).flatten(1)


@operator(
    "mx_moe(Tensor x, Tensor weights, Tensor ids, Tensor w13, Tensor w13_scale, Tensor w2, "
    "Tensor w2_scale, Tensor shared_w13, Tensor shared_w13_scale, Tensor shared_w2, "
    "Tensor shared_w2_scale, float limit) -> Tensor",
    rows=(10, 19, 20),
    arguments={
        "x": "bf16 [T, d]",
        "weights": "f32 [T, k]",
        "ids": "i32 [T, k] in [0, E)",
        "w13": "i8 [E, d/32, J, 16, 16]",
        "w13_scale": "e8m0 [E, n, d/32]",
        "w2": "i8 [E, m/32, L, 16, 16]",
        "w2_scale": "e8m0 [E, d, m/32]",
        "shared_w13": "e4m3 [n, d]",
        "shared_w13_scale": "e8m0 [n, d^32]",
        "shared_w2": "e4m3 [d, m]",
        "shared_w2_scale": "e8m0 [d, m^32]",
        "limit": LIMIT,
    },
    relations=(
        require("ids", "k >= 1", "0 experts per token", "at least 1"),
        require("w13_scale", "n == 2 * m", "{n} channels", "{2 * m}, gate and up"),
        require("w13", "J * 16 == n", "{J} tiles of rows", "{n} rows in tiles of 16"),
        require("w2", "L * 16 == d", "{L} tiles of rows", "{d} rows in tiles of 16"),
        require("x", "d % 32 == 0", "{d} channels", "a multiple of 32"),
    ),
    tolerance=Tolerance(
        reason="the cases keep hidden values away from the middle between two codes; the fp32 sum "
        "of up to 7 weighted bf16 rows, whose products may have landed on the other neighbour "
        "(2^-8 of each), is cast once (2^-8)",
        **{"a5-mx": (2e-5, 2**-7)},
    ),
)
def mx_moe(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    shared_w13: torch.Tensor,
    shared_w13_scale: torch.Tensor,
    shared_w2: torch.Tensor,
    shared_w2_scale: torch.Tensor,
    limit: float,
) -> torch.Tensor:
    """`act_quant`, `moe_dispatch`, `mxfp4_tiled_grouped_gemm` and `mx_swiglu_quant` of the chosen
    experts, the same with `mxfp8_gemm` of the shared one, summed.

    x: bf16 [T, d]; weights: fp32 [T, k] and ids: int32 [T, k] in [0, E), as the gates give them;
    w13: int8 [E, d/32, 2m/16, 16, 16], tiles (`pack_mxfp4`) of the channels of w1 before those of
    w3, with scales e8m0 [E, 2m, d/32]; w2: int8 [E, m/32, d/16, 16, 16] with scales e8m0 [E, d,
    m/32]; of the shared expert e4m3 [2m, d] and [d, m] with e8m0 scales per 32 inputs; limit: > 0,
    the clamp of every SwiGLU. The routing weight multiplies what w2 gives, rounded to bf16. Returns
    bf16 [T, d]: the shared expert first, then the choices j = 0 .. k-1, added in fp32, one cast.
    Zero tokens give an empty result. No gradient. Source: aclnnMoeInitRoutingV3,
    aclnnGroupedMatmulWeightNz A8W4 MX, built-in aclnnSwigluGroupQuant, aclnnMoeFinalizeRoutingV2;
    spec/deployments.md 3, 4, spec/v4.md 5.2, 5.3.
    """
    tokens, k = ids.shape
    own = MxRows(*act_quant.reference(x, MX_BLOCK))
    codes, offsets, order = moe_dispatch.reference(own.codes, ids, w13.shape[0])
    rows = MxRows(codes, own.scale.view(torch.uint8)[order // k].view(own.scale.dtype))
    sums = mxfp4_tiled_grouped_gemm.reference(*rows, w13, w13_scale, offsets)
    inner = mx_swiglu_quant.reference(sums, limit)
    routed = mxfp4_tiled_grouped_gemm.reference(*inner, w2, w2_scale, offsets)
    own_sums = mxfp8_gemm.reference(*own, shared_w13, shared_w13_scale)
    own_inner = mx_swiglu_quant.reference(own_sums, limit)
    shared = mxfp8_gemm.reference(*own_inner, shared_w2, shared_w2_scale)
    choices = routed[order.argsort()].unflatten(0, (tokens, k))
    return add_choices(shared, choices, weights).to(x.dtype)
