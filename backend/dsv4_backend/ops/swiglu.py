"""Clamped SwiGLU, plain and quantised: the input of an expert's w2 (spec/v4.md 5.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dsv4_backend.contract import Tolerance, compute, operator
from dsv4_backend.ops.quant import act_quant
from dsv4_backend.relations import Relation, require

BLOCK = 128
"""Channels per FP8 scale of a GEMM input (spec 6.1)."""
LIMIT = "a number > 0 that fp32 holds, or infinity"
"""Specification line of every clamp."""


def gate_and_up(argument: str) -> Relation:
    """Channels [.., n] of w1, then as many of w3."""
    return require(argument, "n >= 2 and n % 2 == 0", "{n} channels", "an even number, gate and up")


def clamped_swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    """`silu(min(gate, limit)) * clamp(up, -limit, limit)` in fp32 (fp64 for fp64)."""
    g, u = compute(gate), compute(up)
    return F.silu(g.clamp(max=limit)) * u.clamp(-limit, limit)


@operator(
    "swiglu(Tensor gate, Tensor up, Tensor? weights, float limit) -> Tensor",
    rows=(19,),
    arguments={
        "gate": "float [M, m]",
        "up": "float like gate [M, m]",
        "weights": "f32 [M]",
        "limit": LIMIT,
    },
    tolerance=Tolerance(
        reason="fp32 exp and division in any order stay within 4e-6 relative, and exp(-x) may "
        "overflow to a result of 0; the official cases keep 2^-18 away from ties of the one "
        "rounding to bf16, so every bit is decided",
        ideal=(1e-20, 4e-6),
    ),
)
def swiglu(
    gate: torch.Tensor, up: torch.Tensor, weights: torch.Tensor | None, limit: float
) -> torch.Tensor:
    """`weights * silu(min(gate, limit)) * clamp(up, -limit, limit)`: the input of w2.

    gate, up: [M, m] float, same dtype (w1 x and w3 x); weights: [M] fp32, the routing weight of
    each row, or None for the shared expert; limit: > 0, 10 in V4, infinity for no clamp. The
    gate has no lower clamp. Returns [M, m] in gate's dtype: fp32 inside, the weight multiplied
    in before the one cast. NaN stays NaN. Zero rows give an empty result. Source: spec/v4.md
    5.2 [OFF-M Expert].
    """
    h = clamped_swiglu(gate, up, limit)
    return (h if weights is None else weights.to(h.dtype).unsqueeze(-1) * h).to(gate.dtype)


@operator(
    "swiglu_quant(Tensor gate, Tensor up, Tensor? weights, float limit) -> "
    "(Tensor q, Tensor scale)",
    rows=(19,),
    arguments={
        "gate": "bf16 [M, m]",
        "up": "bf16 [M, m]",
        "weights": "f32 [M]",
        "limit": LIMIT,
    },
    tolerance=Tolerance(
        reason="the cases keep the product 2^-18 away from ties of its rounding to bf16; "
        "quantisation decides every bit"
    ),
)
def swiglu_quant(
    gate: torch.Tensor, up: torch.Tensor, weights: torch.Tensor | None, limit: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`act_quant(swiglu(gate, up, weights, limit), 128)`: the quantised input of w2.

    gate, up: [M, m] bf16; weights: [M] fp32 or None; limit: > 0, as in `swiglu`. Returns q e4m3
    [M, m] and scale e8m0 [M, ceil(m/128)]. The product is rounded to bf16 before its largest
    magnitude is taken, as official inference does; quantising straight from fp32 (MegaMoE) is
    another operator. Zero rows give an empty result. Source: spec/v4.md 5.2, 6.1.
    """
    q, scale = act_quant.reference(swiglu.reference(gate, up, weights, limit), BLOCK)
    return q, scale
