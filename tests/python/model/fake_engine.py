"""A serving engine's side of paged caches, over nothing but what adapters of engines use.

It groups cache parts at random, gives each group blocks of its own size out of one pool, frees what
a window has passed as early as it may, shares blocks of common prefixes, pads batches, and fills
with garbage what nobody may read: freed blocks hold NaN, unused columns ids that mean nothing.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from dsv4_ascend.integrations.serving import CachePart, StepTables, cache_parts, layer_caches
from dsv4_ascend.model.batch import Batch
from dsv4_ascend.model.model import Model
from dsv4_ascend.model.paged import LayerCache
from dsv4_backend import dispatch

NAN = 0x7FC07FC0  # as fp32, and as bf16 in both halves


class Group(NamedTuple):
    """Parts under one block table, in blocks of `block_tokens` tokens."""

    parts: list[CachePart]
    block_tokens: int
    window: int | None


Sizes = dict[str, list[int]]


def random_groups(parts: list[CachePart], sizes: Sizes, rng: random.Random) -> list[Group]:
    """Parts that keep the same tokens in blocks of one size, split further by chance."""
    found: dict[tuple[object, ...], list[CachePart]] = {}
    for part in parts:
        key = rng.choice(sizes[part.name]), part.window, rng.random() < 0.3
        found.setdefault(key, []).append(part)
    return [Group(members, key[0], key[1]) for key, members in found.items()]


class Pages:
    """Memory of all parts, apart or packed: a block holds a page of every part of its group."""

    def __init__(self, groups: list[Group], blocks: int, packed: bool, rng: random.Random) -> None:
        self.tensors: dict[CachePart, torch.Tensor] = {}
        self._buffers: list[torch.Tensor] = []
        layouts = [[(g, part)] for g in groups for part in g.parts]
        if packed:
            layouts = [[(g, part) for part in g.parts] for g in groups]
        offsets = [self._offsets(layout, rng) for layout in layouts]
        ends = [end for *_, end in offsets]
        shared = torch.empty(blocks, max(ends) // 4, dtype=torch.int32) if packed else None
        for layout, places in zip(layouts, offsets, strict=True):
            own = shared
            if own is None:
                own = torch.empty(blocks, places[-1] // 4, dtype=torch.int32)
            self._buffers.append(own)
            for (group, part), offset in zip(layout, places, strict=False):
                rows = group.block_tokens // part.tokens
                self.tensors[part] = _page_view(own, part, rows, offset)
        self.forget(slice(None))

    @staticmethod
    def _offsets(layout: list[tuple[Group, CachePart]], rng: random.Random) -> list[int]:
        offsets = [0]
        for group, part in layout:
            size = group.block_tokens // part.tokens * part.width * part.dtype.itemsize
            offsets[-1] += 16 * rng.randrange(3)
            offsets.append(offsets[-1] + size)
        return offsets

    def forget(self, block: int | slice) -> None:
        """Fill a block with NaN."""
        for buffer in self._buffers:
            buffer[block] = NAN


def _page_view(buffer: torch.Tensor, part: CachePart, rows: int, offset: int) -> torch.Tensor:
    size = part.dtype.itemsize
    stride = (buffer.shape[1] * 4 // size, part.width, 1)
    shape = (buffer.shape[0], rows, part.width)
    return buffer.view(part.dtype).as_strided(shape, stride, offset // size)


@dataclass
class Request:
    """A sequence: how many tokens are in, and per group the block of every column it holds."""

    blocks: list[dict[int, int]]
    computed: int = 0


@dataclass
class Work:
    """New tokens of a request in one step, and the token that follows each."""

    request: Request
    ids: list[int]
    next_ids: list[int]


class Ran(NamedTuple):
    """A step that ran: its batch, caches, streams, and the empty sequences in it."""

    batch: Batch
    layers: list[LayerCache]
    streams: torch.Tensor
    empty: int


@dataclass
class FakeEngine:
    """Runs steps of continuous batches. Subclasses plant faults in its decisions."""

    model: Model
    rng: random.Random
    max_tokens: int
    sizes: Sizes
    packed: bool = True
    check_contents: bool = True
    bound_lengths: bool = False
    blocks: int = 900
    padding: int = 0
    freed: int = 0
    users: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.parts = cache_parts(self.model.config, self.model.profile)
        self.groups = random_groups(self.parts, self.sizes, self.rng)
        self.pages = Pages(self.groups, self.blocks, self.packed, self.rng)
        self.granularity = math.lcm(*(group.block_tokens for group in self.groups))
        self._free = self.rng.sample(range(1, self.blocks), self.blocks - 1)  # 0 belongs to nobody

    # Decisions

    def passed(self, group: Group, computed: int) -> int:
        """Tokens at the start that no later step reads."""
        return 0 if group.window is None else max(0, computed - group.window + 1)

    def shareable(self, computed: int) -> bool:
        """Whether the blocks of that many tokens can be shared."""
        return computed > 0 and computed % self.granularity == 0

    def group_of(self, part: CachePart) -> int:
        """Number of the group whose table a part gets."""
        return next(i for i, group in enumerate(self.groups) if part in group.parts)

    # Blocks

    def new_request(self, prefix: Request | None = None) -> Request:
        """An empty request, or one that starts with the shared blocks of a prefix."""
        if prefix is None:
            return Request([{} for _ in self.groups])
        self.users.update(block for held in prefix.blocks for block in held.values())
        return Request([dict(held) for held in prefix.blocks], prefix.computed)

    def prefix_of(self, request: Request) -> Request:
        """What a later request needs to go on after this one's tokens."""
        self._free_passed(request)
        kept = Request([], request.computed)
        for group, held in zip(self.groups, request.blocks, strict=True):
            columns = -(-request.computed // group.block_tokens)
            kept.blocks.append({c: block for c, block in held.items() if c < columns})
        return self.new_request(kept)

    def release(self, request: Request) -> None:
        """Give back all blocks."""
        for held in request.blocks:
            self._drop(held, list(held))

    def _drop(self, held: dict[int, int], columns: list[int]) -> None:
        for column in columns:
            block = held.pop(column)
            self.users[block] -= 1
            if not self.users[block]:
                self.pages.forget(block)
                self._free.append(block)
                self.freed += 1

    def _free_passed(self, request: Request) -> None:
        for group, held in zip(self.groups, request.blocks, strict=True):
            end = self.passed(group, request.computed) // group.block_tokens
            self._drop(held, [column for column in held if column < end])

    def _allocate(self, request: Request, tokens: int) -> None:
        for group, held in zip(self.groups, request.blocks, strict=True):
            first = self.passed(group, request.computed) // group.block_tokens
            for column in range(first, -(-tokens // group.block_tokens)):
                if column not in held:
                    recent = min(len(self._free), self.rng.choice([3, self.blocks]))
                    held[column] = self._free.pop(-self.rng.randint(1, recent))
                    self.users[held[column]] += 1

    # Steps

    def step(self, work: list[Work]) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Streams of the layers and of the MTP block, and how many empty sequences it added."""
        ran = self.run(work)
        return ran.streams, self.draft(ran, [i for item in work for i in item.next_ids]), ran.empty

    def run(self, work: list[Work], ahead: int = 0) -> Ran:
        """Run the layers. ahead: tokens per request that get room, for drafts made in between."""
        for item in work:
            self._free_passed(item.request)
        for item in work:
            self._allocate(item.request, item.request.computed + len(item.ids) + ahead)
        empty = self.rng.choice([0, 0, 2])
        lengths = [item.request.computed + len(item.ids) for item in work]
        batch = self._batch([item.ids for item in work], lengths, empty)
        layers = self._layers([item.request for item in work], empty)
        with torch.inference_mode(), dispatch.use(check_contents=self.check_contents):
            streams = self.model.network.run_layers(batch, layers)
        return Ran(batch, layers, streams, empty)

    def draft(self, ran: Ran, next_ids: list[int]) -> torch.Tensor:
        """Streams of the MTP block over a step; next_ids follow its tokens."""
        ids = self._padded(next_ids, len(ran.streams) - len(next_ids))
        with torch.inference_mode(), dispatch.use(check_contents=self.check_contents):
            return self.model.network.run_mtp(0, ids, ran.streams, ran.batch, ran.layers)

    def chained(self, requests: list[Request], lengths: list[int], streams: torch.Tensor) -> Ran:
        """A step for `draft` of one token each that makes the sequences so long."""
        batch = self._batch([[0]] * len(requests), lengths, 0)
        behind = batch.rows - len(streams)
        streams = torch.cat([streams, streams.new_zeros(behind, *streams.shape[1:])])
        return Ran(batch, self._layers(requests, 0), streams, 0)

    def _batch(self, tokens: list[list[int]], lengths: list[int], empty: int) -> Batch:
        starts = [0]
        for ids in tokens:
            starts.append(starts[-1] + len(ids))
        count, behind = starts[-1], self.rng.choice([0, 3])
        self.padding += behind
        return StepTables(
            torch.tensor(starts + [count] * empty, dtype=torch.int32),
            torch.tensor(lengths + [self.rng.randrange(50)] * empty, dtype=torch.int32),
            num_actual_tokens=self.rng.choice([count, None]),
            max_query_len=max(map(len, tokens)) if self.bound_lengths else None,
            max_seq_len=max(lengths) if self.bound_lengths else None,
        ).batch(self._padded([i for ids in tokens for i in ids], behind))

    def _padded(self, ids: list[int], behind: int) -> torch.Tensor:
        garbage = [self.rng.choice([-1, 0, 10**6]) for _ in range(behind)]
        return torch.tensor(ids + garbage, dtype=self.rng.choice([torch.int32, torch.int64]))

    def _layers(self, requests: list[Request], empty: int) -> list[LayerCache]:
        tables = [self._table(i, requests, empty) for i in range(len(self.groups))]
        of_parts = {part: tables[self.group_of(part)] for part in self.parts}
        views = {part: self.rng.choice([t, t[:]]) for part, t in of_parts.items()}
        return layer_caches(self.parts, self.pages.tensors, views)

    def _table(self, number: int, requests: list[Request], empty: int) -> torch.Tensor:
        columns = self.max_tokens // self.groups[number].block_tokens
        held = [request.blocks[number] for request in requests] + [{}] * empty
        rows = [[h[c] if c in h else self._garbage() for c in range(columns)] for h in held]
        return torch.tensor(rows, dtype=torch.int32)

    def _garbage(self) -> int:
        return self.rng.choice([0, -1, 2**31 - 1, -(2**31), self.rng.randrange(self.blocks)])
