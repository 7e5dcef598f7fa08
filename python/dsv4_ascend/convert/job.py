"""A conversion: source folder to target folder, resumable, one writer, the source never touched."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from dsv4_ascend.checkpoint.config_file import CONFIG, config_to_dict
from dsv4_ascend.checkpoint.folder import Checkpoint, open_checkpoint
from dsv4_ascend.checkpoint.foreign import JOURNAL
from dsv4_ascend.checkpoint.kinds import DESCRIPTION, PLAIN
from dsv4_ascend.checkpoint.layout import FP8
from dsv4_ascend.checkpoint.safetensors_file import checkpoint_error
from dsv4_ascend.checkpoint.shards import INDEX
from dsv4_ascend.checkpoint.strict_json import (
    FileProblem,
    open_regular,
    parse,
    read_object,
    read_regular,
)
from dsv4_ascend.checkpoint.writing import as_json, index_of
from dsv4_ascend.convert.folders import (
    QUALITY,
    RECORD,
    drop_parts,
    refused,
    write_file,
    writing,
)
from dsv4_ascend.convert.shards import Shard, shards_of, write_shard
from dsv4_ascend.convert.targets import Target, target_named
from dsv4_backend.errors import CheckpointError, ConfigError
from dsv4_backend.ops.mx import MX_BLOCK

RULES = 1
"""Raised when the same source gives other bytes: unfinished folders of other rules are refused."""
_MAX_JSON, _MAX_FILE = 2**20, 64 * 2**20
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".gguf")
_OWN = (CONFIG, INDEX, DESCRIPTION, JOURNAL, RECORD, QUALITY)
_OF_DISKS = {"lost+found"}
_OFFICIAL_ONLY = "inference"
"""A folder of releases that describes their own weights."""

Progress = Callable[[int, int], None]
"""Called with (bytes written, bytes in all)."""


@dataclass(frozen=True)
class Done:
    """What a conversion did. resumed: shards that were there already; written: those made now."""

    folder: Path
    shards: int
    resumed: int
    nbytes: int
    notes: tuple[str, ...]

    @property
    def written(self) -> int:
        """Shards made by this call."""
        return self.shards - self.resumed


def convert(
    source: Path,
    folder: Path,
    target: Target | str,
    *,
    progress: Progress | None = None,
    allow_unknown: Collection[str] = (),
    after_shard: Callable[[Path], None] | None = None,
) -> Done:
    """Write `source`, an official or bf16 folder, as `target` into `folder`.

    A killed conversion goes on where it was when called again; the finished folder is the same to
    the bit, and what is missing of it later, or cut off, is made again. Until it is finished it has
    no configuration, so nothing opens it. Memory: that of one tensor's rows. target: one of
    `TARGETS` or its name. after_shard: called with every shard that was written. CheckpointError
    for a source that does not open, is converted already or has values that are not finite, for a
    target that is or holds the source, or holds something else, is being written by another, or
    does not fit on the disk.
    """
    target = target_named(target) if isinstance(target, str) else target
    source, folder = Path(os.path.realpath(source)), Path(os.path.realpath(folder))
    _check_places(source, folder)
    checkpoint = open_checkpoint(source, allow_unknown=allow_unknown)
    if checkpoint.kinds:
        names = " and ".join(sorted({kind.name for kind in checkpoint.kinds.values()}))
        raise checkpoint_error(
            source, [f"found {names} weights, expected the official folder or a bf16 copy"]
        )
    shards = shards_of(checkpoint, target)
    record = _record(checkpoint, target)
    total = sum(shard.nbytes for shard in shards)
    finished = (folder / RECORD).is_file() and not (folder / JOURNAL).exists()
    if finished:
        _check_record(folder, record)
        if _opens(folder):
            return Done(folder, len(shards), len(shards), total, checkpoint.notes)
    else:
        _check_empty(folder)
    with writing(folder) as journal:
        _begin(journal, record, finished)
        drop_parts(folder)
        left = [shard for shard in shards if not shard.is_whole(folder)]
        _check_room(folder, sum(shard.nbytes for shard in left))
        done = total - sum(shard.nbytes for shard in left)
        for shard in left:
            write_shard(folder, shard, checkpoint, target)
            done += shard.nbytes
            if after_shard is not None:
                after_shard(folder / shard.file)
            if progress is not None:
                progress(done, total)
        left_out = _finish(folder, checkpoint, target, shards, record)
        journal.unlink()
    notes = *checkpoint.notes, *left_out
    return Done(folder, len(shards), len(shards) - len(left), total, notes)


def _opens(folder: Path) -> bool:
    try:
        open_checkpoint(folder)
    except (CheckpointError, ConfigError):
        return False
    return True


def _check_places(source: Path, folder: Path) -> None:
    if folder == source:
        raise checkpoint_error(folder, ["found the source, expected another folder to write to"])
    if source in folder.parents or folder in source.parents:
        within = "inside the source" if source in folder.parents else "around the source"
        raise checkpoint_error(
            folder, [f"found a folder {within} {source}, expected one apart from it"]
        )
    if folder.exists() and not folder.is_dir():
        raise checkpoint_error(folder, ["found a file, expected a new or empty folder"])


def _check_empty(folder: Path) -> None:
    try:
        present = sorted({*os.listdir(folder)} - _OF_DISKS) if folder.exists() else []
    except OSError as error:
        raise refused(folder, error) from None
    if present and JOURNAL not in present:
        raise checkpoint_error(
            folder,
            [
                f"found {', '.join(present[:3])} there already, expected a new or empty folder, "
                "or an unfinished conversion"
            ],
        )


def _record(checkpoint: Checkpoint, target: Target) -> dict[str, object]:
    """What decides the bytes of the result: of the source, size and time of its files too."""
    digest = hashlib.sha256()
    for name in checkpoint.names():
        source = checkpoint.source(name)
        told = f"{name} {source.file.path.name} {source.stored} {source.dtype} {source.shape}\n"
        digest.update(told.encode())
    paths = {checkpoint.source(name).file.path for name in checkpoint.names()}
    stats = {path.name: path.stat() for path in sorted(paths)}
    return {
        "target": target.name,
        "rules": RULES,
        "source_layout_sha256": digest.hexdigest(),
        "source_files": {name: [s.st_size, s.st_mtime_ns] for name, s in stats.items()},
    }


def _check_record(folder: Path, record: dict[str, object]) -> None:
    try:
        found = read_object(folder / RECORD, _MAX_JSON)
    except FileProblem as problem:
        raise checkpoint_error(folder, [f"{RECORD}: {problem}"]) from None
    if found != record:
        raise checkpoint_error(folder, [_other(found, record)])


def _begin(journal: Path, record: dict[str, object], finished: bool) -> None:
    """Write the journal, or compare it with this conversion.

    It is complete before the first shard is begun: where it is not, there is none, or the folder
    was finished before.
    """
    descriptor, _ = open_regular(journal)
    with os.fdopen(descriptor, "rb") as file:
        raw = file.read(_MAX_FILE)
    shards = not finished and any(journal.parent.glob("model-*.safetensors"))
    try:
        found = parse(raw)
    except FileProblem:
        found = None
    if found == record:
        return
    if isinstance(found, dict) or shards:
        raise checkpoint_error(
            journal.parent, [_other(found if isinstance(found, dict) else {}, record)]
        )
    with journal.open("r+b") as file:
        file.truncate(0)
        file.write(as_json(record))
        file.flush()
        os.fsync(file.fileno())


def _other(found: dict[str, object], wanted: dict[str, object]) -> str:
    differing = next((name for name, value in wanted.items() if found.get(name) != value), "")
    what = {
        "target": f"--target {found.get('target')}, not {wanted['target']}",
        "rules": "another version's rules of rounding",
    }.get(differing, "another source, or one that has changed")
    return f"found a conversion of {what}, expected this one's: remove the folder or give another"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        line = (
            f"found {_size(free)} of room on the disk, expected {_size(needed)} "
            "for what is to be written; what is finished stays"
        )
        raise checkpoint_error(folder, [line])


def _finish(
    folder: Path,
    checkpoint: Checkpoint,
    target: Target,
    shards: list[Shard],
    record: dict[str, object],
) -> list[str]:
    """Everything but the shards; the configuration last, without which nothing opens a folder.

    Notes on files that were left out.
    """
    left_out = []
    for name, content in _side_files(checkpoint.path):
        path = folder / name
        if content is None:
            left_out.append(f"{name}: left out, no regular file of at most {_MAX_FILE >> 20} MiB")
            continue
        path.parent.mkdir(exist_ok=True)
        write_file(path, content)
    weight_map = {part.name: shard.file for shard in shards for part in shard.parts()}
    total = sum(shard.nbytes for shard in shards)
    if target.described is not None:
        write_file(folder / DESCRIPTION, as_json(_description(checkpoint, target, shards)))
    write_file(folder / INDEX, as_json(index_of(weight_map, total)))
    write_file(folder / CONFIG, as_json(_config(checkpoint, target, shards)))
    try:
        open_checkpoint(folder)  # names, shapes, dtypes and places, by the strict reader
    except (CheckpointError, ConfigError):
        (folder / CONFIG).unlink()
        raise
    write_file(folder / RECORD, as_json(record))
    return left_out


def _description(checkpoint: Checkpoint, target: Target, shards: list[Shard]) -> dict[str, object]:
    """`quant_model_description.json` as msModelSlim writes it: every tensor by name."""
    told: dict[str, object] = {
        "model_quant_type": target.described,
        "version": "1.0.0",
        "group_size": MX_BLOCK if target.name == "a5-mx" else 0,
    }
    for shard in shards:
        for item in shard.items:
            entry = checkpoint.layout.get(item.name)
            kind = None
            if entry is not None:
                kind = target.kind(item.name, entry, checkpoint.source(item.name).dtype)
            told |= {part.name: PLAIN if kind is None else kind.name for part in item.parts}
    return told


def _config(checkpoint: Checkpoint, target: Target, shards: list[Shard]) -> dict[str, object]:
    """The source's configuration, every field of it, but for how its weights are stored."""
    quantized = target.name == "official"
    experts = {
        item.parts[0].dtype
        for shard in shards
        for item in shard.items
        if quantized and ".ffn.experts." in item.name
    }
    formats = {frozenset(("I8",)): "fp4", frozenset((FP8,)): "fp8"}
    expert_dtype = formats.get(frozenset(experts))
    stored = replace(checkpoint.config, quantized=quantized, expert_dtype=expert_dtype)
    written = config_to_dict(stored)
    try:
        raw = read_object(checkpoint.path / CONFIG, _MAX_JSON)
    except FileProblem:
        return written
    if "hidden_size" not in raw:  # the names of inference/config.json
        return written
    fields = ("quantization_config", "expert_dtype")
    kept = {name: value for name, value in raw.items() if name not in fields}
    return kept | {name: written[name] for name in fields if name in written}


def _side_files(source: Path) -> Iterator[tuple[str, bytes | None]]:
    """Tokenizer, chat encoding and whatever else lies beside the weights, two folders deep; None
    for what is no regular file, or a large one.
    """
    for path in sorted([*source.iterdir(), *source.glob("*/*")]):
        name = path.relative_to(source)
        hidden = any(part.startswith(".") for part in name.parts)
        if hidden or name.parts[0] == _OFFICIAL_ONLY or str(name) in _OWN:
            continue
        if path.is_dir() or path.suffix in _WEIGHTS:
            continue
        try:
            yield str(name), read_regular(path, _MAX_FILE)
        except FileProblem:
            yield str(name), None
