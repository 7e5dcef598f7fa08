"""Proof of MX-FP4 weights in tiles (spec/deployments.md 3): cases, oracles, faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from dsv4_backend.contract import Case, Draw
from dsv4_backend.faults import on_bytes
from dsv4_backend.ops.mx_tiles import mxfp4_tiled_grouped_gemm, pack_mxfp4
from dsv4_backend.ops.quant import quantize_weight_fp4
from dsv4_backend.proofs.by_expert import WRONG_OFFSETS, explain_experts, joined, offsets_of
from dsv4_backend.proofs.mx import (
    PROFILE,
    SCALE_EDITS,
    expert_stack,
    rows_of,
    sum_of_blocks,
)
from dsv4_backend.proofs.numerics import Array, fp4_values
from dsv4_backend.proofs.rounding_rows import NO_257TH_CODE, WHOLE, whole_fp4, whole_fp8

Edit = Callable[[torch.Tensor], torch.Tensor]


@pack_mxfp4.oracle
def _(weight: Array) -> Array:
    count, n, size = weight.shape
    tiles = np.empty((count, size // 16, n // 16, 16, 16), np.int8)
    for row in range(n):
        for byte in range(size):
            tiles[:, byte // 16, row // 16, row % 16, byte % 16] = weight[:, row, byte]
    return tiles


def in_rows(tiles: Array) -> Array:
    """int8 [N, K/2] of one expert's tiles."""
    row, byte = np.arange(16 * tiles.shape[1])[:, None], np.arange(16 * tiles.shape[0])
    return np.asarray(tiles[byte // 16, row // 16, row % 16, byte % 16])


@mxfp4_tiled_grouped_gemm.oracle
def _(x: Array, x_scale: Array, weight: Array, weight_scale: Array, offsets: Array) -> Array:
    def expert(e: int, rows: slice) -> Array:
        codes = fp4_values(in_rows(weight[e]))
        return sum_of_blocks(x[rows], x_scale[rows], codes, weight_scale[e])

    return joined(offsets, expert)


@pack_mxfp4.cases
def _(draw: Draw) -> Iterator[Case]:
    for count, n, k in ((0, 32, 64), (1, 16, 32), (3, 48, 96), (2, 32, 128), (1, 160, 352)):
        weight = draw.bytes(count, n, k // 2).view(torch.int8)
        yield Case(f"{count}x{n}x{k}", PROFILE, (weight,))
    turned = draw.bytes(2, 48, 32).view(torch.int8).transpose(1, 2)
    yield Case("strided", PROFILE, (turned,))
    yield Case("experts apart", PROFILE, (draw.bytes(6, 32, 48).view(torch.int8)[::2],))


# Rows of every expert, N, K.
_GROUPS: tuple[tuple[tuple[int, ...], int, int], ...] = (
    ((0, 0, 0), 16, 64),
    ((0,), 16, 32),
    ((1,), 32, 32),
    ((0, 3, 0, 0, 5, 1, 0, 2), 96, 192),
    ((4, 1, 7), 48, 384),
    ((2, 2, 2), 64, 1024),
)


@mxfp4_tiled_grouped_gemm.cases
def _(draw: Draw) -> Iterator[Case]:
    def tiled(count: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scales = expert_stack(draw, quantize_weight_fp4, count, n, k)
        return pack_mxfp4.reference(codes), scales

    for rows, n, k in _GROUPS:
        arguments = (*rows_of(draw, sum(rows), k), *tiled(len(rows), n, k), offsets_of(*rows))
        yield Case(f"{rows} {n}x{k}", PROFILE, arguments)
    x, x_scale = rows_of(draw, 8, 256)
    weight, scale = tiled(2, 64, 256)
    apart = weight.repeat_interleave(2, 0)[::2]
    yield Case("strided", PROFILE, (x[::2], x_scale[::2], apart, scale, offsets_of(1, 3)))
    broken = scale.clone()
    broken[1] = torch.nan
    yield Case("NaN scales of one expert", PROFILE, (x, x_scale, weight, broken, offsets_of(5, 3)))
    codes, scale = whole_fp4(draw, 3, 48, 64)
    arguments = (*whole_fp8(draw, 7, 64), pack_mxfp4.reference(codes), scale, offsets_of(4, 0, 3))
    yield Case(WHOLE, PROFILE, arguments, decided=True)


def _tiles_exchanged(tiles: torch.Tensor) -> torch.Tensor:
    return tiles.transpose(1, 2).reshape(tiles.shape)


_WRONG_TILES: dict[str, Edit] = {
    "tiles row by row": _tiles_exchanged,
    "rows and bytes of a tile exchanged": lambda tiles: tiles.transpose(3, 4).contiguous(),
    "the next expert": lambda tiles: tiles.roll(-1, 0),
    "the next tile of rows": lambda tiles: tiles.roll(-1, 2),
    "the next tile of channels": lambda tiles: tiles.roll(-1, 1),
    "rows of tiles reversed": lambda tiles: tiles.flip(3),
    "nibbles swapped": on_bytes(lambda b: b << 4 | b >> 4),
}
pack_mxfp4.wrong_results(
    {name: lambda a, y, edit=edit: edit(y) for name, edit in _WRONG_TILES.items()}
)
pack_mxfp4.wrong_results({"left as it lies": lambda a, y: a.weight.reshape(y.shape)})
pack_mxfp4.no_output_fault("one NaN", "packed codes are integers")
mxfp4_tiled_grouped_gemm.wrong_arguments(
    {f"weight: {name}": {"weight": edit} for name, edit in _WRONG_TILES.items()}
)
mxfp4_tiled_grouped_gemm.wrong_arguments(
    {
        f"{of} scales {name}": {f"{of}_scale": edit}
        for of in ("x", "weight")
        for name, edit in SCALE_EDITS.items()
    }
)
mxfp4_tiled_grouped_gemm.wrong_arguments(WRONG_OFFSETS)
explain_experts(mxfp4_tiled_grouped_gemm)
mxfp4_tiled_grouped_gemm.equivalent(*NO_257TH_CODE)
