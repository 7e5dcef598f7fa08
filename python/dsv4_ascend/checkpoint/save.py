"""Writing an official-layout folder: config.json,
safetensors shards and their index, all or nothing.
"""

from __future__ import annotations

import json
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

_ALIGNMENT = 64
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
        _sync(target.parent)
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
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        total += _write_shard(folder / file, names, tensors)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    texts = {CONFIG: _json(config_to_dict(config)), INDEX: _json(index)}
    for name, content in {**files, **texts}.items():
        if Path(name).name != name:
            raise checkpoint_error(
                folder, [f"found file name {name!r}, expected one without folders"]
            )
        _write(folder / name, [content])
    _sync(folder)


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
    # Wide elements first: then every tensor is aligned to its element size without holes, which the
    # format forbids.
    ordered = sorted(names, key=lambda name: -tensors[name].element_size())
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in ordered:
        tensor = tensors[name]
        if tensor.dtype not in STORED:
            raise checkpoint_error(
                path, [f"tensor '{name}': found {tensor.dtype}, expected one of {[*STORED]}"]
            )
        offsets = [position, position + tensor.nbytes]
        header[name] = {
            "dtype": STORED[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        position = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    chunks = (data_of(tensors[name]) for name in ordered)
    _write(path, chain([len(text).to_bytes(8, "little"), text], chunks))
    return position


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _write(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    with path.open("xb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
