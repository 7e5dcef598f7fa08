"""Grouped output projection (spec/v4.md 4.7)."""

from __future__ import annotations

import torch

from dsv4_backend.contract import Tolerance, compute, operator
from dsv4_backend.ops.gemm import fp8_gemm
from dsv4_backend.ops.quant import act_quant, dequantize_fp8


def _linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """X [T, K] times a float weight, or an FP8 one with its scales, as official linear layers do (6.3)."""
    if scale is None:
        wide = compute(x)
        return (wide @ weight.to(wide.dtype).T).to(x.dtype)
    if x.dtype != torch.bfloat16:
        return fp8_gemm.reference(x, None, weight, scale)
    return fp8_gemm.reference(*act_quant.reference(x, 128), weight, scale)


@operator(
    "grouped_output_projection(Tensor o, Tensor wo_a, Tensor? wo_a_scale, Tensor wo_b, Tensor? wo_b_scale, int groups) "
    "-> Tensor",
    rows=(17,),
    arguments={
        "o": "float [T, H, D]",
        "wo_a": "float|e4m3 [GR, K]",
        "wo_a_scale": "e8m0 [GR^128, K^128]",
        "wo_b": "float|e4m3 [d, GR]",
        "wo_b_scale": "e8m0 [d^128, GR^128]",
    },
    tolerance=Tolerance(
        reason="fp32 sums in any order; bf16 between the two products and at the end",
        ideal=(2e-6, 2e-5),
        official=(2**-6, 2**-6),
    ),
)
def grouped_output_projection(
    o: torch.Tensor,
    wo_a: torch.Tensor,
    wo_a_scale: torch.Tensor | None,
    wo_b: torch.Tensor,
    wo_b_scale: torch.Tensor | None,
    groups: int,
) -> torch.Tensor:
    """Project each group of heads to R channels, then all groups together to the hidden size.

    o: [T, H, D]; wo_a: [G*R, H*D/G], rows g*R .. g*R+R-1 belong to heads g*H/G .. (g+1)*H/G-1 flattened in order; wo_b:
    [d, G*R]; scales: None for float weights, else E8M0 of 128x128 tiles of an e4m3 weight. Returns [T, d] in o's dtype.
    bf16 o: wo_a (dequantised to bf16) times o in fp32 sums, one cast; an FP8 wo_b is multiplied as any FP8 linear
    (act_quant in blocks of 128, fp8_gemm). fp32 o: fp32 products with the dequantised weights, nothing is quantised.
    T = 0 gives an empty result. Source: spec/v4.md 4.7, 6.4 [OFF-M, OFF-CONV].
    """
    wide = compute(o)
    grouped = wide.flatten(1).unflatten(1, (groups, -1))  # [T, G, H*D/G]
    first = wo_a if wo_a_scale is None else dequantize_fp8(wo_a, wo_a_scale).to(o.dtype)
    weight = first.to(wide.dtype).unflatten(0, (groups, -1))  # [G, R, H*D/G]
    z = torch.einsum("tgk,grk->tgr", grouped, weight).flatten(1).to(o.dtype)
    return _linear(z, wo_b, wo_b_scale)
