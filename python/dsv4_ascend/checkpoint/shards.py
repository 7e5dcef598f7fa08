"""Which safetensors files make up a checkpoint folder: one file, or shards listed by an index."""

from __future__ import annotations

import os
import re
from pathlib import Path

from dsv4_ascend.checkpoint.safetensors_file import MAX_TENSORS, SafetensorsFile, checkpoint_error
from dsv4_ascend.checkpoint.strict_json import FileProblem, read_object
from dsv4_backend.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAX_INDEX = 64 * 2**20
_MAX_SHARDS = 10_000
_SHOWN = 5
_SHARD_NAME = re.compile(r"[A-Za-z0-9_\-][A-Za-z0-9_.\-]{0,200}\.safetensors", re.ASCII)
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def open_shards(folder: Path) -> tuple[list[SafetensorsFile], list[str], list[str]]:
    """All shards that can be read, in name order, every problem found on the way, and notes.

    The checkpoint is, the first that applies: `model.safetensors`, unless the index lists it as one
    of its shards; the shards that the index lists; the only safetensors file. What lies beside it
    is a note. A broken index is an error. CheckpointError at once if the folder holds no checkpoint
    or its index is unusable.
    """
    try:
        present = sorted(os.listdir(folder))
    except (OSError, ValueError) as error:
        raise checkpoint_error(
            folder, [f"cannot be listed ({error}), expected a checkpoint folder"]
        ) from None
    stored = [name for name in present if name.endswith(".safetensors")]
    weight_map = _read_index(folder / INDEX) if INDEX in present else None
    if weight_map is None or (SINGLE in stored and SINGLE not in weight_map.values()):
        single = _only_file(folder, stored, present)
        beside = [*stored, INDEX] if weight_map else stored
        return *_open_all(folder, [single]), _not_read(single, beside, [single])
    wanted = sorted(set(weight_map.values()))
    problems = [
        f"{INDEX}: found shard '{name}', expected a file in the folder"
        for name in wanted
        if name not in stored
    ]
    files, more = _open_all(folder, [name for name in wanted if name in stored])
    notes = _not_read(f"what {INDEX} lists", stored, wanted)
    return files, problems + more + _against_index(files, weight_map), notes


def _not_read(opened: str, files: list[str], wanted: list[str]) -> list[str]:
    """A note on what lies beside the checkpoint, if anything does."""
    others = [name for name in files if name not in wanted]
    more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
    return [f"opened {opened}; not read: {', '.join(others[:_SHOWN])}{more}"] if others else []


def _only_file(folder: Path, stored: list[str], present: list[str]) -> str:
    if len(stored) == 1 or SINGLE in stored:
        return SINGLE if SINGLE in stored else stored[0]
    if stored:
        raise checkpoint_error(
            folder, [f"found {len(stored)} safetensors files and no {INDEX}, expected an index"]
        )
    pickles = [name for name in present if name.endswith(_PICKLES)]
    if pickles:
        line = (
            f"found only {', '.join(pickles[:3])}: pickled weights are never opened, "
            "expected safetensors"
        )
        raise checkpoint_error(folder, [line])
    raise checkpoint_error(
        folder, ["found no safetensors file, expected one, or shards with an index"]
    )


def _read_index(path: Path) -> dict[str, str]:
    try:
        index = read_object(path, _MAX_INDEX)
    except FileProblem as problem:
        raise checkpoint_error(path, [f"{INDEX}: {problem}"]) from None
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or len(weight_map) > MAX_TENSORS:
        line = (
            f"{INDEX}: weight_map: found no object of 1 to {MAX_TENSORS} names, "
            "expected tensor -> shard"
        )
        raise checkpoint_error(path, [line])
    names = set(map(ascii, weight_map.values()))
    wrong = [name for name in sorted(names) if not _SHARD_NAME.fullmatch(name[1:-1])]
    if wrong or len(names) > _MAX_SHARDS:
        lines = [
            f"{INDEX}: found shard name {name[:100]}, expected a plain .safetensors file name"
            for name in wrong
        ]
        raise checkpoint_error(
            path, lines or [f"{INDEX}: found {len(names)} shards, expected at most {_MAX_SHARDS}"]
        )
    return {str(name): str(file) for name, file in weight_map.items()}


def _open_all(folder: Path, names: list[str]) -> tuple[list[SafetensorsFile], list[str]]:
    files: list[SafetensorsFile] = []
    problems: list[str] = []
    for name in names:
        try:
            files.append(SafetensorsFile(folder / name))
        except CheckpointError as error:
            problems += error.problems
    total = sum(len(file.tensors) for file in files)
    if total > MAX_TENSORS:
        raise checkpoint_error(folder, [f"found {total} tensors, expected at most {MAX_TENSORS}"])
    return files, problems


def _against_index(files: list[SafetensorsFile], weight_map: dict[str, str]) -> list[str]:
    """Tensors that the index puts elsewhere, that it does not list,
    or that are not where it says.
    """
    problems = []
    held = {file.path.name: file.tensors for file in files}
    for file, tensors in held.items():
        for name in tensors:
            if weight_map.get(name) != file:
                listed = f"in {weight_map[name]}" if name in weight_map else "nowhere"
                problems.append(
                    f"{file}: tensor '{name}': found it here, "
                    f"expected it {listed} according to {INDEX}"
                )
    for name, file in weight_map.items():
        if file in held and name not in held[file]:
            problems.append(
                f"{INDEX}: tensor {ascii(name)[:100]}: expected in {file}, found not there"
            )
    return problems
