"""Proof of the clamped SwiGLU (spec/v4.md 5.2): cases, oracles, named faults."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from dsv4_backend.contract import Case, Draw, compute
from dsv4_backend.ops.formats import block_scale
from dsv4_backend.ops.quant import act_quant
from dsv4_backend.ops.swiglu import clamped_swiglu, swiglu, swiglu_quant
from dsv4_backend.proofs.numerics import BF16, E8M0, Array, cast, quantise_fp8, wide
from dsv4_backend.proofs.quant import ACT_QUANT_EQUIVALENTS


def _golden_product(gate: Array, up: Array, weights: Array | None, limit: float) -> Array:
    """float64 [M, m]: `weights * silu(gate) * up`, gate clamped above, up both ways (spec 5.2)."""
    g, u = np.minimum(wide(gate), limit), np.clip(wide(up), -limit, limit)
    h: Array = g / (1 + np.exp(-g)) * u
    return h if weights is None else wide(weights[:, None]) * h


@swiglu.oracle
def _(gate: Array, up: Array, weights: Array | None, limit: float) -> Array:
    return cast(gate.dtype, _golden_product(gate, up, weights, limit))


@swiglu_quant.oracle
def _(gate: Array, up: Array, weights: Array | None, limit: float) -> tuple[Array, Array]:
    codes, scales = quantise_fp8(cast(BF16, _golden_product(gate, up, weights, limit)), 128)
    return codes, cast(E8M0, scales)


_SHAPES = ((0, 64), (1, 1), (3, 7), (5, 2048), (19, 130))
"""(rows, m)."""
_TIE_MARGIN = 2.0**-18


def _gate_up(
    draw: Draw, rows: int, m: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up whose scale differs from row to row: some rows beyond the clamp,
    some far below.
    """
    scale = torch.tensor([1.0, 8.0, 0.05, 30.0]).repeat(rows)[:rows].unsqueeze(1)
    return (draw.normal(rows, m) * scale).to(dtype), (draw.normal(rows, m) * scale).to(dtype)


def _decided(
    gate: torch.Tensor, up: torch.Tensor, weights: torch.Tensor | None, limit: float
) -> tuple[object, ...]:
    """Arguments with both factors zeroed where bf16 rounding
    of the product hangs on the last bits of fp32.
    """
    weight = None if weights is None else weights.numpy()
    with np.errstate(all="ignore"):
        exact = _golden_product(gate.double().numpy(), up.double().numpy(), weight, limit)
    low, high = (cast(BF16, exact * (1 + margin)) for margin in (-_TIE_MARGIN, _TIE_MARGIN))
    open_ = torch.from_numpy(np.isfinite(exact) & ((low != high) | (np.abs(exact) < 2.0**-100)))
    return gate.masked_fill(open_, 0), up.masked_fill(open_, 0), weights, limit


def _swiglu_cases(draw: Draw, profile: str, dtype: torch.dtype) -> Iterator[Case]:
    decided = _decided if profile == "official" else (lambda *arguments: arguments)
    for rows, m in _SHAPES:
        gate, up = _gate_up(draw, rows, m, dtype)
        weights = draw.uniform(rows, high=2.5)
        yield Case(f"{rows}x{m}, weights", profile, decided(gate, up, weights, 10.0))
        yield Case(f"{rows}x{m}, limit 0.5", profile, decided(gate, up, None, 0.5))
    gate, up = (t[::2] for t in _gate_up(draw, 14, 384, dtype))
    yield Case("strided, no limit", profile, decided(gate, up, draw.uniform(7), math.inf))
    gate, up = _gate_up(draw, 4, 256, dtype)
    gate[0, 0], up[1, 1], gate[2, 2], up[3, 3], gate[3] = (
        math.nan,
        math.nan,
        math.inf,
        -math.inf,
        0.0,
    )
    yield Case(
        "NaN, infinity, zero row",
        profile,
        decided(gate, up, torch.tensor([1.0, 0.5, 2.0, 0.0]), 10.0),
    )


def _fine_limit(draw: Draw, profile: str, dtype: torch.dtype) -> Case:
    """A limit that bf16 does not hold: clamped values are fp32."""
    decided = _decided if profile == "official" else (lambda *arguments: arguments)
    gate, up = _gate_up(draw, 4, 256, dtype)
    return Case("limit 0.3017", profile, decided(gate, up, draw.uniform(4, low=0.5), 0.3017))


@swiglu.cases
def _(draw: Draw) -> Iterator[Case]:
    yield from _swiglu_cases(draw, "ideal", torch.float32)
    yield from _swiglu_cases(draw, "official", torch.bfloat16)
    for profile, dtype in (("ideal", torch.float32), ("official", torch.bfloat16)):
        yield _fine_limit(draw, profile, dtype)


@swiglu_quant.cases
def _(draw: Draw) -> Iterator[Case]:
    yield from _swiglu_cases(draw, "official", torch.bfloat16)
    yield _fine_limit(draw, "official", torch.bfloat16)
    nothing = torch.empty(3, 0, dtype=torch.bfloat16)
    yield Case("3x0", "official", (nothing, nothing.clone(), None, 10.0))


def _wide(
    product: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor],
) -> Callable[..., torch.Tensor]:
    return lambda gate, up, limit: product(compute(gate), compute(up), limit)


WRONG_PRODUCTS = {
    "gate clamped below too": _wide(
        lambda g, u, limit: F.silu(g.clamp(-limit, limit)) * u.clamp(-limit, limit)
    ),
    "up clamped above only": _wide(
        lambda g, u, limit: F.silu(g.clamp(max=limit)) * u.clamp(max=limit)
    ),
    "gate not clamped": _wide(lambda g, u, limit: F.silu(g) * u.clamp(-limit, limit)),
    "clamp after silu": _wide(
        lambda g, u, limit: F.silu(g).clamp(max=limit) * u.clamp(-limit, limit)
    ),
    "product clamped": _wide(lambda g, u, limit: (F.silu(g) * u).clamp(-limit, limit)),
    "GELU instead of SiLU": _wide(
        lambda g, u, limit: F.gelu(g.clamp(max=limit)) * u.clamp(-limit, limit)
    ),
    "up + 1": _wide(lambda g, u, limit: F.silu(g.clamp(max=limit)) * (u.clamp(-limit, limit) + 1)),
}


def _even_and_odd(gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    joined = torch.cat([gate, up], -1)
    return clamped_swiglu(joined[:, 0::2], joined[:, 1::2], limit)


WRONG_HALVES = WRONG_PRODUCTS | {
    "gate and up swapped": lambda g, u, limit: clamped_swiglu(u, g, limit),
    "no clamp": lambda g, u, limit: clamped_swiglu(g, u, math.inf),
    "even and odd channels": _even_and_odd,
    "rounded to bf16 before quantisation": lambda g, u, limit: (
        clamped_swiglu(g, u, limit).bfloat16().float()
    ),
}
"""Wrong products of operators that take gate and up as halves of one tensor,
and quantise straight from fp32.
"""


def _rounded_before_weight(
    gate: torch.Tensor, up: torch.Tensor, weights: torch.Tensor | None, limit: float
) -> torch.Tensor:
    h = clamped_swiglu(gate, up, limit).bfloat16()
    return (h if weights is None else weights.bfloat16().unsqueeze(-1) * h).to(gate.dtype)


for _contract in (swiglu, swiglu_quant):
    _contract.wrong_arguments(
        {
            "gate and up swapped": lambda a: a._replace(gate=a.up, up=a.gate),
            "no clamp": {"limit": math.inf},
            "weights left out": {"weights": None},
            "weights of the row before": {"weights": lambda weights: weights.roll(1)},
        }
    )
    _contract.wrong_step(clamped_swiglu, WRONG_PRODUCTS)
swiglu.fault("rounded before the weight")(_rounded_before_weight)


def _one_scale_per_row(h: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    q, scale = act_quant.reference(h, max(1, h.shape[1]))
    return q, scale.view(torch.uint8).repeat(1, -(-h.shape[1] // block)).view(scale.dtype)


swiglu_quant.wrong_steps(
    {
        "rounded before the weight": {swiglu.reference: _rounded_before_weight},
        "one scale per row": {act_quant.reference: _one_scale_per_row},
        "amax without its floor": {
            block_scale: lambda b, largest, _: block_scale(b, largest, 2.0**-100)
        },
    }
)
swiglu_quant.wrong_arguments(
    {"quantised straight from fp32": dict.fromkeys(("gate", "up"), lambda x: x.float())}
)
swiglu_quant.wrong_results(
    {
        "scale of the unweighted product": lambda a, q, scale: (
            q,
            swiglu_quant.reference(*a._replace(weights=None))[1],
        )
    }
)


_SAME_WEIGHTS = {"swiglu: weights.to(h.dtype) -> weights": "both factors are fp32"}
swiglu.explain(_SAME_WEIGHTS)
swiglu_quant.explain(_SAME_WEIGHTS, ACT_QUANT_EQUIVALENTS)
