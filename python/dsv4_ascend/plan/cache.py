"""Cache bytes of one request by group, and what pages make of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dsv4_ascend.plan.formats import CacheFormat
from dsv4_ascend.plan.shapes import Shapes
from dsv4_ascend.plan.tables import FORMATS
from dsv4_backend.errors import ArgumentError

COMPRESSED = ("csa", "index", "hca")
"""Groups whose pages are many; the others have a few per request."""
_FLOAT = 4


@dataclass(frozen=True)
class Geometry:
    """vllm-ascend's pages of `--block-size`: rows of a main page, tokens of a page of states."""

    block: int
    csa_state: int
    hca_state: int
    source: str
    confidence: str


@dataclass(frozen=True)
class Cache:
    """One request of `context` tokens, in bytes by group; see `groups_of`.

    rows: what the entries themselves take; paged: what their pages take.
    hit_unit: tokens in whose multiples a prefix is found again.
    """

    context: int
    rows: Mapping[str, int]
    paged: Mapping[str, int]
    hit_unit: int

    @property
    def total(self) -> int:
        """Bytes of the entries."""
        return sum(self.rows.values())

    @property
    def total_paged(self) -> int:
        """Bytes of the pages."""
        return sum(self.paged.values())

    @property
    def waste(self) -> float:
        """Paged bytes of all groups beside their entries', minus one."""
        return self.total_paged / self.total - 1

    @property
    def compressed_waste(self) -> float:
        """The same of the compressed groups alone; 0 where nothing is compressed yet."""
        rows = sum(self.rows[name] for name in COMPRESSED)
        return sum(self.paged[name] for name in COMPRESSED) / rows - 1 if rows else 0.0


def geometry(block: int, chip: str) -> Geometry:
    """The geometry of a block size; ArgumentError for one that vllm-ascend does not have."""
    table = next(one for one in FORMATS["blocks"] if chip in one["chips"])
    for row in table["rows"]:
        if row["block"] == block:
            return Geometry(**row, source=table["source"], confidence=table["confidence"])
    known = ", ".join(str(row["block"]) for row in table["rows"])
    raise ArgumentError(f"--block-size: found {block}, expected one of {known}")


def cache_of(
    shapes: Shapes, form: CacheFormat, pages: Geometry, context: int, drafts: bool
) -> Cache:
    """The caches of one request (planner.md 3.1, 3.2)."""
    config = shapes.config
    entry, index = form.entry_bytes(config), form.index_bytes(config)
    window, block = config.sliding_window, pages.block
    rows: dict[str, int] = dict.fromkeys((*COMPRESSED, "window", "csa state", "hca state"), 0)
    paged = dict(rows)
    units = [block]
    rows["window"] = shapes.layers * window * entry
    paged["window"] = shapes.layers * (-(-window // block) + 1) * block * entry
    for layer in range(shapes.layers):
        kind, ratio = config.kind(layer), config.ratio(layer)
        if kind == "swa":
            continue
        entries = context // ratio
        count = -(-context // (block * ratio))
        rows[kind] += entries * entry
        paged[kind] += count * block * entry
        overlap, held = (2, pages.csa_state) if kind == "csa" else (1, pages.hca_state)
        units += [block * ratio, held]
        # Two fp32 vectors per token: values and scores, of both halves where blocks overlap.
        token = 2 * overlap * config.head_dim * _FLOAT
        rows[f"{kind} state"] += overlap * ratio * token
        count_of_states = -(-overlap * ratio // held) + 1
        paged[f"{kind} state"] += count_of_states * max(held * token, block * entry)
        if kind == "csa":
            rows["index"] += entries * index
            paged["index"] += count * block * index
            token = 2 * overlap * config.index_head_dim * _FLOAT
            rows["csa state"] += overlap * ratio * token
            paged["csa state"] += count_of_states * max(held * token, block * index)
    return Cache(context, rows, paged, math.lcm(*units) * (2 if drafts else 1))
