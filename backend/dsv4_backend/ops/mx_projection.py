"""The heads' output projection in MX formats on Ascend A5 (spec/deployments.md 3)."""

from __future__ import annotations

import torch

from dsv4_backend.contract import operator
from dsv4_backend.ops.mx import MX_BLOCK, mxfp8_gemm, mxfp8_grouped_gemm
from dsv4_backend.ops.quant import act_quant
from dsv4_backend.relations import require


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
