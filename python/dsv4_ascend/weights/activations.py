"""How rows are quantised before the product of a quantised weight (spec/v4.md 6.1, 6.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dsv4_backend.ops.gemm import dequantize_rows
from dsv4_backend.ops.quant import act_quant
from dsv4_backend.ops.swiglu import swiglu, swiglu_quant

Rows = tuple[torch.Tensor, torch.Tensor | None]
"""Codes [T, K] and scales of their blocks [T, ceil(K / block)], or rows as they are and None."""


@dataclass(frozen=True)
class ActivationFormat:
    """What a profile makes of the input of quantised weights.

    block: consecutive channels that share a scale, 0 where there is none. quantise(x [T, K]) ->
    rows. swiglu(gate, up [M, m], weights fp32 [M] or None, limit) -> the input of w2, quantised
    (5.2). values(*rows) -> fp32 [T, K], for products that no operator takes.
    """

    name: str
    block: int
    quantise: Callable[[torch.Tensor], Rows]
    swiglu: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, float], Rows]
    values: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


def _as_it_is(x: torch.Tensor) -> Rows:
    return x, None


def _swiglu(
    gate: torch.Tensor, up: torch.Tensor, weights: torch.Tensor | None, limit: float
) -> Rows:
    return swiglu(gate, up, weights, limit), None


def _fp8_blocks(x: torch.Tensor) -> Rows:
    return act_quant(x, FP8_BLOCKS.block)


UNQUANTISED = ActivationFormat("unquantised", 0, _as_it_is, _swiglu, dequantize_rows)
FP8_BLOCKS = ActivationFormat("fp8 blocks", 128, _fp8_blocks, swiglu_quant, dequantize_rows)
"""E4m3 with an e8m0 scale per 128 channels, as before every official FP8 or FP4 product."""
