"""What is asked: one model on so many devices, checked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsv4_ascend.arguments import integer
from dsv4_ascend.checkpoint.config import V4Config
from dsv4_ascend.checkpoint.config_file import read_noted_config
from dsv4_ascend.plan.cache import Geometry, geometry
from dsv4_ascend.plan.formats import CacheFormat, Precision, cache_named, precision_named
from dsv4_ascend.plan.layout import Layout, parse_layout
from dsv4_ascend.plan.numbers import Number, Numbers, device_numbers
from dsv4_ascend.plan.shapes import Shapes, shapes
from dsv4_ascend.plan.tables import DEVICES
from dsv4_backend.errors import ArgumentError

RELEASES = {"flash": V4Config.flash, "pro": V4Config.pro}
MOST_DEVICES = 8192
"""The largest system that planner.md names: an Atlas 950 SuperPoD."""
MOST_REQUESTS = 10**6
MOST_DRAFTS = 3
"""Drafts of an MTP block whose acceptance somebody published."""
_SMALLEST_CONTEXT = 1


@dataclass(frozen=True)
class Question:
    """Everything that an answer depends on. roofline: the numbers with nothing lost.

    batch: requests in flight on all devices; layout: None means the search chooses; size_gb: of
    the memory variant; graph: whether decode steps are captured.
    """

    model: str
    shapes: Shapes
    device: str
    count: int
    context: int
    batch: int
    drafts: int
    precision: Precision
    cache: CacheFormat
    pages: Geometry
    layout: Layout | None
    graph: bool
    size_gb: float
    numbers: Numbers
    roofline: Numbers
    notes: tuple[str, ...] = ()

    @property
    def chip(self) -> str:
        """A2, A3, A5 or CUDA."""
        chip: str = DEVICES["devices"][self.device]["chip"]
        return chip

    @property
    def preset(self) -> str:
        """The row of `presets`."""
        preset: str = DEVICES["devices"][self.device]["preset"]
        return preset

    @property
    def preset_note(self) -> str:
        """What the preset was compared with, and when."""
        note: str = DEVICES["presets"][self.preset]["note"]
        return note

    @property
    def accepted(self) -> float:
        """Drafts that a step accepts on average."""
        return self.numbers[f"accepted_{self.drafts}"] if self.drafts else 0.0

    def with_numbers(self, assignments: Sequence[str]) -> Question:
        """The same question after `KEY=VALUE` changes."""
        numbers, roofline = _changed(self.numbers, self.roofline, assignments)
        return replace(self, numbers=numbers, roofline=roofline)


@dataclass(frozen=True)
class Options:
    """The words of a command line; None is what the device or the model makes of it."""

    model: str
    device: str
    count: int
    context: int
    batch: int | None = None
    precision: str | None = None
    layout: str | None = None
    draft_tokens: int | None = None
    cache: str | None = None
    block_size: int = 128
    memory: float | None = None
    graph: bool = True
    changes: Sequence[str] = ()


def _device(name: str) -> str:
    """The device of that name, in capitals or not."""
    for known in DEVICES["devices"]:
        if known.upper() == name.upper():
            return str(known)
    raise ArgumentError(
        f"--device: found {name[:40]!r}, expected one of {', '.join(DEVICES['devices'])}"
    )


def ask(options: Options) -> Question:
    """The question behind a command line; ArgumentError names the option that is wrong,
    ConfigError what is wrong in a folder.
    """
    options = replace(options, device=_device(options.device))
    count = integer(
        "--count (devices; 8192 in the largest SuperPoD)", options.count, 1, MOST_DEVICES
    )
    config, notes = _model(options.model)
    model = shapes(config)
    longest = config.max_position_embeddings
    context = integer(
        f"--context (tokens; {options.model} is made for {longest:,})",
        options.context, _SMALLEST_CONTEXT, longest,
    )  # fmt: skip
    asked = count if options.batch is None else options.batch
    batch = integer("--batch (requests on all devices)", asked, 1, MOST_REQUESTS)
    row = DEVICES["devices"][options.device]
    variant = _variant(options.device, options.memory)
    size_gb = variant.pop("size_gb")
    visible = Number("visible_gb", variant.pop("visible_gb"), **variant)
    numbers = device_numbers(options.device, visible, row["preset"])
    roofline = numbers.with_preset(DEVICES["presets"]["roofline"])
    numbers, roofline = _changed(numbers, roofline, options.changes)
    if not options.graph:
        numbers = numbers.as_if("gap_us", "eager_us", "--no-graph")
    return Question(
        model=options.model,
        shapes=model,
        device=options.device,
        count=count,
        context=context,
        batch=batch,
        drafts=_drafts(options.draft_tokens, model),
        precision=precision_named(
            row["precision"] if options.precision is None else options.precision,
            options.device, numbers,
        ),
        cache=cache_named(
            row["cache"] if options.cache is None else options.cache, options.device
        ),
        pages=geometry(options.block_size, row["chip"]),
        layout=None if options.layout is None else parse_layout(options.layout, count),
        graph=options.graph,
        size_gb=size_gb,
        numbers=numbers,
        roofline=roofline,
        notes=notes,
    )  # fmt: skip


_LOST = frozenset(key for key in DEVICES["presets"]["roofline"] if key != "note")
"""Numbers that a preset decides: the roofline keeps its own, whatever --set says."""


def _changed(
    numbers: Numbers, roofline: Numbers, assignments: Sequence[str]
) -> tuple[Numbers, Numbers]:
    kept = [one for one in assignments if one.partition("=")[0] not in _LOST]
    return numbers.changed(assignments), roofline.changed(kept)


def _model(name: str) -> tuple[V4Config, tuple[str, ...]]:
    if name in RELEASES:
        return RELEASES[name](), ()
    if not name or "\0" in name or not os.path.isdir(name):
        raise ArgumentError(
            f"--model: found {name[:80]!r}, expected {' or '.join(RELEASES)}, "
            "or a folder with the config.json of a V4 model"
        )
    return read_noted_config(Path(name))


def _drafts(asked: int | None, model: Shapes) -> int:
    if asked is None:
        return 1 if model.can_draft else 0
    drafts = integer("--draft-tokens", asked, 0, MOST_DRAFTS)
    if drafts and not model.can_draft:
        what = (
            "drafts with DSpark, whose time is not modelled"
            if model.config.dspark
            else ("has no draft block")
        )
        raise ArgumentError(f"--draft-tokens: found {drafts}, but the model {what}; expected 0")
    return drafts


def variants(device: str) -> list[dict[str, Any]]:
    """The memory sizes that sources give a device, the smallest first."""
    return [dict(row) for row in DEVICES["devices"][device]["memory"]]


def _variant(device: str, size: float | None) -> dict[str, Any]:
    rows = variants(device)
    if size is None:
        return rows[0]
    for row in rows:
        if row["size_gb"] == size:
            return row
    known = " or ".join(f"{row['size_gb']:g}" for row in rows)
    raise ArgumentError(
        f"--memory: found {size:g} GB, expected {known}, which sources give {device}; "
        "for another size --set visible_gb=VALUE"
    )
