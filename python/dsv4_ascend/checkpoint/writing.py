"""What every writer of a checkpoint's files shares: the beginning of a safetensors file, names,
the index, and having names on the disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from dsv4_ascend.checkpoint.safetensors_file import DTYPES, stored_bytes

_ALIGNMENT = 64
_METADATA = {"format": "pt"}


def file_start(
    tensors: Iterable[tuple[str, str, Iterable[int]]], metadata: Mapping[str, str] = _METADATA
) -> tuple[bytes, dict[str, int]]:
    """What a file of these (name, safetensors dtype, shape) begins with, and where in the file each
    tensor begins, in the order in which they lie.

    Wide elements come first, so that every tensor is aligned without holes, which the format
    forbids; those of one width keep their order.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    begins, position = {}, 0
    for name, dtype, shape in sorted(tensors, key=lambda tensor: -DTYPES[tensor[1]][0]):
        begins[name], sizes = position, list(shape)
        position += stored_bytes(dtype, sizes)
        offsets = [begins[name], position]
        header[name] = {"dtype": dtype, "shape": sizes, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    start = len(text).to_bytes(8, "little") + text
    return start, {name: len(start) + begin for name, begin in begins.items()}


def shard_file(number: int, count: int) -> str:
    """The name of shard `number` of `count`, from 1."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def index_of(files: Mapping[str, str], nbytes: int) -> dict[str, object]:
    """The index of a folder. files: tensor -> its file; nbytes: of all tensors."""
    return {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(files.items()))}


def as_json(value: object) -> bytes:
    """The text of a file."""
    return (json.dumps(value, indent=2) + "\n").encode()


def sync(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
