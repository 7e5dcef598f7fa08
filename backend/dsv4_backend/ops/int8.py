"""W8A8 matrix products and the SwiGLU between them,
as on Ascend A2 and A3 (spec/deployments.md 2, 4).
"""

from __future__ import annotations

import torch

from dsv4_backend.contract import DEPLOYMENTS, Tolerance, operator
from dsv4_backend.experts import by_expert
from dsv4_backend.ops.swiglu import LIMIT, clamped_swiglu, gate_and_up
from dsv4_backend.ops.token_quant import quantise_int8
from dsv4_backend.relations import covered, held_by_bf16

_EXACT = Tolerance(
    reason="integer sums are exact, then two fp32 products and one cast: every bit is decided"
)
_EXACT_TERMS = 1024
"""Products of two int8 numbers whose sum fp32 holds: 1024 * 128 * 128 = 2^24."""


def exact_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """int32 [T, N]: int8 x [T, K] times the transposed int8 weight [N, K]."""
    total = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.int32, device=x.device)
    for a, b in zip(x.split(_EXACT_TERMS, 1), weight.split(_EXACT_TERMS, 1), strict=True):
        total = total + (a.float() @ b.float().T).int()
    return total


def scaled(sums: torch.Tensor, weight_scale: torch.Tensor, x_scale: torch.Tensor) -> torch.Tensor:
    """fp32 [T, N] of int32 sums [T, N]: times the channel's scale [N], then times the row's [T]."""
    return sums.float() * weight_scale * x_scale.unsqueeze(-1)


@operator(
    "int8_gemm(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale) -> Tensor",
    rows=(9,),
    arguments={
        "x": "i8 [T, K]",
        "x_scale": "f32 [T]",
        "weight": "i8 [N, K]",
        "weight_scale": "f32 [N]",
    },
    tolerance=_EXACT,
)
def int8_gemm(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor:
    """`x W^T` of int8 rows with one scale each and an int8 weight
    with one scale per output channel.

    x: int8 [T, K] with x_scale fp32 [T] (`int8_token_quant`); weight: int8 [N, K] with
    weight_scale fp32 [N]. Returns bf16 [T, N]: the exact integer sum as fp32, times weight_scale,
    times x_scale, one cast. Zero tokens give [0, N]. Source: aclnnQuantMatmulV5,
    aclnnQuantMatmulWeightNz; spec/deployments.md 2, spec/v4.md 6.3.
    """
    return scaled(exact_product(x, weight), weight_scale, x_scale).bfloat16()


@operator(
    "int8_grouped_gemm(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, "
    "Tensor expert_offsets) -> Tensor",
    rows=(10,),
    arguments={
        "x": "i8 [T, K]",
        "x_scale": "f32 [T]",
        "weight": "i8 [E, N, K]",
        "weight_scale": "f32 [E, N]",
        "expert_offsets": "i32 [E+1]",
    },
    relations=(*covered("weight", "T"), held_by_bf16("weight_scale")),
    tolerance=_EXACT,
)
def int8_grouped_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    expert_offsets: torch.Tensor,
) -> torch.Tensor:
    """`int8_gemm` of every row with the weight of its expert: rows expert_offsets[e] ..
    expert_offsets[e+1]-1 are e's.

    x: int8 [T, K], rows sorted by expert, with x_scale fp32 [T]; weight: int8 [E, N, K] with
    weight_scale fp32 [E, N] of values that bf16 holds (`quantize_weight_int8`), which is what A2
    and A3 take; expert_offsets: int32 [E+1], from 0 to T, never falling. Returns bf16 [T, N].
    Source: aclnnGroupedMatmulV5 W8A8; spec/deployments.md 2, spec/v4.md 5.2.
    """

    def product(e: int, part: slice) -> torch.Tensor:
        return scaled(exact_product(x[part], weight[e]), weight_scale[e], x_scale[part])

    return by_expert(expert_offsets, x, product).bfloat16()


@operator(
    "int8_grouped_sum(Tensor x, Tensor weight, Tensor expert_offsets) -> Tensor",
    rows=(10,),
    arguments={"x": "i8 [T, K]", "weight": "i8 [E, N, K]", "expert_offsets": "i32 [E+1]"},
    relations=covered("weight", "T"),
    tolerance=Tolerance(reason="integer sums are exact: every bit is decided"),
)
def int8_grouped_sum(
    x: torch.Tensor, weight: torch.Tensor, expert_offsets: torch.Tensor
) -> torch.Tensor:
    """The integer sums of `int8_grouped_gemm`,
    which `int8_swiglu_quant` scales: rows times their expert's weight.

    x: int8 [T, K], rows sorted by expert; weight: int8 [E, N, K], for w1 and w3 one after the
    other [E, 2m, K]; expert_offsets: int32 [E+1], from 0 to T, never falling. Returns int32 [T,
    N], exact for K below 2^17. Source: aclnnGroupedMatmulWeightNz with int32 output;
    spec/deployments.md 2, spec/v4.md 5.2.
    """
    return by_expert(expert_offsets, x, lambda e, part: exact_product(x[part], weight[e]))


@operator(
    "int8_swiglu_quant(Tensor sums, Tensor weight_scale, Tensor x_scale, Tensor expert_offsets, "
    "float limit) -> (Tensor q, Tensor scale)",
    rows=(19,),
    arguments={
        "sums": "i32 [M, n]",
        "weight_scale": "f32 [E, n]",
        "x_scale": "f32 [M]",
        "expert_offsets": "i32 [E+1]",
        "limit": LIMIT,
    },
    relations=(*covered("weight_scale", "M"), gate_and_up("sums")),
    tolerance=Tolerance(
        reason="fp32 exp and division in any order stay within 4e-6 relative, and so does the "
        "scale of a row; the cases keep every value 2^-12 of a step away from the ties of "
        "its code, so every code is decided",
        **dict.fromkeys(DEPLOYMENTS, (1e-30, 4e-6)),
    ),
)
def int8_swiglu_quant(
    sums: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor,
    expert_offsets: torch.Tensor,
    limit: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Integer sums of w1 and w3 to the int8 input of w2: scales,
    clamped SwiGLU and quantisation in fp32.

    sums: int32 [M, 2m] of `int8_grouped_sum`, w1's channels first, rows sorted by expert;
    weight_scale: fp32 [E, 2m]; x_scale: fp32 [M]; expert_offsets: int32 [E+1], from 0 to M, never
    falling; limit: > 0, as in `swiglu`. g and u are sums * weight_scale * x_scale; h = silu(min(g,
    limit)) * clamp(u, -limit, limit), nothing rounded to bf16 in between and no routing weight.
    Returns q int8 [M, m] and scale fp32 [M] as `int8_token_quant` of h. No gradient. Zero rows give
    empty results. Source: aclnnDequantSwigluQuantV2 mode 2; spec/deployments.md 4, spec/v4.md 5.2.
    """
    wide = by_expert(
        expert_offsets, sums, lambda e, part: scaled(sums[part], weight_scale[e], x_scale[part])
    )
    gate, up = wide.detach().chunk(2, -1)
    return quantise_int8(clamped_swiglu(gate, up, limit))


def quantize_weight_int8(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float [..., N, K] -> (int8 [..., N, K], fp32 [..., N]), one scale per output channel.

    scale: max |w| / 127 rounded up to a bf16 value, because aclnnGroupedMatmul takes bf16 scales
    for a bf16 output; code: fp32(w / scale) rounded to nearest even. A row of zeros: 0 and 0.
    Source: spec/deployments.md 5.
    """
    return _by_row(w, 127)


def quantize_weight_int4(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_weight_int8` with codes of 4 bits: int8 [..., N, K] within +-7, fp32 [..., N].

    No document gives the rule of int4: max |w| / 7 and no clipping is our choice.
    """
    return _by_row(w, 7)


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """int8 [..., N, K] of codes -8..7, N even -> int8 [..., N/2, K]: two rows in a byte, the even
    one in the low half. Source: spec/ascend-operators.md 6 (files of msModelSlim).
    """
    both = codes.unflatten(-2, (-1, 2))
    packed: torch.Tensor = (both.select(-2, 0) & 15) | (both.select(-2, 1) << 4)
    return packed


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """int8 [..., N/2, K] -> int8 [..., N, K]: `pack_int4` undone."""
    return torch.stack([packed << 4 >> 4, packed >> 4], -2).flatten(-3, -2)


def _by_row(w: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    wide = w.detach().float()
    scale = _bf16_at_least(wide.abs().amax(-1) / largest)
    codes = torch.where(scale.unsqueeze(-1) > 0, wide / scale.unsqueeze(-1), 0.0)
    return codes.round().clamp(-largest, largest).to(torch.int8), scale


def _bf16_at_least(x: torch.Tensor) -> torch.Tensor:
    """fp32: the smallest bf16 value that is no smaller than fp32 x >= 0."""
    bits = x.view(torch.int32)
    return ((bits + 0xFFFF) & -0x10000).view(torch.float32)


def dequantize_int8(w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(int8 [..., N, K], fp32 [..., N]) -> fp32 [..., N, K], exact for scales that bf16 holds."""
    return w.float() * scale.unsqueeze(-1)
