"""FP8 and FP4 quantisation of activations, real and simulated (spec/v4.md 6.1, 6.2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import pad

from dsv4_backend.contract import Tolerance, operator
from dsv4_backend.errors import argument_error
from dsv4_backend.ops.formats import (
    E2M1_MAX,
    E4M3_MAX,
    block_scale,
    divide_blocks,
    e2m1_values,
    e4m3_values,
    pack_e2m1,
    round_e2m1,
    round_e4m3,
    scale_bytes,
    scale_values,
    split_blocks,
    unpack_e2m1,
)
from dsv4_backend.relations import require

ACT_FLOOR = 1e-4
FP4_FLOOR = E2M1_MAX * 2.0**-126
FP8_WEIGHT_FLOOR = E4M3_MAX * 2.0**-126
FP8_TILE = 128
FP4_BLOCK = 32
_EXACT = Tolerance(reason="quantisation rounds once, by rule: every bit is decided")

Rule = Callable[[torch.Tensor], torch.Tensor]


def act_scale(blocks: torch.Tensor) -> torch.Tensor:
    """Scale bytes [..., B] of activation blocks [..., B, block_size] for FP8."""
    return block_scale(blocks, E4M3_MAX, ACT_FLOOR)


def fp4_scale(blocks: torch.Tensor) -> torch.Tensor:
    """Scale bytes [..., B] of blocks [..., B, block_size] for FP4."""
    return block_scale(blocks, E2M1_MAX, FP4_FLOOR)


def _quantise(
    x: torch.Tensor, block_size: int, scale_of: Rule, round_to: Rule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [..., B, block_size] and scale bytes [..., B] of x [..., K]."""
    blocks = split_blocks(x.detach(), block_size)
    scale = scale_of(blocks)
    return round_to(divide_blocks(blocks, scale)), scale


def _merge(blocks: torch.Tensor, channels: int) -> torch.Tensor:
    return blocks.flatten(-2)[..., :channels].contiguous()


def _straight_through(x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    # x.detach() - x is +0, so the value and the sign of its zeros are those of `rounded`; the
    # gradient is x's.
    return rounded.to(x.dtype) - (x.detach() - x)


def quantise_fp8(x: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 codes [..., K] and E8M0 scales of x."""
    q, scale = _quantise(x, block_size, act_scale, round_e4m3)
    return _merge(q, x.shape[-1]), scale.view(torch.float8_e8m0fnu)


def round_trip_fp8(x: torch.Tensor, block_size: int, channels: int) -> torch.Tensor:
    """The first channels of x quantised to FP8 and back."""
    head = x[..., :channels]
    q, scale = _quantise(head, block_size, act_scale, round_e4m3)
    value = _merge(e4m3_values(q) * scale_values(scale).unsqueeze(-1), channels)
    return torch.cat([_straight_through(head, value), x[..., channels:]], -1)


def quantise_fp4(x: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed FP4 codes [..., K/2] and E8M0 scales of x."""
    codes, scale = _quantise(x, block_size, fp4_scale, round_e2m1)
    return pack_e2m1(_merge(codes, x.shape[-1])), scale.view(torch.float8_e8m0fnu)


def round_trip_fp4(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """All of x quantised to FP4 and back."""
    codes, scale = _quantise(x, block_size, fp4_scale, round_e2m1)
    return _straight_through(
        x, _merge(e2m1_values(codes) * scale_values(scale).unsqueeze(-1), x.shape[-1])
    )


@operator(
    "act_quant(Tensor x, int block_size) -> (Tensor q, Tensor scale)",
    rows=(7,),
    arguments={"x": "float [..., K]", "block_size": "at least 1"},
    tolerance=_EXACT,
)
def act_quant(x: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 quantisation of consecutive blocks of channels with power-of-two scales.

    x: [..., K] float; block_size: 128 for GEMM inputs, 64 for KV rows; the last block may be short.
    Returns q: float8_e4m3fn [..., K], scale: float8_e8m0fnu [..., ceil(K / block_size)]; x is about
    q * scale. amax of a block is floored at 1e-4, scale = 2^ceil(log2(fp32(amax * fp32(1/448))))
    through bits, q is x / scale rounded to nearest even. NaN or infinity in a block: its scale is
    byte 0xFF and its q bytes are 0x7F. Zero rows give empty results. No gradient. Source:
    spec/v4.md 6.1 [OFF-K].
    """
    return quantise_fp8(x, block_size)


@operator(
    "act_qdq(Tensor x, int block_size, int channels) -> Tensor",
    rows=(7,),
    arguments={"x": "float [..., K]", "block_size": "at least 1", "channels": "0 to K"},
    tolerance=_EXACT,
)
def act_qdq(x: torch.Tensor, block_size: int, channels: int) -> torch.Tensor:
    """The first `channels` channels after FP8 quantisation and back (`act_quant`),
    the others unchanged.

    x: [..., K] float; 0 <= channels <= K. KV rows use block 64 on the 448 channels before the RoPE
    part. Returns [..., K] in x's dtype, one cast of fp32(q * scale): the largest bf16 values become
    infinite. A block with NaN or infinity becomes NaN. Zero rows give an empty result. Gradient:
    straight-through, that of x. Source: spec/v4.md 6.1 step 5 [OFF-K].
    """
    return round_trip_fp8(x, block_size, channels)


@operator(
    "fp4_quant(Tensor x, int block_size) -> (Tensor packed, Tensor scale)",
    rows=(8,),
    arguments={"x": "float [..., K]", "block_size": "at least 1"},
    relations=(require("x", "K % 2 == 0", "{K} channels", "an even number, two codes per byte"),),
    tolerance=_EXACT,
)
def fp4_quant(x: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """FP4 (e2m1) quantisation of consecutive blocks of channels with power-of-two scales,
    two codes per byte.

    x: [..., K] float, K even; block_size: 32; the last block may be short. Returns packed: int8
    [..., K/2], low nibble = even channel, high nibble = odd channel; scale: float8_e8m0fnu [...,
    ceil(K / block_size)]. amax is floored at 6 * 2^-126, scale = 2^ceil(log2(fp32(amax *
    fp32(1/6)))) through bits, the code is x / scale rounded to nearest, ties to the even code; bit
    3 is the sign, also of zero. NaN or infinity in a block: its scale is byte 0xFF and its codes
    are 0. Zero rows give empty results. No gradient. Source: spec/v4.md 6.2 [OFF-K].
    """
    return quantise_fp4(x, block_size)


@operator(
    "fp4_qdq(Tensor x, int block_size) -> Tensor",
    rows=(8,),
    arguments={"x": "float [..., K]", "block_size": "at least 1"},
    tolerance=_EXACT,
)
def fp4_qdq(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """Values after FP4 quantisation and back (`fp4_quant`).

    x: [..., K] float, K of either parity; block_size: 32. Indexer queries and keys, after the
    Hadamard rotation. Returns [..., K] in x's dtype, one cast of fp32(value * scale). A block with
    NaN or infinity becomes NaN. Zero rows give an empty result. Gradient: straight-through, that of
    x. Source: spec/v4.md 6.2 [OFF-K].
    """
    return round_trip_fp4(x, block_size)


def quantize_weight_fp8(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float [N, K] -> (float8_e4m3fn [N, K], float8_e8m0fnu [ceil(N/128), ceil(K/128)]),
    one scale per 128x128 tile.

    Source: spec/v4.md 6.3.
    """
    n, k = w.shape
    wide = w.detach().float().contiguous()
    padded = pad(wide, (0, -k % FP8_TILE, 0, -n % FP8_TILE))
    tiles = padded.reshape(
        padded.shape[0] // FP8_TILE, FP8_TILE, padded.shape[1] // FP8_TILE, FP8_TILE
    )
    scale = scale_bytes(tiles.abs().amax((1, 3)).clamp(min=FP8_WEIGHT_FLOOR), E4M3_MAX)
    return round_e4m3(wide / expand_tiles(scale, n, k)), scale.view(torch.float8_e8m0fnu)


def quantize_weight_fp4(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float [..., N, K], K % 32 = 0 -> (int8 [..., N, K/2], float8_e8m0fnu [..., N, K/32]).

    Low nibble = even k. Source: spec/v4.md 6.3.
    """
    if w.shape[-1] % FP4_BLOCK:
        expected = f"a multiple of {FP4_BLOCK}"
        raise argument_error("quantize_weight_fp4", "w", f"{w.shape[-1]} columns", expected)
    return quantise_fp4(w, FP4_BLOCK)


def dequantize_fp8(w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(float8_e4m3fn [N, K], float8_e8m0fnu [ceil(N/128), ceil(K/128)]) -> fp32 [N, K], exact.
    Spec/v4.md 6.3.
    """
    return e4m3_values(w) * expand_tiles(scale, w.shape[0], w.shape[1])


def dequantize_fp4(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(int8 [..., N, K/2], float8_e8m0fnu [..., N, K/32]) -> fp32 [..., N, K], exact.
    Source: spec/v4.md 6.3.
    """
    return unpack_e2m1(packed) * scale_values(scale).repeat_interleave(FP4_BLOCK, -1)


def expand_tiles(scale: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """fp32 [n, k] scale of every element, from one E8M0 scale per 128x128 tile."""
    rows = scale_values(scale).repeat_interleave(FP8_TILE, 0)[:n]
    return rows.repeat_interleave(FP8_TILE, 1)[:, :k]
