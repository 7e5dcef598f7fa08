"""Routed experts and the shared expert in one step, in bf16 (spec/deployments.md 4)."""

from __future__ import annotations

import torch

from dsv4_backend.contract import Tolerance, operator
from dsv4_backend.ops.gemm import grouped_gemm
from dsv4_backend.ops.int8_moe import add_choices
from dsv4_backend.ops.moe import CHOSEN, moe_dispatch
from dsv4_backend.ops.swiglu import LIMIT, gate_and_up, swiglu
from dsv4_backend.relations import require


def expert_rows(
    rows: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    expert_offsets: torch.Tensor,
    limit: float,
) -> torch.Tensor:
    """w2 [E, d, m] times SwiGLU of w13 [E, 2m, d] times rows [M, d] sorted by expert: bf16."""
    gate, up = grouped_gemm.reference(rows, w13, expert_offsets).chunk(2, -1)
    hidden = swiglu.reference(gate, up, None, limit)
    return grouped_gemm.reference(hidden, w2, expert_offsets)


@operator(
    "bf16_moe(Tensor x, Tensor weights, Tensor ids, Tensor w13, Tensor w2, Tensor shared_w13, "
    "Tensor shared_w2, float limit) -> Tensor",
    rows=(10, 19, 20),
    arguments={
        "x": "bf16 [T, d]",
        "weights": "f32 [T, k]",
        "ids": "i32 [T, k] in [0, E)",
        "w13": "bf16 [E, n, d]",
        "w2": "bf16 [E, d, n/2]",
        "shared_w13": "bf16 [n, d]",
        "shared_w2": "bf16 [d, n/2]",
        "limit": LIMIT,
    },
    relations=(
        CHOSEN,
        require("x", "d >= 1", "shape {sizes(x)}", "at least one channel"),
        gate_and_up("w13"),
    ),
    tolerance=Tolerance(
        reason="the cases have exact products of w1 and w3 and keep hidden values and products of "
        "w2 away from the middle between two bf16 values, so each is decided; the fp32 sum of up "
        "to 7 weighted rows in any order is cast once, to one of two neighbours (2^-8)",
        bf16=(2e-6, 2**-8),
    ),
)
def bf16_moe(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    shared_w13: torch.Tensor,
    shared_w2: torch.Tensor,
    limit: float,
) -> torch.Tensor:
    """`moe_dispatch`, `grouped_gemm`, `swiglu` and `grouped_gemm` of the chosen experts and of the
    shared one, summed.

    x: bf16 [T, d]; weights: fp32 [T, k] and ids: int32 [T, k] in [0, E), as the gates give them;
    w13: bf16 [E, 2m, d], the channels of w1 before those of w3; w2: bf16 [E, d, m]; the same
    without E for the shared expert; limit: > 0, the clamp of every SwiGLU. Both products and the
    SwiGLU sum in fp32 and round once to bf16; the routing weight multiplies what w2 gives. Returns
    bf16 [T, d]: the shared expert first, then the choices j = 0 .. k-1, added in fp32, one cast.
    Zero tokens give an empty result. No gradient of x. Source: aclnnMoeInitRoutingV3,
    aclnnGroupedMatmulV5, aclnnClippedSwiglu, aclnnMoeFinalizeRoutingV2; spec/deployments.md 4,
    spec/v4.md 5.2, 5.3.
    """
    tokens, k = ids.shape
    rows, offsets, order = moe_dispatch.reference(x.detach(), ids, w13.shape[0])
    routed = expert_rows(rows, w13, w2, offsets, limit)
    everything = torch.tensor([0, tokens], dtype=torch.int32, device=x.device)
    only = shared_w13.unsqueeze(0), shared_w2.unsqueeze(0)
    shared = expert_rows(x.detach(), *only, everything, limit)
    choices = routed[order.argsort()].unflatten(0, (tokens, k))
    return add_choices(shared, choices, weights).to(x.dtype)
