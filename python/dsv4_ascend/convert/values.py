"""The values of stored weights, some rows at a time, whatever their format."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dsv4_ascend.checkpoint.folder import Checkpoint
from dsv4_ascend.checkpoint.layout import FP8_TILE
from dsv4_ascend.weights.formats import widened
from dsv4_ascend.weights.storage import kept

_CHUNK = 1 << 25
"""Values that are widened at once: whole rows, a multiple of an FP8 tile's."""


_NOT_FINITE = {torch.float8_e4m3fn: (0x7F, 0x7F), torch.float8_e8m0fnu: (0xFF, 0xFF)}
"""Of byte formats: mask and value of what is NaN."""


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; codes of integers and of FP4 are all finite."""
    if values.dtype in _NOT_FINITE:
        mask, nan = _NOT_FINITE[values.dtype]
        return not bool((values.contiguous().view(torch.uint8) & mask == nan).any())
    return not values.is_floating_point() or bool(values.isfinite().all())


def row_steps(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """(first, last) of runs of rows that are widened together."""
    step = max(FP8_TILE, _CHUNK // max(1, columns) // FP8_TILE * FP8_TILE)
    return ((first, min(first + step, rows)) for first in range(0, rows, step))


def scale_rows(scale: torch.Tensor | None, rows: int, first: int, last: int) -> torch.Tensor | None:
    """The scales of some rows: one for each, or one for each tile of them."""
    if scale is None:
        return None
    per = 1 if scale.shape[0] == rows else FP8_TILE
    return scale[first // per : -(-last // per)]


def values_of(checkpoint: Checkpoint, name: str) -> Iterator[torch.Tensor]:
    """fp32 rows of a tensor, one run after the other; pages are given back behind them."""
    entry = checkpoint.layout[name]
    if entry.scale_name is None:
        tensor = checkpoint.stored(name)
        flat = tensor.reshape(-1)
        for first in range(0, max(1, len(flat)), _CHUNK):
            yield flat[first : first + _CHUNK].float()
            checkpoint.release(name)
        return
    weight, scale = checkpoint.tensor(name), checkpoint.scale(name)
    rows, columns = entry.shape
    packed = rows // weight.shape[0]
    for first, last in row_steps(rows, columns):
        some, of = weight[first // packed : last // packed], scale_rows(scale, rows, first, last)
        if of is None:
            yield some.float()
        elif entry.kind is None:
            yield widened(some, of)
        else:
            yield kept(entry.kind, some, of).values(torch.float32)
        checkpoint.release(name)
    if entry.scale_name in checkpoint:
        checkpoint.release(entry.scale_name)
