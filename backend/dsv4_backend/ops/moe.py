"""Clamped SwiGLU, expert dispatch and combination (spec/v4.md 5.2, 5.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dsv4_backend.contract import Tolerance, compute, operator
from dsv4_backend.ops import quant

BLOCK = 128
"""Channels per FP8 scale of a GEMM input (spec 6.1)."""


def clamped_swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    """`silu(min(gate, limit)) * clamp(up, -limit, limit)` in fp32 (fp64 for fp64)."""
    g, u = compute(gate), compute(up)
    return F.silu(g.clamp(max=limit)) * u.clamp(-limit, limit)


@operator(
    "swiglu(Tensor gate, Tensor up, Tensor? weights, float limit) -> Tensor",
    rows=(19,),
    arguments={"gate": "float [M, m]", "up": "float [M, m]", "weights": "f32 [M]"},
    tolerance=Tolerance(reason="", ideal=(1e-7, 4e-6)),
)
def swiglu(gate: torch.Tensor, up: torch.Tensor, weights: torch.Tensor | None, limit: float) -> torch.Tensor:
    """`weights * silu(min(gate, limit)) * clamp(up, -limit, limit)`: the input of w2.

    gate, up: [M, m] float, same dtype (w1 x and w3 x); weights: [M] fp32, the routing weight of each row, or None for
    the shared expert; limit: > 0, 10 in V4, infinity for no clamp. The gate has no lower clamp.
    Returns [M, m] in gate's dtype: fp32 inside, the weight multiplied in before the one cast. NaN stays NaN.
    Zero rows give an empty result. Source: spec/v4.md 5.2 [OFF-M Expert].
    """
    h = clamped_swiglu(gate, up, limit)
    return (h if weights is None else weights.to(h.dtype).unsqueeze(-1) * h).to(gate.dtype)


@operator(
    "swiglu_quant(Tensor gate, Tensor up, Tensor? weights, float limit) -> (Tensor q, Tensor scale)",
    rows=(19,),
    arguments={"gate": "bf16 [M, m]", "up": "bf16 [M, m]", "weights": "f32 [M]"},
    tolerance=Tolerance(reason=""),
)
def swiglu_quant(
    gate: torch.Tensor, up: torch.Tensor, weights: torch.Tensor | None, limit: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`act_quant(swiglu(gate, up, weights, limit), 128)`: the quantised input of w2.

    gate, up: [M, m] bf16; weights: [M] fp32 or None; limit: > 0, as in `swiglu`.
    Returns q e4m3 [M, m] and scale e8m0 [M, ceil(m/128)]. The product is rounded to bf16 before its largest magnitude
    is taken, as official inference does; quantising straight from fp32 (MegaMoE) is another operator.
    Zero rows give an empty result. Source: spec/v4.md 5.2, 6.1.
    """
    q, scale = quant.act_quant.reference(swiglu.reference(gate, up, weights, limit), BLOCK)
    return q, scale


@operator(
    "moe_dispatch(Tensor x, Tensor ids, int num_experts) -> (Tensor rows, Tensor expert_offsets, Tensor order)",
    rows=(20,),
    arguments={"x": "float|e4m3|e8m0 [...]", "ids": "int [T, k]"},
    tolerance=Tolerance(reason="copies and integers: bit equality"),
)
def moe_dispatch(
    x: torch.Tensor, ids: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each token's row once per chosen expert, sorted by expert; rows of one expert in the order of (token, j).

    x: [T, ...] of any float, e4m3 or e8m0 dtype (activations or their scales); ids: [T, k] int in [0, num_experts).
    Returns rows [T*k, ...] in x's dtype; expert_offsets int32 [E+1] (rows of expert e are offsets[e] .. offsets[e+1]-1);
    order int32 [T*k], the flat index t*k+j of each row, which `moe_combine` undoes. Experts nobody chose get no rows.
    Zero tokens give zero rows and all offsets 0. Gradients reach x. Source: spec/v4.md 5.3.
    """
    flat = ids.flatten()
    sorted_ids, order = flat.sort(stable=True)
    experts = torch.arange(num_experts + 1, device=flat.device, dtype=flat.dtype)
    return x[order // ids.shape[1]], torch.searchsorted(sorted_ids, experts).int(), order.int()


@operator(
    "moe_combine(Tensor y, Tensor order, int k) -> Tensor",
    rows=(20,),
    arguments={"y": "float [M, d]", "order": "int [M] in [0, M)"},
    tolerance=Tolerance(reason="", ideal=(1e-6, 1e-6)),
)
def moe_combine(y: torch.Tensor, order: torch.Tensor, k: int) -> torch.Tensor:
    """Sum over each token's k expert outputs: row i belongs to token `order[i] // k`, choice `order[i] % k`.

    y: [M, d] float, M = T*k rows in dispatch order; order: [M] int, the permutation from `moe_dispatch`; k >= 1.
    Returns fp32 [T, d], added in the order j = 0 .. k-1 in fp32 whatever expert came first, so that the bits do not
    depend on the other tokens of the batch. Zero rows give an empty result. Source: spec/v4.md 5.3 [OFF-M MoE].
    """
    choices = compute(y[order.argsort()]).unflatten(0, (-1, k)).unbind(1)
    total = choices[0]
    for choice in choices[1:]:
        total = total + choice
    return total.clone()


@swiglu.shapes
def _(gate: torch.Tensor, up: torch.Tensor, weights: torch.Tensor | None, limit: float) -> None:
    if not limit > 0:
        raise swiglu.reject("limit", limit, "a number > 0")
    if up.dtype != gate.dtype:
        raise swiglu.reject("up", str(up.dtype), f"{gate.dtype} like gate")


@swiglu_quant.shapes
def _(gate: torch.Tensor, up: torch.Tensor, weights: torch.Tensor | None, limit: float) -> None:
    if not limit > 0:
        raise swiglu_quant.reject("limit", limit, "a number > 0")


@moe_dispatch.shapes
def _(x: torch.Tensor, ids: torch.Tensor, num_experts: int) -> None:
    if num_experts < 1:
        raise moe_dispatch.reject("num_experts", num_experts, "at least 1")
    if ids.shape[1] < 1:
        raise moe_dispatch.reject("ids", f"shape {tuple(ids.shape)}", "at least 1 expert per token")
    if x.dim() < 1 or x.shape[0] != ids.shape[0]:
        raise moe_dispatch.reject("x", f"shape {tuple(x.shape)}", f"[T, ...] with T = {ids.shape[0]} as in ids")


@moe_dispatch.contents
def _(x: torch.Tensor, ids: torch.Tensor, num_experts: int) -> None:
    bad = ((ids < 0) | (ids >= num_experts)).nonzero()
    if len(bad):
        where = bad[0].tolist()
        raise moe_dispatch.reject("ids", f"{ids[tuple(where)].item()} at {where}", f"values in [0, {num_experts})")


@moe_combine.shapes
def _(y: torch.Tensor, order: torch.Tensor, k: int) -> None:
    if k < 1:
        raise moe_combine.reject("k", k, "at least 1")
    if y.shape[0] % k != 0:
        raise moe_combine.reject("y", f"{y.shape[0]} rows", f"a multiple of k = {k}")


@moe_combine.contents
def _(y: torch.Tensor, order: torch.Tensor, k: int) -> None:
    repeated = (order.long().bincount(minlength=y.shape[0]) > 1).nonzero()
    if len(repeated):
        raise moe_combine.reject(
            "order", f"{repeated[0].item()} more than once", f"a permutation of 0..{len(order) - 1}"
        )
