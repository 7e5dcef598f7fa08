"""Routed experts and the shared expert in one step, W8A8 (spec/deployments.md 2, 4)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dsv4_backend.contract import DEPLOYMENTS, Tolerance, operator
from dsv4_backend.ops.int8 import int8_gemm, int8_grouped_gemm, int8_grouped_sum, int8_swiglu_quant
from dsv4_backend.ops.moe import CHOSEN, moe_dispatch
from dsv4_backend.ops.swiglu import LIMIT, gate_and_up
from dsv4_backend.ops.token_quant import int8_token_quant
from dsv4_backend.relations import require


class Int8Rows(NamedTuple):
    """int8 codes [M, K] with one fp32 scale per row [M]."""

    codes: torch.Tensor
    scale: torch.Tensor


def hidden(rows: Int8Rows, w13: Int8Rows, expert_offsets: torch.Tensor, limit: float) -> Int8Rows:
    """The input of w2: w13 [E, 2m, d] times rows sorted by expert, then SwiGLU, in int8 again."""
    sums = int8_grouped_sum.reference(rows.codes, w13.codes, expert_offsets)
    return Int8Rows(
        *int8_swiglu_quant.reference(sums, w13.scale, rows.scale, expert_offsets, limit)
    )


def add_choices(shared: torch.Tensor, choices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """fp32 [T, d]: the shared expert, then each choice [T, k, d] times its weight [T, k]."""
    total = shared.float()
    for j in range(choices.shape[1]):
        total = total + choices[:, j].float() * weights[:, j : j + 1]
    return total


@operator(
    "int8_moe(Tensor x, Tensor weights, Tensor ids, Tensor w13, Tensor w13_scale, Tensor w2, "
    "Tensor w2_scale, Tensor shared_w13, Tensor shared_w13_scale, Tensor shared_w2, "
    "Tensor shared_w2_scale, float limit) -> Tensor",
    rows=(10, 19, 20),
    arguments={
        "x": "bf16 [T, d]",
        "weights": "f32 [T, k]",
        "ids": "i32 [T, k] in [0, E)",
        "w13": "i8 [E, n, d]",
        "w13_scale": "f32 [E, n]",
        "w2": "i8 [E, d, n/2]",
        "w2_scale": "bf16 [E, d]",
        "shared_w13": "i8 [n, d]",
        "shared_w13_scale": "f32 [n]",
        "shared_w2": "i8 [d, n/2]",
        "shared_w2_scale": "f32 [d]",
        "limit": LIMIT,
    },
    relations=(
        CHOSEN,
        require("x", "d >= 1", "shape {sizes(x)}", "at least one channel"),
        gate_and_up("w13"),
    ),
    tolerance=Tolerance(
        reason="the cases keep every hidden value 2^-12 of a step away from the ties of its code, "
        "so all codes are decided; then scales that are off by 4e-6 relative and a sum of k + 1 "
        "terms in any order, whose one cast to bf16 may land on the other neighbour (2^-7)",
        **dict.fromkeys(DEPLOYMENTS, (2e-5, 2**-7)),
    ),
)
def int8_moe(
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
    """`int8_token_quant`, `moe_dispatch`, `int8_grouped_sum`, `int8_swiglu_quant` and
    `int8_grouped_gemm` of the chosen experts and of the shared one, summed.

    x: bf16 [T, d]; weights: fp32 [T, k] and ids: int32 [T, k] in [0, E), as the gates give them;
    w13: int8 [E, 2m, d], the channels of w1 before those of w3, with fp32 scales [E, 2m]; w2: int8
    [E, d, m] with bf16 scales [E, d]; the same without E, and with fp32 scales, for the shared
    expert; limit: > 0, the clamp of every SwiGLU. The routing weight multiplies what w2 gives,
    rounded to bf16. Returns bf16 [T, d]: the shared expert first, then the choices j = 0 .. k-1,
    added in fp32, one cast. Zero tokens give an empty result. No gradient of x. Source:
    aclnnMoeInitRoutingV3, aclnnDequantSwigluQuantV2 mode 2, aclnnMoeFinalizeRoutingV2;
    spec/deployments.md 2, 4, spec/v4.md 5.2, 5.3.
    """
    tokens, k = ids.shape
    own = Int8Rows(*int8_token_quant.reference(x))
    codes, offsets, order = moe_dispatch.reference(own.codes, ids, w13.shape[0])
    rows = Int8Rows(codes, own.scale[order // k])
    inner = hidden(rows, Int8Rows(w13, w13_scale), offsets, limit)
    routed = int8_grouped_gemm.reference(*inner, w2, w2_scale.float(), offsets)
    everything = torch.tensor([0, tokens], dtype=torch.int32, device=x.device)
    only = Int8Rows(shared_w13.unsqueeze(0), shared_w13_scale.unsqueeze(0))
    shared = int8_gemm.reference(*hidden(own, only, everything, limit), shared_w2, shared_w2_scale)
    choices = routed[order.argsort()].unflatten(0, (tokens, k))
    return add_choices(shared, choices, weights).to(x.dtype)
