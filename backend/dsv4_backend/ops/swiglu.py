"""Clamped SwiGLU, plain and quantised: the input of an expert's w2 (spec/v4.md 5.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from dsv4_backend.contract import Case, Draw, Operator, Tolerance, compute, operator
from dsv4_backend.mutants import add_output_faults
from dsv4_backend.ops import quant
from dsv4_backend.ops.formats import E4M3_MAX, block_scale, divide_blocks, round_e4m3, split_blocks

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
    tolerance=Tolerance(
        reason="fp32 exp and division in any order stay within 4e-6 relative, and exp(-x) may overflow to a result "
        "of 0; the official cases keep 2^-18 away from ties of the one rounding to bf16, so every bit is decided",
        ideal=(1e-20, 4e-6),
    ),
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
    tolerance=Tolerance(
        reason="the cases keep the product 2^-18 away from ties of its rounding to bf16; quantisation decides every bit"
    ),
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


def _check_limit(contract: Operator, limit: float) -> None:
    if not (0 < limit <= torch.finfo(torch.float32).max or limit == math.inf):
        raise contract.reject("limit", limit, "a number > 0 that fp32 holds, or infinity")


@swiglu.shapes
def _(gate: torch.Tensor, up: torch.Tensor, weights: torch.Tensor | None, limit: float) -> None:
    _check_limit(swiglu, limit)
    if up.dtype != gate.dtype:
        raise swiglu.reject("up", str(up.dtype), f"{gate.dtype} like gate")


@swiglu_quant.shapes
def _(gate: torch.Tensor, up: torch.Tensor, weights: torch.Tensor | None, limit: float) -> None:
    _check_limit(swiglu_quant, limit)


_SHAPES = ((0, 64), (1, 1), (3, 7), (5, 2048), (19, 130))
"""(rows, m)."""
_TIE_MARGIN = 2.0**-18


def _gate_up(draw: Draw, rows: int, m: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up whose scale differs from row to row: some rows beyond the clamp, some far below."""
    scale = torch.tensor([1.0, 8.0, 0.05, 30.0]).repeat(rows)[:rows].unsqueeze(1)
    return (draw.normal(rows, m) * scale).to(dtype), (draw.normal(rows, m) * scale).to(dtype)


def _decided(gate: torch.Tensor, up: torch.Tensor, weights: torch.Tensor | None, limit: float) -> tuple[object, ...]:
    """Arguments with both factors zeroed where bf16 rounding of the product hangs on the last bits of fp32."""
    wide = swiglu.reference(gate.double(), up.double(), None if weights is None else weights.double(), limit)
    low, high = (wide * (1 - _TIE_MARGIN)).bfloat16(), (wide * (1 + _TIE_MARGIN)).bfloat16()
    open_ = wide.isfinite() & ((low != high) | (wide.abs() < 2.0**-100))
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
    gate[0, 0], up[1, 1], gate[2, 2], up[3, 3], gate[3] = math.nan, math.nan, math.inf, -math.inf, 0.0
    yield Case("NaN, infinity, zero row", profile, decided(gate, up, torch.tensor([1.0, 0.5, 2.0, 0.0]), 10.0))


@swiglu.cases
def _(draw: Draw) -> Iterator[Case]:
    yield from _swiglu_cases(draw, "ideal", torch.float32)
    yield from _swiglu_cases(draw, "official", torch.bfloat16)


@swiglu_quant.cases
def _(draw: Draw) -> Iterator[Case]:
    yield from _swiglu_cases(draw, "official", torch.bfloat16)


SwiGLU = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, float], torch.Tensor]


def _fp32(product: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]) -> SwiGLU:
    """The reference with another `product(gate, up, limit)` in fp32."""

    def mutant(gate: torch.Tensor, up: torch.Tensor, weights: torch.Tensor | None, limit: float) -> torch.Tensor:
        h = product(compute(gate), compute(up), limit)
        return (h if weights is None else weights.unsqueeze(-1) * h).to(gate.dtype)

    return mutant


def _rounded_before_weight(
    gate: torch.Tensor, up: torch.Tensor, weights: torch.Tensor | None, limit: float
) -> torch.Tensor:
    h = clamped_swiglu(gate, up, limit).bfloat16()
    return (h if weights is None else weights.bfloat16().unsqueeze(-1) * h).to(gate.dtype)


_WRONG_SWIGLU: dict[str, SwiGLU] = {
    "gate and up swapped": lambda gate, up, weights, limit: swiglu.reference(up, gate, weights, limit),
    "no clamp": lambda gate, up, weights, limit: swiglu.reference(gate, up, weights, math.inf),
    "weights left out": lambda gate, up, weights, limit: swiglu.reference(gate, up, None, limit),
    "gate clamped below too": _fp32(lambda g, u, limit: F.silu(g.clamp(-limit, limit)) * u.clamp(-limit, limit)),
    "up clamped above only": _fp32(lambda g, u, limit: F.silu(g.clamp(max=limit)) * u.clamp(max=limit)),
    "gate not clamped": _fp32(lambda g, u, limit: F.silu(g) * u.clamp(-limit, limit)),
    "clamp after silu": _fp32(lambda g, u, limit: F.silu(g).clamp(max=limit) * u.clamp(-limit, limit)),
    "product clamped": _fp32(lambda g, u, limit: (F.silu(g) * u).clamp(-limit, limit)),
    "GELU instead of SiLU": _fp32(lambda g, u, limit: F.gelu(g.clamp(max=limit)) * u.clamp(-limit, limit)),
    "up + 1": _fp32(lambda g, u, limit: F.silu(g.clamp(max=limit)) * (u.clamp(-limit, limit) + 1)),
    "rounded before the weight": _rounded_before_weight,
    "weights of the row before": lambda gate, up, weights, limit: swiglu.reference(
        gate, up, None if weights is None else weights.roll(1), limit
    ),
}


def _then_quantise(product: SwiGLU) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    return lambda *arguments: quant.act_quant.reference(product(*arguments), BLOCK)


for _name, _product in _WRONG_SWIGLU.items():
    swiglu.fault(_name)(_product)
    swiglu_quant.fault(_name)(_then_quantise(_product))
add_output_faults(swiglu, "last token zero", "stale tail of channels", "one NaN", "tokens shifted by one")
add_output_faults(swiglu_quant, "tokens shifted by one", output=1)


@swiglu_quant.fault("quantised straight from fp32")
def _(
    gate: torch.Tensor, up: torch.Tensor, weights: torch.Tensor | None, limit: float
) -> tuple[torch.Tensor, torch.Tensor]:
    q, scale = quant.act_quant.reference(swiglu.reference(gate.float(), up.float(), weights, limit), BLOCK)
    return q, scale


@swiglu_quant.fault("scale of the unweighted product")
def _(
    gate: torch.Tensor, up: torch.Tensor, weights: torch.Tensor | None, limit: float
) -> tuple[torch.Tensor, torch.Tensor]:
    _, scale = swiglu_quant.reference(gate, up, None, limit)
    return swiglu_quant.reference(gate, up, weights, limit)[0], scale


@swiglu_quant.fault("one scale per row")
def _(
    gate: torch.Tensor, up: torch.Tensor, weights: torch.Tensor | None, limit: float
) -> tuple[torch.Tensor, torch.Tensor]:
    h = swiglu.reference(gate, up, weights, limit)
    q, scale = quant.act_quant.reference(h, max(1, h.shape[1]))
    return q, scale.view(torch.uint8).repeat(1, -(-h.shape[1] // BLOCK)).view(scale.dtype)


@swiglu_quant.fault("amax without its floor")
def _(
    gate: torch.Tensor, up: torch.Tensor, weights: torch.Tensor | None, limit: float
) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = split_blocks(swiglu.reference(gate, up, weights, limit), BLOCK)
    scale = block_scale(blocks, E4M3_MAX, 2.0**-100)
    q = round_e4m3(divide_blocks(blocks, scale)).flatten(1)[:, : gate.shape[1]]
    return q.contiguous(), scale.view(torch.float8_e8m0fnu)
