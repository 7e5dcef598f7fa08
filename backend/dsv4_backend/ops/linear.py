"""The product that operators with a linear inside share: a float weight, or an FP8 one as in every FP8 linear (6.3)."""

from __future__ import annotations

import torch

from dsv4_backend.contract import compute
from dsv4_backend.ops.gemm import fp8_gemm
from dsv4_backend.ops.quant import act_quant

_BLOCK = 128


def linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """`x @ weight.T` of x [M, K] in x's dtype; an FP8 weight takes bf16 activations through act_quant."""
    if scale is None:
        wide = compute(x)
        return (wide @ weight.to(wide.dtype).T).to(x.dtype)
    if x.dtype != torch.bfloat16:
        return fp8_gemm.reference(x, None, weight, scale)
    return fp8_gemm.reference(*act_quant.reference(x, _BLOCK), weight, scale)
