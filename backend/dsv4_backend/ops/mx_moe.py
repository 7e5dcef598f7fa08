"""Routed experts and the shared expert in one step, in MX formats (spec/deployments.md 3, 4)."""

from __future__ import annotations

import torch

from dsv4_backend.contract import Tolerance, operator
from dsv4_backend.ops.int8_moe import add_choices
from dsv4_backend.ops.moe import moe_dispatch
from dsv4_backend.ops.mx import MX_BLOCK, mx_swiglu_quant, mxfp8_gemm
from dsv4_backend.ops.mx_norm import MxRows
from dsv4_backend.ops.mx_tiles import mxfp4_tiled_grouped_gemm
from dsv4_backend.ops.quant import act_quant
from dsv4_backend.ops.swiglu import LIMIT
from dsv4_backend.relations import require


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
