"""Number formats of V4's quantisation: E8M0 scales,
e4m3 and e2m1 values, blocks (spec/v4.md 6.1, 6.2).
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from dsv4_backend.contract import compute

E4M3_MAX = 448.0
E2M1_MAX = 6.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the e2m1 codes 0..7; bit 3 of a code is the sign."""
E2M1_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Between codes i and i + 1; a value there takes the even code."""


def scale_bytes(amax: torch.Tensor, largest: float) -> torch.Tensor:
    """E8M0 byte of the smallest power of two s with amax / s <= largest;
    255 (NaN) where amax is not finite.

    amax: float, positive and normal after the division. Returns uint8. Exact for every fp32 amax
    and largest 448 or 6.
    """
    bits = (amax.float() * (1 / largest)).view(torch.int32)
    rounded_up = (bits >> 23 & 255) + (bits & 0x7FFFFF != 0).int()
    return rounded_up.clamp(max=255).to(torch.uint8)


def scale_values(scale: torch.Tensor) -> torch.Tensor:
    """fp32 values of E8M0 scales given as uint8 or float8_e8m0fnu; byte 255 is NaN."""
    return scale.view(torch.float8_e8m0fnu).float()


def split_blocks(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """[..., K] -> [..., ceil(K / block_size), min(K, block_size)], zeros after the end."""
    width = min(block_size, max(x.shape[-1], 1))
    # Contiguous first: traced padding by nothing is contiguous, real padding keeps the strides.
    padded = pad(x.contiguous(), (0, -x.shape[-1] % width))
    return padded.reshape(*x.shape[:-1], padded.shape[-1] // width, width)


def block_scale(blocks: torch.Tensor, largest: float, floor: float) -> torch.Tensor:
    """E8M0 bytes uint8 [..., B] of blocks [..., B, block_size] whose amax is floored."""
    return scale_bytes(blocks.abs().amax(-1).float().clamp(min=floor), largest)


def divide_blocks(blocks: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Blocks [..., B, block_size] / scale bytes [..., B] in the accumulation dtype: exact,
    NaN under a NaN scale.
    """
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
    for i, midpoint in enumerate(E2M1_MIDPOINTS):
        code = code + ((magnitude > midpoint) if i % 2 == 0 else (magnitude >= midpoint)).to(
            torch.uint8
        )
    return code + finite.signbit().to(torch.uint8) * 8


def e4m3_values(q: torch.Tensor) -> torch.Tensor:
    """fp32 values of float8_e4m3fn q, any shape."""
    # Torch's cast takes five times as long as this table.
    table = torch.arange(256, dtype=torch.uint8, device=q.device).view(torch.float8_e4m3fn).float()
    return _look_up(table, q.view(torch.uint8))


def e2m1_values(codes: torch.Tensor) -> torch.Tensor:
    """fp32 values of e2m1 codes 0..15 of any integer dtype."""
    table = torch.tensor(E2M1_VALUES + tuple(-v for v in E2M1_VALUES), device=codes.device)
    return _look_up(table, codes)


def _look_up(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return table.index_select(0, index.flatten().int()).view(index.shape)


def pack_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes 0..15 [..., K] -> int8 [..., K/2], even channels in the low nibbles."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).view(torch.int8)


def unpack_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """int8 [..., K/2] -> fp32 e2m1 values [..., K], low nibble first."""
    both = packed.view(torch.uint8)
    return e2m1_values(torch.stack([both & 15, both >> 4], -1)).flatten(-2)
