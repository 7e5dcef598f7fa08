"""FP8 and FP4 quantisation of activations, real and simulated (spec/v4.md 6.1, 6.2)."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from dsv4_backend.contract import Tolerance, compute, operator

E4M3_MAX = 448.0
E2M1_MAX = 6.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the e2m1 codes 0..7; bit 3 of a code is the sign."""

ACT_FLOOR = 1e-4
FP4_FLOOR = 6 * 2.0**-126
_E2M1_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_EXACT = Tolerance(reason="quantisation rounds once, by rule: every bit is decided")


def scale_bytes(amax: torch.Tensor, largest: float) -> torch.Tensor:
    """E8M0 byte of the smallest power of two s with amax / s <= largest; 255 (NaN) where amax is not finite.

    amax: float, positive and normal after the division. Returns uint8. Exact for every fp32 amax and largest 448 or 6.
    """
    bits = (amax.float() * (1 / largest)).view(torch.int32)
    rounded_up = (bits >> 23 & 255) + (bits & 0x7FFFFF != 0).int()
    return rounded_up.clamp(max=255).to(torch.uint8)


def scale_values(scale: torch.Tensor) -> torch.Tensor:
    """fp32 values of E8M0 scales given as uint8 or float8_e8m0fnu; byte 255 is NaN."""
    return scale.view(torch.float8_e8m0fnu).float()


def split_blocks(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """[..., K] -> [..., ceil(K / block_size), block_size], zeros after the end."""
    padded = pad(x, (0, -x.shape[-1] % block_size))
    return padded.unflatten(-1, (padded.shape[-1] // block_size, block_size))


def block_scale(blocks: torch.Tensor, largest: float, floor: float) -> torch.Tensor:
    """E8M0 bytes uint8 [..., B] of blocks [..., B, block_size] whose amax is floored."""
    return scale_bytes(blocks.abs().amax(-1).float().clamp(min=floor), largest)


def divide_blocks(blocks: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """blocks [..., B, block_size] / scale bytes [..., B] in the accumulation dtype: exact, NaN under a NaN scale."""
    wide = compute(blocks)
    return wide / scale_values(scale).to(wide.dtype).unsqueeze(-1)


def round_e4m3(x: torch.Tensor) -> torch.Tensor:
    """float8_e4m3fn nearest to clamp(x, -448, 448), ties to even; every NaN becomes byte 0x7F."""
    clamped = x.float().clamp(-E4M3_MAX, E4M3_MAX)
    return torch.where(clamped.isnan(), torch.nan, clamped).to(torch.float8_e4m3fn)


def round_e2m1(x: torch.Tensor) -> torch.Tensor:
    """e2m1 codes 0..15 (uint8) nearest to clamp(x, -6, 6), ties to the even code; NaN becomes 0."""
    finite = x.nan_to_num(0.0)
    magnitude = finite.abs()
    code = torch.zeros_like(magnitude, dtype=torch.uint8)
    for i, midpoint in enumerate(_E2M1_MIDPOINTS):
        code = code + ((magnitude > midpoint) if i % 2 == 0 else (magnitude >= midpoint)).to(torch.uint8)
    return code + finite.signbit().to(torch.uint8) * 8


def e2m1_values(codes: torch.Tensor) -> torch.Tensor:
    """fp32 values of e2m1 codes 0..15 of any integer dtype."""
    table = torch.tensor(E2M1_VALUES + tuple(-v for v in E2M1_VALUES), device=codes.device)
    return table[codes.int()]


def _merge(blocks: torch.Tensor, channels: int) -> torch.Tensor:
    return blocks.flatten(-2)[..., :channels].contiguous()


def _straight_through(x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    # x.detach() - x is +0, so the value and the sign of its zeros are those of `rounded`; the gradient is x's.
    return rounded.to(x.dtype) - (x.detach() - x)


@operator(
    "act_quant(Tensor x, int block_size) -> (Tensor q, Tensor scale)",
    rows=(7,),
    arguments={"x": "float [..., K]"},
    tolerance=_EXACT,
)
def act_quant(x: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 quantisation of consecutive blocks of channels with power-of-two scales.

    x: [..., K] float; block_size: 128 for GEMM inputs, 64 for KV rows; the last block may be short.
    Returns q: float8_e4m3fn [..., K], scale: float8_e8m0fnu [..., ceil(K / block_size)]; x is about q * scale.
    amax of a block is floored at 1e-4, scale = 2^ceil(log2(fp32(amax * fp32(1/448)))) through bits, q is x / scale
    rounded to nearest even. NaN or infinity in a block: its scale is byte 0xFF and its q bytes are 0x7F. No gradient.
    Source: spec/v4.md 6.1 [OFF-K].
    """
    blocks = split_blocks(x.detach(), block_size)
    scale = block_scale(blocks, E4M3_MAX, ACT_FLOOR)
    q = round_e4m3(divide_blocks(blocks, scale))
    return _merge(q, x.shape[-1]), scale.view(torch.float8_e8m0fnu)


@operator(
    "act_qdq(Tensor x, int block_size, int channels) -> Tensor",
    rows=(7,),
    arguments={"x": "float [..., K]"},
    tolerance=_EXACT,
)
def act_qdq(x: torch.Tensor, block_size: int, channels: int) -> torch.Tensor:
    """The first `channels` channels after FP8 quantisation and back (`act_quant`), the others unchanged.

    x: [..., K] float; 0 <= channels <= K. KV rows use block 64 on the 448 channels before the RoPE part.
    Returns [..., K] in x's dtype. A block with NaN or infinity becomes NaN. The gradient is straight-through: that of x.
    Source: spec/v4.md 6.1 step 5 [OFF-K].
    """
    blocks = split_blocks(x.detach()[..., :channels], block_size)
    scale = block_scale(blocks, E4M3_MAX, ACT_FLOOR)
    wide = compute(round_e4m3(divide_blocks(blocks, scale))) * scale_values(scale).unsqueeze(-1)
    return torch.cat([_straight_through(x[..., :channels], _merge(wide, channels)), x[..., channels:]], -1)


@operator(
    "fp4_quant(Tensor x, int block_size) -> (Tensor packed, Tensor scale)",
    rows=(8,),
    arguments={"x": "float [..., K]"},
    tolerance=_EXACT,
)
def fp4_quant(x: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """FP4 (e2m1) quantisation of consecutive blocks of channels with power-of-two scales, two codes per byte.

    x: [..., K] float, K even; block_size: 32; the last block may be short.
    Returns packed: int8 [..., K/2], low nibble = even channel, high nibble = odd channel; scale: float8_e8m0fnu
    [..., ceil(K / block_size)]. amax is floored at 6 * 2^-126, scale = 2^ceil(log2(fp32(amax * fp32(1/6)))) through
    bits, the code is x / scale rounded to nearest, ties to the even code; bit 3 is the sign, also of zero.
    NaN or infinity in a block: its scale is byte 0xFF and its codes are 0. No gradient. Source: spec/v4.md 6.2 [OFF-K].
    """
    blocks = split_blocks(x.detach(), block_size)
    scale = block_scale(blocks, E2M1_MAX, FP4_FLOOR)
    codes = _merge(round_e2m1(divide_blocks(blocks, scale)), x.shape[-1])
    return pack_nibbles(codes), scale.view(torch.float8_e8m0fnu)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes 0..15 [..., K] -> int8 [..., K/2], even channels in the low nibbles."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).view(torch.int8)


@operator(
    "fp4_qdq(Tensor x, int block_size) -> Tensor",
    rows=(8,),
    arguments={"x": "float [..., K]"},
    tolerance=_EXACT,
)
def fp4_qdq(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """x after FP4 quantisation and back (`fp4_quant`).

    x: [..., K] float, K of either parity; block_size: 32. Indexer queries and keys, after the Hadamard rotation.
    Returns [..., K] in x's dtype. A block with NaN or infinity becomes NaN. The gradient is straight-through: that of x.
    Source: spec/v4.md 6.2 [OFF-K].
    """
    blocks = split_blocks(x.detach(), block_size)
    scale = block_scale(blocks, E2M1_MAX, FP4_FLOOR)
    wide = e2m1_values(round_e2m1(divide_blocks(blocks, scale))) * scale_values(scale).unsqueeze(-1)
    return _straight_through(x, _merge(wide, x.shape[-1]))


@act_quant.shapes
@fp4_qdq.shapes
def _(x: torch.Tensor, block_size: int) -> None:
    if block_size < 1:
        raise act_quant.reject("block_size", block_size, "at least 1")
