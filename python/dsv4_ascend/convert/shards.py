"""The shards of a converted folder: which tensors, at which bytes, and writing one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from dsv4_ascend.checkpoint.folder import Checkpoint
from dsv4_ascend.checkpoint.kinds import BIAS, OFFSET
from dsv4_ascend.checkpoint.safetensors_file import SafetensorsFile, checkpoint_error
from dsv4_ascend.checkpoint.safetensors_stream import data_of
from dsv4_ascend.checkpoint.sources import Source
from dsv4_ascend.checkpoint.writing import file_start, shard_file
from dsv4_ascend.convert.folders import atomic, write_at
from dsv4_ascend.convert.targets import Part, Target
from dsv4_ascend.convert.values import all_finite

_PIECE = 1 << 27
"""Bytes that are looked at and copied before their pages are given back."""


class Item(NamedTuple):
    """A tensor of the source, by official name, and what becomes of it."""

    name: str
    parts: list[Part]


@dataclass(frozen=True)
class Shard:
    """A file of the target; made of one of the source, in the order of that."""

    file: str
    items: list[Item]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(part.nbytes for part in self.parts())

    def is_whole(self, folder: Path) -> bool:
        """Whether its file is there, of its full length."""
        length = len(file_start(self.parts())[0]) + self.nbytes
        path = folder / self.file
        return path.is_file() and path.stat().st_size == length

    def parts(self) -> Iterator[Part]:
        """All its tensors."""
        return (part for item in self.items for part in item.parts)


def shards_of(checkpoint: Checkpoint, target: Target) -> list[Shard]:
    """A shard for every file of the source that has a weight."""
    found: dict[SafetensorsFile, list[tuple[int, Item]]] = {}
    for name in checkpoint.names():
        entry = checkpoint.layout.get(name)
        if entry is None:
            continue  # a scale, which goes with its weight
        source = checkpoint.source(name)
        item = Item(name, target.parts(name, entry, _part(name, source)))
        found.setdefault(source.file, []).append((source.begin, item))
    for name, source in checkpoint.aside.items():
        if not name.endswith((OFFSET, BIAS)):
            item = Item(name, [_part(name, source)])
            found.setdefault(source.file, []).append((source.begin, item))
    files = sorted(found, key=lambda file: file.path.name)
    return [
        Shard(
            shard_file(number, len(files)),
            [item for _, item in sorted(found[file], key=lambda pair: pair[0])],
        )
        for number, file in enumerate(files, 1)
    ]


def _part(name: str, source: Source) -> Part:
    return Part(name, source.dtype, source.shape)


def write_shard(folder: Path, shard: Shard, checkpoint: Checkpoint, target: Target) -> None:
    """Write one shard in the memory of a tensor's rows.

    CheckpointError that names the tensor of the source for values that are not finite.
    """
    start, begins = file_start(shard.parts())
    with atomic(folder / shard.file) as descriptor:
        write_at(descriptor, 0, start)
        for item in shard.items:
            aside = checkpoint.aside.get(item.name)
            if aside is not None:
                write_at(descriptor, begins[item.name], data_of(aside.tensor()))
                aside.release()
                continue
            for number, first, rows in target.convert(checkpoint, item.name):
                part = item.parts[number]
                row = part.nbytes // part.shape[0] if part.shape else 0
                place = begins[part.name] + first * row
                for piece in _pieces(rows):
                    if not all_finite(piece):
                        what = f"found values that are not finite as {part.dtype}, expected none"
                        where = checkpoint.source(item.name).describe(item.name)
                        raise checkpoint_error(checkpoint.path, [f"{where}: {what}"])
                    data = data_of(piece)
                    write_at(descriptor, place, data)
                    place += len(data)
                    checkpoint.release(item.name)
            _release(checkpoint, item.name)


def _pieces(rows: torch.Tensor) -> Sequence[torch.Tensor]:
    """The rows, so many at a time as are looked at and copied before their pages are given back."""
    if not rows.numel():
        return [rows]
    return rows.split(max(1, _PIECE // rows[0].nbytes)) if rows.dim() else [rows]


def _release(checkpoint: Checkpoint, name: str) -> None:
    checkpoint.release(name)
    scale = checkpoint.layout[name].scale_name
    if scale is not None and scale in checkpoint:
        checkpoint.release(scale)
