"""All experts of a projection as one tensor: a view of the file if distances are equal, or a copy.

Releases hold a layer's experts in one shard, sorted by name (expert 10 before expert 2),
each projection as far from the next expert's: such a file is used as it lies, in its own
order of experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple

import torch

from dsv4_ascend.checkpoint.safetensors_file import DTYPES
from dsv4_ascend.checkpoint.sources import Source, Sources

EXPERT = re.compile(r"(.+\.ffn\.experts)\.(\d+)\.(w[123])\.(weight|scale)")
"""An official name: layer's experts, number, projection, weight or scale."""
Experts = dict[str, dict[str, list[str]]]
"""`...ffn.experts` -> `w1.weight` -> official names by number of expert."""


class Run(NamedTuple):
    """Experts in one file: their numbers in its order, and the bytes from one to the next."""

    order: tuple[int, ...]
    distance: int


def by_projection(sources: Sources) -> Experts:
    """The official names of all routed experts, grouped."""
    found: Experts = {}
    for match in filter(None, map(EXPERT.fullmatch, sources)):
        found.setdefault(match[1], {}).setdefault(f"{match[3]}.{match[4]}", []).append(match[0])
    for parts in found.values():
        for names in parts.values():
            names.sort(key=lambda name: int(name.rsplit(".", 3)[1]))
    return found


def run_of(sources: list[Source]) -> Run | None:
    """Where experts (by number) lie, if at equal distances, aligned, in one file and form."""
    first = sources[0]
    if any((s.file, s.dtype, s.shape) != (first.file, first.dtype, first.shape) for s in sources):
        return None
    places = sorted((source.begin, number) for number, source in enumerate(sources))
    begins = [begin for begin, _ in places]
    distances = {after - before for before, after in pairwise(begins)} or {first.nbytes}
    if len(distances) > 1 or (begins[0] | min(distances)) % DTYPES[first.dtype][1].itemsize:
        return None
    return Run(tuple(number for _, number in places), min(distances))


def stacks(
    prefix: str,
    parts: Mapping[str, list[str]],
    sources: Sources,
    tensor: Callable[[str], torch.Tensor],
) -> Iterator[tuple[str, torch.Tensor]]:
    """(`...ffn.experts.w1.weight`, [E, ...]) of every part of a layer's experts.

    Then `...ffn.experts.slots` int64 [E], the place of each expert in these, if they are not
    in order of number. parts, prefix: of `by_projection`; tensor: gives the tensor of an
    official name.
    """
    runs = {part: run_of([sources[name] for name in names]) for part, names in parts.items()}
    plain = tuple(range(max(map(len, parts.values()))))
    order = next((run.order for run in runs.values() if run), plain)
    for part, names in parts.items():
        run = runs[part]
        view = run.distance if run and run.order == order else None
        yield (
            f"{prefix}.{part}",
            _stacked([names[number] for number in order], view, sources, tensor),
        )
    if order != plain:
        yield f"{prefix}.slots", torch.tensor(order).argsort()


def _stacked(
    names: list[str], distance: int | None, sources: Sources, tensor: Callable[[str], torch.Tensor]
) -> torch.Tensor:
    """The experts `names` in this order, `distance` bytes apart in a file or (None) anywhere."""
    first = tensor(names[0])
    dtypes = {first.dtype}
    if names[0].endswith(".scale"):  # fp32 ones may be narrowed, each for itself
        dtypes = {tensor(name).dtype for name in names}
    stored = DTYPES[sources[names[0]].dtype][1]
    if distance is not None and dtypes == {first.dtype} and first.itemsize == stored.itemsize:
        source = sources[names[0]]
        return source.file.strided(
            source.begin, first.dtype, tuple(first.shape), len(names), distance
        )
    wide = len(dtypes) > 1
    result = torch.empty((len(names), *first.shape), dtype=torch.float32 if wide else first.dtype)
    for place, name in zip(result, names, strict=True):
        part = tensor(name)
        place.copy_(part.float() if wide else part)
        sources[name].file.release(sources[name].stored)
    return result
