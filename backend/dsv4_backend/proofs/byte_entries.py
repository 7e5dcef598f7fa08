"""The byte formats of spec 6.5 a second time: bytes of one entry and where they lie on a page.
No torch, no `ops`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dsv4_backend.proofs.numerics import BF16, E2M1, E4M3, E8M0, Array, fp4_values, wide

Pieces = tuple[Array, ...]


@dataclass(frozen=True)
class Entry:
    """One format for rows of some width: bytes of its pieces,
    where they start on a page, and the two directions.

    start: (entries per page, entry) -> first byte of every piece. encode: fp32 [channels] -> the
    pieces, uint8.
    decode: the pieces -> fp32 [channels].
    """

    widths: tuple[int, ...]
    start: Callable[[int, int], tuple[int, ...]]
    encode: Callable[[Array], Pieces]
    decode: Callable[[Pieces], Array]


def write_entry(entry: Entry, page: Array, block_size: int, index: int, row: Array) -> None:
    """Put the bytes of `row` at `index` of a page, uint8 [page_bytes], in place."""
    for start, piece in zip(
        entry.start(block_size, index), entry.encode(row.astype(np.float32)), strict=True
    ):
        page[start : start + len(piece)] = piece


def read_entry(entry: Entry, page: Array, block_size: int, index: int) -> Array:
    """The row at `index` of a page, fp32 values in float64."""
    starts = entry.start(block_size, index)
    pieces = tuple(page[a : a + n].copy() for a, n in zip(starts, entry.widths, strict=True))
    return wide(entry.decode(pieces))


def _exponent(amax: np.float32, floor: float, largest: float) -> int:
    """Exponent of the scale 2^e by the bits
    of the fp32 product amax * fp32(1 / largest) (6.1, 6.2).
    """
    v = np.float32(max(amax, np.float32(floor)) * np.float32(1 / largest))
    bits = int(v.view(np.uint32))
    return (bits >> 23) - 127 + (bits & 0x7FFFFF != 0)


def _e4m3_block(block: Array) -> tuple[Array, int | None]:
    """(codes, e) of one block of act_quant (6.1); e is None where the block is not finite."""
    if not np.isfinite(block).all():
        return np.full(len(block), 0x7F, np.uint8), None
    e = _exponent(np.abs(block).max(), 1e-4, 448)
    scaled = np.clip(np.ldexp(wide(block), -e), -448, 448)
    return scaled.astype(np.float32).astype(E4M3).view(np.uint8), e


def _e8m0(e: int | None) -> int:
    return 0xFF if e is None else e + 127


def _blocks(row: Array, size: int) -> list[Array]:
    return [row[i : i + size] for i in range(0, len(row), size)]


def _encode_latent(row: Array, rope: int) -> Pieces:
    """Channels before RoPE in e4m3, RoPE in bf16, a scale byte for each 64 of the former."""
    nope, rotated = row[: len(row) - rope], row[len(row) - rope :]
    codes, exponents = zip(*(_e4m3_block(block) for block in _blocks(nope, 64)), strict=True)
    scales = np.array([_e8m0(e) for e in exponents], np.uint8)
    rotated = np.where(np.isnan(rotated), np.float32(np.nan), rotated)
    return np.concatenate(codes), rotated.astype(BF16).view(np.uint8), scales


def _decode_latent(pieces: Pieces) -> Array:
    codes, rope, scales = pieces
    scale = np.repeat(scales.view(E8M0).astype(np.float32), 64)[: len(codes)]
    return np.concatenate(
        [codes.view(E4M3).astype(np.float32) * scale, rope.view(BF16).astype(np.float32)]
    )


def _encode_epilog(row: Array, rope: int) -> Pieces:
    """As `_encode_latent`, but each scale in bf16: a power of two, whose bits are an exponent."""
    codes, rotated, bytes_ = _encode_latent(row, rope)
    scales = [0x7FC0 if byte == 0xFF else int(byte) << 7 for byte in bytes_]
    return codes, rotated, np.array(scales, np.uint16).view(np.uint8)


def _decode_epilog(pieces: Pieces) -> Array:
    codes, rope, scales = pieces[:3]
    values = codes.view(E4M3).astype(np.float32)
    for tile, scale in enumerate(scales.view(BF16).astype(np.float32)):
        values[64 * tile : 64 * tile + 64] *= scale
    return np.concatenate([values, rope.view(BF16).astype(np.float32)])


def _encode_fp8(row: Array) -> Pieces:
    codes, e = _e4m3_block(row)
    return codes, np.array([np.nan if e is None else np.ldexp(1.0, e)], np.float32).view(np.uint8)


def _encode_token_fp8(row: Array) -> Pieces:
    """The scale is amax / 448 by the reciprocals that kernels multiply with;
    values that are not finite do not count, and keep no number.
    """
    known = np.isfinite(row)
    amax = max((abs(value) for value in row[known]), default=np.float32(0))
    scale = np.float32(amax * np.float32(1 / 448))
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        scaled = row * (np.float32(1) / scale)
        scaled = np.where(np.isfinite(scaled), scaled, row)
        codes = np.clip(scaled, -448, 448).astype(E4M3).view(np.uint8)
    return np.where(known, codes, 0x7F).astype(np.uint8), scale.reshape(1).view(np.uint8)


def _decode_fp8(pieces: Pieces) -> Array:
    codes, scale = pieces
    return np.asarray(codes.view(E4M3).astype(np.float32) * scale.view(np.float32))


def _e2m1_block(block: Array) -> tuple[Array, int | None]:
    """(codes, e) of one block of 6.2; codes 0 where the block is not finite."""
    if not np.isfinite(block).all():
        return np.zeros(len(block), np.uint8), None
    e = _exponent(np.abs(block).max(), 6 * 2.0**-126, 6)
    scaled = np.clip(np.ldexp(wide(block), -e), -6, 6)
    return scaled.astype(np.float32).astype(E2M1).view(np.uint8), e


def _encode_mxfp4(row: Array) -> Pieces:
    codes, exponents = zip(*(_e2m1_block(block) for block in _blocks(row, 32)), strict=True)
    low, high = np.concatenate(codes).reshape(-1, 2).T
    return low | high << 4, np.array([_e8m0(e) for e in exponents], np.uint8)


def _decode_mxfp4(pieces: Pieces) -> Array:
    packed, scales = pieces
    values = fp4_values(packed).astype(np.float32)
    return np.asarray(values * np.repeat(scales.view(E8M0).astype(np.float32), 32)[: len(values)])


def _encode_int8(row: Array) -> Pieces:
    """The scale is amax / 127; a row of zeros has none, a row that is not finite an unknown one."""
    if not np.isfinite(row).all():
        return np.zeros(len(row), np.uint8), np.array([np.nan], np.float16).view(np.uint8)
    scale = np.float32(np.abs(row).max() / np.float32(127))
    steps = np.clip(np.rint(row / scale), -127, 127) if scale else np.zeros(len(row))
    stored = np.array([min(scale, np.float32(65504))], np.float16)
    return steps.astype(np.int8).view(np.uint8), stored.view(np.uint8)


def _decode_int8(pieces: Pieces) -> Array:
    steps, scale = pieces
    return np.asarray(
        steps.view(np.int8).astype(np.float32) * scale.view(np.float16).astype(np.float32)
    )


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _mla(channels: int, rope: int) -> Entry:
    """All entries' values, then all entries' scales, 8 bytes of them or a multiple."""
    nope = channels - rope
    values, tiles = nope + 2 * rope, _up(nope, 64) // 64
    scales = _up(tiles, 8)
    return Entry(
        (nope, 2 * rope, tiles),
        lambda n, i: (values * i, values * i + nope, values * n + scales * i),
        lambda row: _encode_latent(row, rope),
        _decode_latent,
    )


def _a5(channels: int, rope: int) -> Entry:
    """Whole entries of a multiple of 128 bytes, RoPE channels first."""
    nope = channels - rope
    tiles = _up(nope, 64) // 64
    width = _up(2 * rope + nope + tiles, 128)
    return Entry(
        (nope, 2 * rope, tiles),
        lambda n, i: (width * i + 2 * rope, width * i, width * i + 2 * rope + nope),
        lambda row: _encode_latent(row, rope),
        _decode_latent,
    )


def _epilog(channels: int, rope: int) -> Entry:
    """Whole entries, RoPE channels first; zeros up to a multiple of 32 bytes are written too."""
    nope = channels - rope
    tiles = _up(nope, 64) // 64
    used = 2 * rope + nope + 2 * tiles
    filling = np.zeros(_up(used, 32) - used, np.uint8)

    def start(_: int, i: int) -> tuple[int, ...]:
        first = _up(used, 32) * i
        return first + 2 * rope, first, first + 2 * rope + nope, first + used

    return Entry(
        (nope, 2 * rope, 2 * tiles, len(filling)),
        start,
        lambda row: (*_encode_epilog(row, rope), filling),
        _decode_epilog,
    )


Encode = Callable[[Array], Pieces]
Decode = Callable[[Pieces], Array]


def _values_then_scales(values: int, scales: int, encode: Encode, decode: Decode) -> Entry:
    return Entry(
        (values, scales), lambda n, i: (values * i, values * n + scales * i), encode, decode
    )


ENTRIES: dict[str, Callable[[int, int], Entry]] = {
    "fp8_ds_mla": _mla,
    "indexer_fp8": lambda channels, _: _values_then_scales(channels, 4, _encode_fp8, _decode_fp8),
    "indexer_token_fp8": lambda channels, _: _values_then_scales(
        channels, 4, _encode_token_fp8, _decode_fp8
    ),
    "indexer_mxfp4": lambda channels, _: _values_then_scales(
        channels // 2, _up(channels, 32) // 32, _encode_mxfp4, _decode_mxfp4
    ),
    "indexer_int8": lambda channels, _: _values_then_scales(
        channels, 2, _encode_int8, _decode_int8
    ),
    "a5": _a5,
    "kv_epilog": _epilog,
}
"""Name -> (channels, of which RoPE) -> the format of such rows."""
