"""Weights as the checkpoint stores them: float, FP8 with 128x128 scales, or packed FP4 with 32-wide scales.

Scales are E8M0, for which there are products, or fp32 of any value ("float-scaled"): such a weight is widened to fp32
for each call, and multiplied with the activations that the other product would take.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from dsv4_ascend.checkpoint.layout import FP4_BLOCK, FP8_TILE
from dsv4_backend.ops.formats import e4m3_values, scale_values, unpack_e2m1
from dsv4_backend.ops.gemm import dequantize_rows, fp4_grouped_gemm, fp8_gemm, fp8_grouped_gemm, grouped_gemm
from dsv4_backend.ops.quant import act_quant
from dsv4_backend.ops.swiglu import swiglu, swiglu_quant

ACTIVATION_BLOCK = 128
Quantise = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Rows [T, K] to codes [T, K] and scales [T, blocks of K]."""


def fp8_blocks(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [T, K] as e4m3 with an e8m0 scale per 128 channels, as before every official FP8 or FP4 product (6.3)."""
    return act_quant(x, ACTIVATION_BLOCK)


def empty_parameter(*shape: int) -> nn.Parameter:
    """A placeholder on the meta device, replaced when weights are loaded or initialised."""
    return nn.Parameter(torch.empty(shape, device="meta"))


class Linear(nn.Module):
    """`y = x Wᵀ` with W `[N, K]` float, or e4m3 with `scale` e8m0 or fp32 of 128x128 tiles (spec/v4.md 6.3).

    activations: how x is quantised before the product of a quantised weight; None where it is not.
    """

    scale: nn.Parameter | None

    def __init__(self, n: int, k: int, activations: Quantise | None = None) -> None:
        super().__init__()
        self.activations = activations
        self.weight = empty_parameter(n, k)
        self.register_parameter("scale", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X [T, K] -> [T, N] in x's dtype."""
        if self.scale is None:
            return nn.functional.linear(x, self.weight.to(x.dtype))
        q, scale = (x, None) if self.activations is None else self.activations(x)
        if self.float_scaled:
            return nn.functional.linear(dequantize_rows(q, scale), self.values()).to(x.dtype)
        return fp8_gemm(q, scale, self.weight, self.scale)

    @property
    def float_scaled(self) -> bool:
        """Whether the scales are fp32 values of any kind, which no operator takes."""
        return self.scale is not None and self.scale.dtype == torch.float32

    def values(self) -> torch.Tensor:
        """W as fp32 [N, K], whatever it is stored as; a value times a scale that is no power of two rounds once."""
        return self.weight.float() if self.scale is None else widened(self.weight, self.scale)


def widened(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """fp32 [N, K] of e4m3 [N, K] with tiles of 128x128, or of packed e2m1 int8 [N, K/2] with blocks of 32 inputs.

    scale: e8m0 or fp32.
    """
    wide = scale if scale.dtype == torch.float32 else scale_values(scale)
    if weight.dtype != torch.float8_e4m3fn:
        return unpack_e2m1(weight) * wide.repeat_interleave(FP4_BLOCK, 1)
    rows = wide.repeat_interleave(FP8_TILE, 0)[: weight.shape[0]]
    return e4m3_values(weight) * rows.repeat_interleave(FP8_TILE, 1)[:, : weight.shape[1]]


class RMSNormWeight(nn.Module):
    """Holder of a norm's `weight` [d], so that module paths equal checkpoint names."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = empty_parameter(d)


class Expert(nn.Module):
    """w1 (gate), w3 (up) `[m, d]` and w2 (down) `[d, m]` of one expert."""

    def __init__(self, d: int, m: int, activations: Quantise | None) -> None:
        super().__init__()
        self.w1, self.w3 = Linear(m, d, activations), Linear(m, d, activations)
        self.w2 = Linear(d, m, activations)

    def forward(self, x: torch.Tensor, limit: float) -> torch.Tensor:
        """The shared expert: x [T, d] -> [T, d], SwiGLU clamped at `limit`."""
        y: torch.Tensor = self.w2(swiglu(self.w1(x), self.w3(x), None, limit))
        return y


class GroupedLinear:
    """The same-named linear of all experts as one grouped product; picks the operator by how weights are stored."""

    def __init__(self, linears: list[Linear]) -> None:
        self.weights = [linear.weight for linear in linears]
        scales = [linear.scale for linear in linears]
        self.scales = [scale for scale in scales if scale is not None]
        self.quantised = len(self.scales) > 0
        self.float_scaled = any(linear.float_scaled for linear in linears)
        self.product = fp8_grouped_gemm if self.weights[0].dtype == torch.float8_e4m3fn else fp4_grouped_gemm

    def __call__(self, x: torch.Tensor, x_scale: torch.Tensor | None, expert_offsets: torch.Tensor) -> torch.Tensor:
        """X [M, K] sorted by expert (e4m3 with `x_scale`, or float) -> [M, N]."""
        if self.float_scaled:
            return self._widen(x, x_scale, expert_offsets)
        if self.quantised:
            return self.product(x, x_scale, self.weights, self.scales, expert_offsets)
        # Narrower weights are widened by the operator, for the experts that have rows only.
        weights = [w if w.itemsize <= x.itemsize else w.to(x.dtype) for w in self.weights]
        return grouped_gemm(x, weights, expert_offsets)

    def _widen(self, x: torch.Tensor, x_scale: torch.Tensor | None, expert_offsets: torch.Tensor) -> torch.Tensor:
        # One expert at a time: all of a layer in fp32 would take eight times their stored bytes.
        rows = dequantize_rows(x, x_scale).split(expert_offsets.diff().tolist())
        product = [
            nn.functional.linear(part, widened(self.weights[e], self.scales[e]))
            for e, part in enumerate(rows)
            if part.shape[0]
        ]
        empty = torch.zeros(0, self.weights[0].shape[0], device=x.device)
        return torch.cat([empty, *product]).to(x.dtype if x_scale is None else torch.bfloat16)


def run_experts(
    experts: list[Expert],
    rows: torch.Tensor,
    weights: torch.Tensor,
    expert_offsets: torch.Tensor,
    limit: float,
    activations: Quantise | None,
) -> torch.Tensor:
    """Routed experts on rows sorted by expert: rows [M, d], weights fp32 [M] -> [M, d] (spec/v4.md 5.2).

    The routing weight multiplies before w2 and before its input is quantised.
    """
    w1, w3, w2 = (GroupedLinear([getattr(e, name) for e in experts]) for name in ("w1", "w3", "w2"))
    if not w1.quantised or activations is None:
        h = swiglu(w1(rows, None, expert_offsets), w3(rows, None, expert_offsets), weights, limit)
        return w2(h, None, expert_offsets)
    q, scale = activations(rows)
    h, h_scale = swiglu_quant(w1(q, scale, expert_offsets), w3(q, scale, expert_offsets), weights, limit)
    return w2(h, h_scale, expert_offsets)
