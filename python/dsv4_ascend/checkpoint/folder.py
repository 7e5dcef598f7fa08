"""A checkpoint folder: `config.json` and safetensors,
memory-mapped under official names (spec/v4.md section 7).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch

from dsv4_ascend.checkpoint.config import V4Config
from dsv4_ascend.checkpoint.config_file import read_noted_config
from dsv4_ascend.checkpoint.experts import by_projection, stacks
from dsv4_ascend.checkpoint.fit import misfits
from dsv4_ascend.checkpoint.foreign import foreign_format
from dsv4_ascend.checkpoint.kinds import BIAS, OFFSET, Kinds, declared_kinds
from dsv4_ascend.checkpoint.layout import Layout, declared, layout
from dsv4_ascend.checkpoint.problems import counted
from dsv4_ascend.checkpoint.safetensors_file import SafetensorsFile, checkpoint_error
from dsv4_ascend.checkpoint.shards import open_shards
from dsv4_ascend.checkpoint.sources import Format, Source, Sources, collect, set_aside, unstack
from dsv4_ascend.checkpoint.stored import as_stored
from dsv4_ascend.checkpoint.values import value_problems
from dsv4_backend.errors import CheckpointError, ConfigError

Progress = Callable[[int, int], None]
"""Called with (bytes handed out, bytes in all)."""
Owner = Callable[[V4Config], Callable[[str], bool]]
"""A configuration -> which official names of its checkpoint are wanted."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened, complete checkpoint.
    Weights stay in the files: tensors are views of mapped pages, not to be written.

    `format` is "transformers" when any stored name differs from the official one, "msModelSlim" in
    a converted folder. `notes`: what was
    ignored, set aside or corrected, one line each. `kinds`: the quantised weights of a converted
    folder, empty for an official one. `aside`: where lies what was set aside.
    """

    path: Path
    config: V4Config
    format: Format
    layout: Layout
    notes: tuple[str, ...]
    _sources: Sources
    kinds: Kinds
    aside: Sources

    def source(self, name: str) -> Source:
        """Where the tensor of an official name lies."""
        return self._sources[name]

    def names(self) -> list[str]:
        """Official names of all weights and scales present,
        in layout order, each scale after its weight.
        """
        return list(self._sources)

    def __contains__(self, name: str) -> bool:
        return name in self._sources

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of an official name, as a view of the mapped file;
        KeyError for a name not in `names()`.

        Packed FP4 is int8 `[N, K/2]`, FP8 is float8_e4m3fn, floats are as stored. Scales are
        float8_e8m0fnu, also those stored as F32 if all of a tensor are powers of two (copied); else
        they stay fp32. In a converted folder the scales of rows are fp32 [N], and int4 codes
        are packed as they are stored.
        """
        tensor = self.stored(name)
        weight = self.layout.get(name.removesuffix("scale") + "weight")
        if name.endswith(".scale") and weight is not None and weight.kind is not None:
            by_block = weight.kind.block > 0
            return tensor.view(torch.float8_e8m0fnu) if by_block else tensor.squeeze(-1).float()
        if tensor.dtype == torch.uint8:
            return tensor.view(torch.int8)
        if tensor.dtype == torch.float32 and name.endswith(".scale"):
            return _narrowed(tensor)
        return tensor

    def stored(self, name: str) -> torch.Tensor:
        """The tensor of an official name in the very dtype and shape of the file, a view."""
        return self._sources[name].tensor()

    def release(self, name: str) -> None:
        """Let the kernel take back the pages of a tensor of which a copy has been made."""
        self._sources[name].release()

    def scale(self, name: str) -> torch.Tensor | None:
        """The scale of a weight as `tensor` gives it, None if the weight is stored as floats."""
        scale_name = self.layout[name].scale_name
        return self.tensor(scale_name) if scale_name in self._sources else None

    def tensors(
        self, progress: Progress | None = None, drafts: bool = True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of all `names()`, without `mtp.*` if not `drafts`.

        `progress` is told the bytes handed out so far after each.
        """
        wanted = {
            name: source
            for name, source in self._sources.items()
            if drafts or not name.startswith("mtp.")
        }
        total, done = sum(source.nbytes for source in wanted.values()), 0
        for name, source in wanted.items():
            yield name, self.tensor(name)
            done += source.nbytes
            if progress:
                progress(done, total)

    def network_tensors(
        self, progress: Progress | None = None, drafts: bool = True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """As `tensors`,
        but all experts of a layer's projection in one tensor `...ffn.experts.w1.weight` [E, ...].

        `...ffn.experts.slots` int64 [E] says at which place an expert is, where it is not that of
        its number.
        """
        wanted = {
            name: source
            for name, source in self._sources.items()
            if drafts or not name.startswith("mtp.")
        }
        total, done = sum(source.nbytes for source in wanted.values()), 0
        experts = by_projection(wanted)
        names = {
            f"{prefix}.{part}": names
            for prefix, parts in experts.items()
            for part, names in parts.items()
        }
        single = wanted.keys() - {name for stacked in names.values() for name in stacked}
        found = ((name, self.tensor(name)) for name in wanted if name in single)
        stacked = (
            pair
            for prefix, parts in experts.items()
            for pair in stacks(prefix, parts, wanted, self.tensor)
        )
        for name, tensor in chain(found, stacked):
            yield name, tensor
            done += sum(
                wanted[part].nbytes for part in names.get(name, [name] if name in wanted else [])
            )
            if progress:
                progress(done, total)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(source.nbytes for source in self._sources.values())

    def value_problems(self) -> list[str]:
        """The bad values that `values.value_problems` finds, one line per tensor."""
        experts = self.config.n_routed_experts
        sources = self._sources | {
            name: source for name, source in self.aside.items() if name.endswith(OFFSET)
        }
        return list(value_problems(sources, experts, self.layout))


def open_checkpoint(
    path: str | Path, *, allow_unknown: Collection[str] = (), owner: Owner | None = None
) -> Checkpoint:
    """Open a folder with config.json and `model.safetensors`,
    or shards and `model.safetensors.index.json`.

    Names: official, transformers' module names, or what `save_pretrained` writes. Drafts and
    formats are what the tensors say (stored.py), whatever the configuration promises; image parts
    are set aside. allow_unknown: fields of the configuration to ignore (`config_from_dict`). Values
    are checked as far as `values.value_problems` says. owner: asked before any value is read; the
    checkpoint has only the tensors that it wants, while all of them are checked for their form and
    place. Raises ConfigError for the configuration,
    and one CheckpointError that lists every missing, surplus, mis-shaped, mis-typed, truncated,
    overlapping or doubly stored tensor and every bad value; one line first if the folder is in a
    format of another quantiser.
    """
    folder = Path(path)
    try:
        return _open(folder, allow_unknown, owner)
    except (ConfigError, CheckpointError) as error:
        foreign = None if _is_declared(folder) else foreign_format(folder)
        if foreign is None:
            raise
        problems = getattr(error, "problems", ())
        more = f"\n  as a V4 checkpoint it has {counted(problems)}" if problems else ""
        told = CheckpointError(f"{folder}: {foreign}{more}")
        told.problems = (foreign, *problems)
        raise told from None


def _is_declared(folder: Path) -> bool:
    """Whether its description tells of weights: then what is wrong with them is to be told."""
    try:
        return bool(declared_kinds(folder))
    except CheckpointError:
        return True


@dataclass(frozen=True)
class Survey:
    """What the headers of a folder tell, with every problem of form; no value is read.

    sources: the tensors of the layout; aside: what was set aside, by official name; files: all
    that could be opened.
    """

    config: V4Config
    format: Format
    layout: Layout
    kinds: Kinds
    sources: Sources
    aside: Sources
    notes: tuple[str, ...]
    problems: tuple[str, ...]
    files: tuple[SafetensorsFile, ...]


def survey(folder: Path, allow_unknown: Collection[str] = ()) -> Survey:
    """Look at a folder's configuration, description and headers.

    ConfigError for the configuration, CheckpointError where there is no checkpoint to look at.
    """
    config, notes = read_noted_config(folder, allow_unknown)
    kinds = declared_kinds(folder)
    files, problems, more_notes = open_shards(folder)
    found, naming, more = collect(files)
    problems += more
    sources, aside = set_aside(found, config.num_hash_layers)
    beside = {name for name in sources if _is_beside(name, kinds)}
    sources = {name: source for name, source in sources.items() if name not in beside}
    if kinds:
        config = replace(config, quantized=True, expert_dtype=None)
    config, corrected = as_stored(config, sources, formats=not kinds)
    entries = declared(layout(config), kinds) if kinds else layout(config)
    complete = not problems
    left = found.keys() - sources.keys()
    sources, more = unstack(sources, entries, config.n_routed_experts)
    problems += more + list(misfits(sources, entries, complete))
    return Survey(
        config,
        "msModelSlim" if kinds else naming,
        entries,
        kinds,
        sources,
        {name: found[name] for name in found if name in left},
        (*notes, *more_notes, *aside, *corrected),
        tuple(dict.fromkeys([*more_notes, *problems] if problems else [])),
        tuple(files),
    )


def _is_beside(name: str, kinds: Kinds) -> bool:
    """Whether it is the offset or kernel bias of a declared weight."""
    ending = OFFSET if name.endswith(OFFSET) else BIAS
    return name.endswith(ending) and name.removesuffix(ending) + ".weight" in kinds


def _open(folder: Path, allow_unknown: Collection[str], owner: Owner | None) -> Checkpoint:
    seen = survey(folder, allow_unknown)
    if seen.problems:
        raise checkpoint_error(folder, seen.problems)
    checkpoint = checkpoint_of(folder, seen, owner)
    bad = checkpoint.value_problems()
    if bad:
        raise checkpoint_error(folder, bad)
    return checkpoint


def checkpoint_of(folder: Path, seen: Survey, owner: Owner | None = None) -> Checkpoint:
    """The checkpoint of a survey without problems; its values are not looked at."""
    sources = _ordered(seen.sources, seen.layout)
    if owner is not None:
        wanted = owner(seen.config)
        sources = {name: source for name, source in sources.items() if wanted(name)}
    return Checkpoint(
        folder,
        seen.config,
        seen.format,
        seen.layout,
        seen.notes,
        sources,
        seen.kinds,
        seen.aside if owner is None else {},
    )


def _ordered(sources: Sources, entries: Layout) -> Sources:
    names = (name for key, entry in entries.items() for name in (key, entry.scale_name))
    return {name: sources[name] for name in names if name in sources}


def _narrowed(scale: torch.Tensor) -> torch.Tensor:
    """Fp32 powers of two as E8M0, whose byte is their exponent field;
    any other values as they are.
    """
    bits = scale.contiguous().view(torch.int32)
    if bool(((bits & 0x807FFFFF) | (bits < 1 << 23) | (bits >= 255 << 23)).any()):
        return scale
    return (bits >> 23).to(torch.uint8).view(torch.float8_e8m0fnu)
