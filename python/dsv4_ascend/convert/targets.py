"""What a checkpoint can be converted to, and how one weight of it becomes what is stored there.

The rules of rounding are those of `weights/storage.py`, which loading an official folder in a
profile uses too: here is only what they are called and how their results lie in a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dsv4_ascend.checkpoint.folder import Checkpoint
from dsv4_ascend.checkpoint.kinds import BIAS, MXFP4, MXFP8, OFFSET, W4A8, W8A8, Kind
from dsv4_ascend.checkpoint.layout import FP4_BLOCK, FP8, FP8_TILE, SCALE, Entry
from dsv4_ascend.checkpoint.safetensors_file import stored_bytes
from dsv4_ascend.convert.values import row_steps, scale_rows
from dsv4_ascend.weights.formats import EXPERTS, WEIGHTS, ExpertWeights, Stored, as_stored
from dsv4_ascend.weights.storage import (
    BF16_STORAGE,
    INT4_STORAGE,
    INT8_STORAGE,
    MX_STORAGE,
    OFFICIAL_STORAGE,
    Convert,
    Storage,
    experts_to_bf16,
    experts_to_int4,
    experts_to_int8,
    experts_to_mx,
    to_bf16,
    to_int8,
    to_mx8,
)
from dsv4_backend.errors import ArgumentError
from dsv4_backend.ops.int8 import pack_int4

BIAS_PARTS = 16
"""Columns of w2's `scale_bias`, sums over as many parts of its inputs, so that ranks can share
them.
"""
_BIAS_FACTOR = 8


_LINEARS: dict[Convert, Kind] = {to_int8: W8A8, to_mx8: MXFP8}
_EXPERTS: dict[Callable[[ExpertWeights], ExpertWeights], Kind] = {
    experts_to_int8: W8A8,
    experts_to_int4: W4A8,
    experts_to_mx: MXFP4,
}
"""Rules of rounding -> how their results are stored."""


class Part(NamedTuple):
    """A tensor of a converted weight: its stored name, dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return stored_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class Target:
    """A format of folders. storage: into which formats its weights are put; described: the
    `model_quant_type` of its description, None where it has none.
    """

    name: str
    storage: Storage
    described: str | None = None

    def kind(self, name: str, entry: Entry, stored: str) -> Kind | None:
        """How a weight that lies in the source as `stored` is kept; None for floats and official
        forms.
        """
        if entry.scale_name is None:
            return None
        if not _is_expert(name):
            return _LINEARS.get(self.storage.linear(_path(name)))
        kind = _EXPERTS.get(self.storage.experts)
        wide = stored == FP8 or entry.shape[1] % FP4_BLOCK
        return MXFP8 if kind is MXFP4 and wide else kind

    def parts(self, name: str, entry: Entry, stored: Part) -> list[Part]:
        """What becomes of a tensor that lies in the source as `stored`, in `convert`'s order."""
        kind, shape = self.kind(name, entry, stored.dtype), entry.shape
        if entry.scale_name is None:
            return [stored]
        if kind is not None:
            return list(_kind_parts(name, kind, shape))
        rule = self.storage.experts if _is_expert(name) else self.storage.linear(_path(name))
        if rule in (to_bf16, experts_to_bf16):
            return [Part(name, "BF16", shape)]
        return list(_official_parts(name, entry, stored.dtype))

    def convert(self, checkpoint: Checkpoint, name: str) -> Iterator[tuple[int, int, torch.Tensor]]:
        """The values of `parts`, some rows at a time: (number of the part, first row, its rows)."""
        entry = checkpoint.layout[name]
        if entry.scale_name is None:
            yield 0, 0, checkpoint.stored(name)
            return
        weight, scale = checkpoint.tensor(name), checkpoint.scale(name)
        kind = self.kind(name, entry, checkpoint.source(name).dtype)
        rows, columns = entry.shape
        for first, last in row_steps(rows, columns):
            made = self._made(name, weight[first:last], scale_rows(scale, rows, first, last))
            for number, tensor in enumerate(_laid_out(name, kind, made)):
                whole = 1 if tensor.shape[0] == last - first else 2 if kind else FP8_TILE
                yield number, first // whole, tensor

    def _made(self, name: str, weight: torch.Tensor, scale: torch.Tensor | None) -> Stored:
        if not _is_expert(name):
            return self.storage.linear(_path(name))(as_stored(WEIGHTS, weight, scale))
        one = as_stored(EXPERTS, weight[None], None if scale is None else scale[None])
        found = self.storage.experts(one)
        return Stored(found.weight[0], None if found.scale is None else found.scale[0])


def _laid_out(name: str, kind: Kind | None, made: Stored) -> Iterator[torch.Tensor]:
    """The stored tensors of a converted weight."""
    yield pack_int4(made.weight) if kind is W4A8 else made.weight
    if made.scale is None:
        return
    if kind is None or kind.block:
        yield made.scale
        return
    yield made.scale.unsqueeze(-1)
    yield torch.zeros(made.scale.shape[0], 1)
    if kind.bias:
        terms = made.weight.float() * made.scale.unsqueeze(-1) * _BIAS_FACTOR
        columns = BIAS_PARTS if ".w2." in name else 1
        parts = torch.zeros(terms.shape[0], columns)
        if terms.shape[1] % columns:
            parts[:, 0] = terms.sum(1)
        else:
            parts = terms.unflatten(1, (columns, -1)).sum(2)
        yield parts


def _kind_parts(name: str, kind: Kind, shape: tuple[int, ...]) -> Iterator[Part]:
    """The tensors that msModelSlim stores of a weight."""
    stem = _path(name)
    dtype = "U8" if kind is MXFP4 else kind.dtypes[0]
    yield Part(name, dtype, kind.stored_shape(shape))
    yield Part(f"{name}_scale", "U8" if kind.block else "F32", kind.scale_shape(shape))
    if not kind.block:
        yield Part(stem + OFFSET, "F32", (shape[0], 1))
    if kind.bias:
        yield Part(stem + BIAS, "F32", (shape[0], BIAS_PARTS if ".w2." in name else 1))


def _official_parts(name: str, entry: Entry, stored: str) -> Iterator[Part]:
    """A weight in FP8, or FP4 for experts whose inputs fill blocks."""
    assert entry.scale_name is not None
    fp4 = _is_expert(name) and entry.shape[1] % FP4_BLOCK == 0
    if stored == FP8:
        fp4 = False
    dtype = "I8" if fp4 else FP8
    yield Part(name, dtype, entry.stored_shape(dtype))
    scale = entry.scale_shape(dtype)
    assert scale is not None
    yield Part(entry.scale_name, SCALE[0], scale)


def _is_expert(name: str) -> bool:
    return ".ffn.experts." in name


def _path(name: str) -> str:
    return name.removesuffix(".weight")


TARGETS = {
    target.name: target
    for target in (
        Target("a2a3-int8", INT8_STORAGE, W8A8.name),
        Target("a2a3-w4a8", INT4_STORAGE, W4A8.name),
        Target("a5-mx", MX_STORAGE, MXFP4.name),
        Target("bf16", BF16_STORAGE),
        Target("official", OFFICIAL_STORAGE),
    )
}


def target_named(name: str) -> Target:
    """The target of that name; ArgumentError names those there are."""
    if name not in TARGETS:
        raise ArgumentError(f"--target: found {name!r:.40}, expected {', '.join(TARGETS)}")
    return TARGETS[name]
