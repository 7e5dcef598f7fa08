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


NO_257TH_CODE = "e4m3_values: 256 -> 257", "no byte looks the 257th value up"
