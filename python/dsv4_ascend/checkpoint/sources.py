"""Where the official tensors of a checkpoint lie: file,
stored name and form, one source per expert.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Literal, NamedTuple

import torch

from dsv4_ascend.checkpoint.layout import FP8, FP8_TILE, Layout
from dsv4_ascend.checkpoint.names import expert_parts, to_official
from dsv4_ascend.checkpoint.safetensors_file import SafetensorsFile, stored_bytes

Format = Literal["official", "transformers", "msModelSlim"]

_VISION_START, _VISION_END = ("vision.", "aligner.", "image_"), ".ffn.gate.bias_vl"
"""What Vision-Exp adds to the language model (spec/v41.md 4)."""


class Source(NamedTuple):
    """Where an official tensor lies: file, stored name, dtype and shape,
    and which part of a stacked tensor.
    """

    file: SafetensorsFile
    stored: str
    dtype: str
    shape: tuple[int, ...]
    expert: int = -1
    first_row: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return stored_bytes(self.dtype, self.shape)

    @property
    def begin(self) -> int:
        """Where its bytes begin in the file."""
        info = self.file.tensors[self.stored]
        if self.expert < 0:
            return info.begin
        return info.begin + (self.expert * info.shape[1] + self.first_row) * (
            self.nbytes // self.shape[0]
        )

    def tensor(self) -> torch.Tensor:
        """Its values in the very dtype and shape of the file, a view."""
        tensor = self.file.tensor(self.stored)
        if self.expert < 0:
            return tensor
        return tensor[self.expert, self.first_row : self.first_row + self.shape[0]]

    def release(self) -> None:
        """Let the kernel take back its pages, of which a copy has been made."""
        self.file.release(self.stored)

    def describe(self, official: str) -> str:
        """How messages name it."""
        alias = "" if self.stored == official or self.expert >= 0 else f" ({official})"
        return f"{self.file.path.name}: tensor '{self.stored}'{alias}"

    def place(self, index: list[int]) -> list[int]:
        """Where an element of this part lies in the stored tensor."""
        return index if self.expert < 0 else [self.expert, self.first_row + index[0], *index[1:]]


Sources = dict[str, Source]


def collect(files: Iterable[SafetensorsFile]) -> tuple[Sources, Format, list[str]]:
    """Every tensor by official name, the naming ("transformers" if any name differs),
    and what is stored twice.
    """
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
                problems.append(
                    f"{source.describe(official)}: found it also in {first}, expected one tensor "
                    "per name"
                )
            else:
                sources[official] = source
    return sources, naming, problems


def set_aside(sources: Sources, hash_layers: int) -> tuple[Sources, list[str]]:
    """The sources without those that a text-only main model does not use,
    and a note for each kind of them.
    """
    vision = {
        name for name in sources if name.startswith(_VISION_START) or name.endswith(_VISION_END)
    }
    biases = {f"layers.{layer}.ffn.gate.bias" for layer in range(hash_layers)} & sources.keys()
    notes = []
    if vision:
        parts = "vision.*, aligner.*, image_*, bias_vl"
        notes.append(
            f"{len(vision)} tensors for images set aside ({parts}): the model takes text only"
        )
    if biases:
        notes.append(
            f"{len(biases)} gate biases of hash-routed layers set aside: token ids choose the "
            "experts there"
        )
    unused = vision | biases
    return {name: source for name, source in sources.items() if name not in unused}, notes


def unstack(sources: Sources, entries: Layout, experts: int) -> tuple[Sources, list[str]]:
    """Replace every stacked expert tensor by one source per expert and part;
    what the layout lacks stays as it is.
    """
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
            problems.append(
                f"{source.describe(source.stored)}: found shape {source.shape}, expected {expected}"
            )
        for expert, (row, part) in product(range(experts), enumerate(parts)):
            official = f"{prefix}.{expert}.{part}.{suffix}"
            if official in sources:
                alone = sources[official].describe(official)
                problems.append(
                    f"{alone}: found it in '{source.stored}' too, expected one tensor per name"
                )
            result[official] = source._replace(shape=shape, expert=expert, first_row=row * shape[0])
    return result, problems


def _expert_shape(
    name: str, stack: tuple[str, tuple[str, ...], str], sources: Sources, entries: Layout
) -> tuple[int, ...] | None:
    """The stored shape of one expert's part of a stacked tensor,
    None if the layout has no such tensor.
    """
    prefix, parts, suffix = stack
    entry = entries.get(f"{prefix}.0.{parts[0]}.weight")
    if entry is None or suffix == "weight":
        return entry and entry.stored_shape(sources[name].dtype)
    weight = sources.get(name.removesuffix("scale") + "weight")
    if weight is None or (len(parts) > 1 and weight.dtype == FP8 and entry.shape[0] % FP8_TILE):
        return None  # a scale without a weight, or a tile that would cover rows of w1 and of w3
    return entry.scale_shape(weight.dtype)
