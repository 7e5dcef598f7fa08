"""Writing an official-layout folder: config.json,
safetensors shards and their index, all or nothing.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path

import torch

from dsv4_ascend.checkpoint.config import V4Config
from dsv4_ascend.checkpoint.config_file import CONFIG, config_to_dict
from dsv4_ascend.checkpoint.folder import open_checkpoint
from dsv4_ascend.checkpoint.safetensors_file import checkpoint_error
from dsv4_ascend.checkpoint.safetensors_stream import STORED, data_of
from dsv4_ascend.checkpoint.shards import INDEX
from dsv4_ascend.checkpoint.writing import as_json, file_start, index_of, shard_file, sync

SHARD_BYTES = 4 * 2**30


def save_checkpoint(
    folder: str | Path,
    config: V4Config,
    tensors: Mapping[str, torch.Tensor],
    *,
    files: Mapping[str, bytes] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a checkpoint under official names; the same tensors always give the same bytes.

    `tensors`: official name -> tensor with the dtypes of `layout` (FP4 packed int8, E8M0 scales);
    read one at a time. `files`: more files of the folder (tokenizer.json ...). Everything is
    written beside `folder`, synced, reopened by the strict reader and renamed: a killed run leaves
    no `folder`. CheckpointError if `folder` exists and is not empty, if the tensors do not fit the
    configuration, or if the disk refuses.
    """
    target = Path(folder).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise checkpoint_error(
            target, ["found something there already, expected a new or empty folder"]
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise checkpoint_error(target, [f"cannot be written ({error})"]) from None
    try:
        _write_folder(scratch, config, tensors, files or {}, shard_bytes)
        _same_model(target, open_checkpoint(scratch).config, config)
        os.chmod(scratch, 0o755)
        os.rename(scratch, target)
        sync(target.parent)
    except OSError as error:
        raise checkpoint_error(target, [f"cannot be written ({error})"]) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _same_model(target: Path, written: V4Config, wanted: V4Config) -> None:
    """What the tensors decide on (drafts, formats) must be what the configuration says."""
    pairs = {name: (getattr(written, name), value) for name, value in vars(wanted).items()}
    lines = [f"{name}: found {found} by the tensors, expected {value} as configured"
             for name, (found, value) in pairs.items() if found != value]  # fmt: skip
    if lines:
        raise checkpoint_error(target, lines)


def _write_folder(
    folder: Path,
    config: V4Config,
    tensors: Mapping[str, torch.Tensor],
    files: Mapping[str, bytes],
    shard_bytes: int,
) -> None:
    shards = _plan(tensors, shard_bytes)
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, 1):
        file = shard_file(number, len(shards))
        total += _write_shard(folder / file, names, tensors)
        weight_map |= dict.fromkeys(names, file)
    index = index_of(weight_map, total)
    texts = {CONFIG: as_json(config_to_dict(config)), INDEX: as_json(index)}
    for name, content in {**files, **texts}.items():
        if Path(name).name != name:
            raise checkpoint_error(
                folder, [f"found file name {name!r}, expected one without folders"]
            )
        _write(folder / name, [content])
    sync(folder)


def _plan(tensors: Mapping[str, torch.Tensor], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    held = 0
    for name in tensors:
        size = tensors[name].nbytes
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def _write_shard(path: Path, names: list[str], tensors: Mapping[str, torch.Tensor]) -> int:
    for name in names:
        if tensors[name].dtype not in STORED:
            found = tensors[name].dtype
            raise checkpoint_error(
                path, [f"tensor '{name}': found {found}, expected one of {[*STORED]}"]
            )
    start, begins = file_start((n, STORED[tensors[n].dtype], tensors[n].shape) for n in names)
    _write(path, chain([start], (data_of(tensors[name]) for name in begins)))
    return sum(tensors[name].nbytes for name in names)


def _write(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    with path.open("xb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
