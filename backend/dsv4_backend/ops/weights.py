"""Block-scaled FP8 and FP4 weights: quantisation and back (spec/v4.md 6.3, 7).

The weight scale is the smallest power of two s with amax / s <= 448 (FP8) or <= 6 (FP4); an all-zero block has 2^-126.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from dsv4_backend.ops.quant import (
    E2M1_MAX,
    E4M3_MAX,
    FP4_FLOOR,
    block_scale,
    divide_blocks,
    e2m1_values,
    pack_nibbles,
    round_e2m1,
    round_e4m3,
    scale_bytes,
    scale_values,
    split_blocks,
)

FP8_TILE = 128
FP4_BLOCK = 32
FP8_WEIGHT_FLOOR = E4M3_MAX * 2.0**-126


def quantize_weight_fp8(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float [N, K] -> (float8_e4m3fn [N, K], float8_e8m0fnu [ceil(N/128), ceil(K/128)]), one scale per 128x128 tile.

    Source: spec/v4.md 6.3.
    """
    n, k = w.shape
    wide = w.detach().float()
    padded = pad(wide, (0, -k % FP8_TILE, 0, -n % FP8_TILE))
    tiles = padded.unflatten(0, (padded.shape[0] // FP8_TILE, FP8_TILE))
    tiles = tiles.unflatten(-1, (padded.shape[1] // FP8_TILE, FP8_TILE))
    scale = scale_bytes(tiles.abs().amax((1, 3)).clamp(min=FP8_WEIGHT_FLOOR), E4M3_MAX)
    return round_e4m3(wide / expand_tiles(scale, n, k)), scale.view(torch.float8_e8m0fnu)


def quantize_weight_fp4(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float [N, K], K a multiple of 32 -> (int8 [N, K/2], float8_e8m0fnu [N, K/32]), low nibble = even k.

    Source: spec/v4.md 6.3.
    """
    if w.shape[1] % FP4_BLOCK:
        raise ValueError(f"quantize_weight_fp4: w has {w.shape[1]} columns, expected a multiple of {FP4_BLOCK}")
    blocks = split_blocks(w.detach().float(), FP4_BLOCK)
    scale = block_scale(blocks, E2M1_MAX, FP4_FLOOR)
    return pack_nibbles(round_e2m1(divide_blocks(blocks, scale)).flatten(-2)), scale.view(torch.float8_e8m0fnu)


def dequantize_fp8(w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(float8_e4m3fn [N, K], float8_e8m0fnu [ceil(N/128), ceil(K/128)]) -> fp32 [N, K], exact. Spec/v4.md 6.3."""
    return w.float() * expand_tiles(scale, w.shape[0], w.shape[1])


def dequantize_fp4(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(int8 [N, K/2], float8_e8m0fnu [N, K/32]) -> fp32 [N, K], exact. Source: spec/v4.md 6.3."""
    return unpack_fp4(packed) * scale_values(scale).repeat_interleave(FP4_BLOCK, -1)


def unpack_fp4(packed: torch.Tensor) -> torch.Tensor:
    """int8 [..., K/2] -> fp32 e2m1 values [..., K], low nibble first."""
    both = packed.view(torch.uint8)
    return e2m1_values(torch.stack([both & 15, both >> 4], -1)).flatten(-2)


def expand_tiles(scale: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """fp32 [n, k] scale of every element, from one E8M0 scale per 128x128 tile."""
    rows = scale_values(scale).repeat_interleave(FP8_TILE, 0)[:n]
    return rows.repeat_interleave(FP8_TILE, 1)[:, :k]
