"""Activations and weights whose product tells one rounding from another (spec/v4.md 6.1, 6.3)."""

from __future__ import annotations

import torch

from dsv4_backend.contract import Draw


def alternating_rows(draw: Draw, rows: int, k: int) -> torch.Tensor:
    """bf16 [rows, k] of +1 and -1, as many of each, in an order of every row's own."""
    signs = torch.tensor([1.0, -1.0]).repeat(k // 2)
    return torch.stack([signs[draw.permutation(k)] for _ in range(rows)]).bfloat16()


def fp32_weight(draw: Draw, n: int, k: int) -> torch.Tensor:
    """fp32 [n, k] about 100: times `alternating_rows` only what bf16 cannot hold is left."""
    return draw.normal(n, k, scale=0.1) + 100


def whole(draw: Draw, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Whole numbers up to 8, which every format of 4 significant bits holds; fp32 sums of their
    products, also by scales of `powers`, are exact in any order.
    """
    return draw.integers(*shape, low=-8, high=9).to(dtype)


def powers(draw: Draw, *shape: int) -> torch.Tensor:
    """E8M0 scales 1/2 to 4."""
    return torch.exp2(draw.integers(*shape, low=-1, high=3)).to(torch.float8_e8m0fnu)


def whole_fp8(draw: Draw, *shape: int, block: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """`whole` values [..., K] in e4m3, and a scale of `powers` for each `block` channels."""
    scales = powers(draw, *shape[:-1], -(-shape[-1] // block))
    return whole(draw, *shape, dtype=torch.float8_e4m3fn), scales


def whole_fp4(draw: Draw, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in e2m1, whose values all are as good: int8 [..., K/2], scales [..., K/32]."""
    *rows, k = shape
    return draw.bytes(*rows, k // 2).view(torch.int8), powers(draw, *rows, k // 32)


WHOLE = "whole numbers, one rounding"
"""Name of decided cases of `whole` values: only the cast of a result rounds."""

NO_257TH_CODE = "e4m3_values: 256 -> 257", "no byte looks the 257th value up"
