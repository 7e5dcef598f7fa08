"""A checkpoint folder: `config.json` and safetensors, memory-mapped under official names (spec/v4.md section 7)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from dsv4_ascend.model.config import V4Config
from dsv4_ascend.model.config_file import read_config
from dsv4_ascend.model.layout import FP4, FP8, FP8_TILE, SCALE, Entry, Layout, layout
from dsv4_ascend.model.names import expert_parts, to_official
from dsv4_ascend.model.safetensors_file import DTYPES, SafetensorsFile, checkpoint_error
from dsv4_ascend.model.shards import open_shards

Format = Literal["official", "transformers"]
Progress = Callable[[int, int], None]
"""Called with (bytes handed out, bytes in all)."""


class Source(NamedTuple):
    """Where an official tensor lies: file, stored name, dtype and shape, and which part of a stacked tensor."""

    file: SafetensorsFile
    stored: str
    dtype: str
    shape: tuple[int, ...]
    expert: int = -1
    first_row: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * DTYPES[self.dtype][0] // 8

    def describe(self, official: str) -> str:
        """How messages name it."""
        alias = "" if self.stored == official or self.expert >= 0 else f" ({official})"
        return f"{self.file.path.name}: tensor '{self.stored}'{alias}"


Sources = dict[str, Source]


@dataclass(frozen=True)
class Checkpoint:
    """An opened, complete checkpoint. Weights stay in the files: tensors are views of mapped pages, not to be written.

    `format` is "transformers" when any stored name differs from the official one.
    """

    path: Path
    config: V4Config
    format: Format
    layout: Layout
    _sources: Sources

    def names(self) -> list[str]:
        """Official names of all weights and scales present, in layout order, each scale after its weight."""
        return list(self._sources)

    def __contains__(self, name: str) -> bool:
        return name in self._sources

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of an official name, as a view of the mapped file; KeyError for a name not in `names()`.

        Packed FP4 is int8 `[N, K/2]`, FP8 is float8_e4m3fn, scales are float8_e8m0fnu, floats are as stored.
        Only F32 scales are converted (copied); CheckpointError if one is not a power of two.
        """
        source = self._sources[name]
        tensor = source.file.tensor(source.stored)
        if source.expert >= 0:
            tensor = tensor[source.expert, source.first_row : source.first_row + source.shape[0]]
        if source.dtype == "U8":
            return tensor.view(torch.int8)
        if source.dtype == "F32" and name.endswith(".scale"):
            return _as_e8m0(tensor, source.describe(name))
        return tensor

    def scale(self, name: str) -> torch.Tensor | None:
        """The E8M0 scale of a weight, None if the weight is stored as floats."""
        scale_name = self.layout[name].scale_name
        return self.tensor(scale_name) if scale_name in self._sources else None

    def tensors(self, progress: Progress | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of all `names()`; `progress` is told the bytes handed out so far after each."""
        total, done = self.nbytes, 0
        for name, source in self._sources.items():
            yield name, self.tensor(name)
            done += source.nbytes
            if progress:
                progress(done, total)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(source.nbytes for source in self._sources.values())


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a folder with config.json and one safetensors file, or shards and `model.safetensors.index.json`.

    Names: official, transformers' module names, or what `save_pretrained` writes. A transformers checkpoint without
    `mtp.*` tensors is opened without MTP layers. Raises ConfigError for the configuration, and one CheckpointError that
    lists every missing, surplus, mis-shaped, mis-typed, truncated, overlapping or doubly stored tensor.
    """
    folder = Path(path)
    config = read_config(folder)
    files, problems = open_shards(folder)
    sources, naming, more = _collect(files)
    problems += more
    if naming == "transformers" and not any(name.startswith("mtp.") for name in sources):
        config = config.without_mtp()
    entries = layout(config)
    complete = not problems
    sources, more = _unstack(sources, entries, config.n_routed_experts)
    problems += more + list(_misfits(sources, entries, complete))
    if problems:
        raise checkpoint_error(folder, list(dict.fromkeys(problems)))
    return Checkpoint(folder, config, naming, entries, _ordered(sources, entries))


def _collect(files: list[SafetensorsFile]) -> tuple[Sources, Format, list[str]]:
    sources: Sources = {}
    naming: Format = "official"
    problems = []
    for file in files:
        for stored, info in file.tensors.items():
            official = to_official(stored)
            if official != stored:
                naming = "transformers"
            source = Source(file, stored, info.dtype, info.shape)
            if official in sources:
                first = sources[official].describe(official)
                problems.append(f"{source.describe(official)}: found it also in {first}, expected one tensor per name")
            else:
                sources[official] = source
    return sources, naming, problems


def _unstack(sources: Sources, entries: Layout, experts: int) -> tuple[Sources, list[str]]:
    """Replace every stacked expert tensor by one source per expert and part; what the layout lacks stays as it is."""
    result: Sources = {}
    problems = []
    for name, source in sources.items():
        stack = expert_parts(name)
        shape = stack and _expert_shape(name, stack, sources, entries)
        if not stack or not shape:
            result[name] = source
            continue
        prefix, parts, suffix = stack
        expected = (experts, len(parts) * shape[0], *shape[1:])
        if source.shape != expected:
            problems.append(f"{source.describe(source.stored)}: found shape {source.shape}, expected {expected}")
        for expert, (row, part) in product(range(experts), enumerate(parts)):
            official = f"{prefix}.{expert}.{part}.{suffix}"
            if official in sources:
                alone = sources[official].describe(official)
                problems.append(f"{alone}: found it in '{source.stored}' too, expected one tensor per name")
            result[official] = source._replace(shape=shape, expert=expert, first_row=row * shape[0])
    return result, problems


def _expert_shape(
    name: str, stack: tuple[str, tuple[str, ...], str], sources: Sources, entries: Layout
) -> tuple[int, ...] | None:
    """The stored shape of one expert's part of a stacked tensor, None if the layout has no such tensor."""
    prefix, parts, suffix = stack
    entry = entries.get(f"{prefix}.0.{parts[0]}.weight")
    if entry is None or suffix == "weight":
        return entry and entry.stored_shape(sources[name].dtype)
    weight = sources.get(name.removesuffix("scale") + "weight")
    if weight is None or (len(parts) > 1 and weight.dtype == FP8 and entry.shape[0] % FP8_TILE):
        return None  # a scale without a weight, or a tile that would cover rows of w1 and of w3
    return entry.scale_shape(weight.dtype)


def _misfits(sources: Sources, entries: Layout, complete: bool) -> Iterator[str]:
    """Missing (only if every shard could be read: else it would bury the cause), mis-typed, mis-shaped, surplus."""
    for name, entry in entries.items():
        source = sources.get(name)
        if source is not None:
            yield from _misfit(name, source, entry.dtypes, entry.stored_shape(source.dtype))
            yield from _scale_misfit(name, source, entry, sources, complete)
        elif complete:
            yield f"tensor '{name}' is missing: expected {' or '.join(entry.dtypes)} {entry.shape}"
    yield from _mixed_experts(sources, entries)
    yield from _surplus(sources, entries)


def _scale_misfit(name: str, weight: Source, entry: Entry, sources: Sources, complete: bool) -> Iterator[str]:
    shape = entry.scale_shape(weight.dtype) if weight.dtype in entry.dtypes else None
    if shape is None or entry.scale_name is None:
        return
    scale = sources.get(entry.scale_name)
    if scale is not None:
        yield from _misfit(entry.scale_name, scale, SCALE, shape)
    elif complete:
        yield f"{weight.describe(name)}: found {weight.dtype} without its scale '{entry.scale_name}' {shape}"


def _mixed_experts(sources: Sources, entries: Layout) -> Iterator[str]:
    """The experts of one layer run as one grouped product, so they share a format."""
    formats: dict[str, set[str]] = {}
    for name, entry in entries.items():
        if ".ffn.experts." in name and name in sources and sources[name].dtype in entry.dtypes:
            dtype = sources[name].dtype
            formats.setdefault(name.split(".experts.")[0], set()).add("FP4" if dtype in FP4 else dtype)
    for layer, dtypes in formats.items():
        if len(dtypes) > 1:
            yield f"{layer}.experts: found {' and '.join(sorted(dtypes))} mixed, expected one format per layer"


def _surplus(sources: Sources, entries: Layout) -> Iterator[str]:
    # The scale of a float weight has no meaning; that of a missing or mis-typed weight is not one more problem.
    scales = {
        entry.scale_name
        for name, entry in entries.items()
        if name not in sources or sources[name].dtype not in entry.dtypes or entry.scale_shape(sources[name].dtype)
    }
    for name, source in sources.items():
        if name not in entries and name not in scales:
            yield f"{source.describe(name)}: surplus: the configuration has no such tensor"


def _misfit(name: str, source: Source, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> Iterator[str]:
    if source.dtype not in dtypes:
        yield f"{source.describe(name)}: found dtype {source.dtype}, expected {' or '.join(dtypes)}"
    elif source.shape != shape:
        yield f"{source.describe(name)}: found shape {source.shape}, expected {shape} for {source.dtype}"


def _ordered(sources: Sources, entries: Layout) -> Sources:
    names = (name for key, entry in entries.items() for name in (key, entry.scale_name))
    return {name: sources[name] for name in names if name in sources}


def _as_e8m0(scale: torch.Tensor, where: str) -> torch.Tensor:
    """fp32 powers of two as E8M0: the exponent field is the byte. CheckpointError for any other value."""
    bits = scale.contiguous().view(torch.int32)
    if bool(((bits & 0x807FFFFF) | (bits < 1 << 23) | (bits >= 255 << 23)).any()):
        raise checkpoint_error(where, [f"{where}: found F32 scales that are no powers of two, expected E8M0 values"])
    return (bits >> 23).to(torch.uint8).view(torch.float8_e8m0fnu)
