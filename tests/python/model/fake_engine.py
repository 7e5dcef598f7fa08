"""A serving engine's side of paged caches, over nothing but `build_batch` and `LayerCache`.

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

from dsv4_ascend.model.batch import build_batch
from dsv4_ascend.model.model import Model
from dsv4_ascend.model.paged import LayerCache, Paged
from dsv4_backend import dispatch

NAN = 0x7FC07FC0  # as fp32, and as bf16 in both halves
STATE = torch.float32


class Part(NamedTuple):
    """A cache part of one layer: tokens per row, and how many tokens it keeps (None: all)."""

    layer: int
    name: str
    width: int
    dtype: torch.dtype
    tokens: int
    window: int | None


def parts_of(model: Model) -> list[Part]:
    """What an adapter declares to an engine, layer by layer."""
    config, dtype, found = model.config, model.dtype, []
    shapes = zip(config.layer_kinds, config.compress_ratios, strict=True)
    for i, (kind, ratio) in enumerate(shapes):
        d, index, blocks = config.head_dim, config.index_head_dim, 2 if kind == "csa" else 1
        found.append(Part(i, "window", d, dtype, 1, config.sliding_window))
        if kind != "swa":
            found.append(Part(i, "entries", d, dtype, ratio, None))
            found.append(Part(i, "state", 2 * blocks * d, STATE, 1, blocks * ratio))
        if kind == "csa":
            found.append(Part(i, "index_keys", index, dtype, ratio, None))
            found.append(Part(i, "index_state", 4 * index, STATE, 1, 2 * ratio))
    return found


class Group(NamedTuple):
    """Parts under one block table, in blocks of `block_tokens` tokens."""

    parts: list[Part]
    block_tokens: int
    window: int | None


Sizes = dict[str, list[int]]


def random_groups(parts: list[Part], sizes: Sizes, rng: random.Random) -> list[Group]:
    """Parts that keep the same tokens in blocks of one size, split further by chance."""
    found: dict[tuple[object, ...], list[Part]] = {}
    for part in parts:
        key = rng.choice(sizes[part.name]), part.window, rng.random() < 0.3
        found.setdefault(key, []).append(part)
    return [Group(members, key[0], key[1]) for key, members in found.items()]


class Pages:
    """Memory of all parts, apart or packed: a block holds a page of every part of its group."""

    def __init__(self, groups: list[Group], blocks: int, packed: bool, rng: random.Random) -> None:
        self.tensors: dict[Part, torch.Tensor] = {}
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
    def _offsets(layout: list[tuple[Group, Part]], rng: random.Random) -> list[int]:
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


def _page_view(buffer: torch.Tensor, part: Part, rows: int, offset: int) -> torch.Tensor:
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
        self.groups = random_groups(parts_of(self.model), self.sizes, self.rng)
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

    def group_of(self, part: Part) -> int:
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
        for item in work:
            self._free_passed(item.request)
        for item in work:
            self._allocate(item.request, item.request.computed + len(item.ids))
        lengths = [item.request.computed + len(item.ids) for item in work]
        starts = [0]
        for item in work:
            starts.append(starts[-1] + len(item.ids))
        tokens, empty, behind = starts[-1], self.rng.choice([0, 0, 2]), self.rng.choice([0, 3])
        self.padding += behind
        batch = build_batch(
            self._padded([i for item in work for i in item.ids], behind),
            torch.tensor(starts + [tokens] * empty, dtype=torch.int32),
            torch.tensor(lengths + [self.rng.randrange(50)] * empty, dtype=torch.int32),
            num_actual_tokens=self.rng.choice([tokens, None]),
            max_query_len=max(len(item.ids) for item in work) if self.bound_lengths else None,
            max_seq_len=max(lengths) if self.bound_lengths else None,
        )
        layers = self._layers([item.request for item in work], empty)
        network = self.model.network
        with torch.inference_mode(), dispatch.use(check_contents=self.check_contents):
            streams = network.run_layers(batch, layers)
            next_ids = self._padded([i for item in work for i in item.next_ids], behind)
            drafted = network.run_mtp(0, next_ids, streams, batch, layers)
        return streams, drafted, empty

    def _padded(self, ids: list[int], behind: int) -> torch.Tensor:
        garbage = [self.rng.choice([-1, 0, 10**6]) for _ in range(behind)]
        return torch.tensor(ids + garbage, dtype=self.rng.choice([torch.int32, torch.int64]))

    def _layers(self, requests: list[Request], empty: int) -> list[LayerCache]:
        tables = [self._table(i, requests, empty) for i in range(len(self.groups))]
        layers: dict[int, dict[str, Paged]] = {}
        for part, pages in self.pages.tensors.items():
            table = tables[self.group_of(part)]
            view = self.rng.choice([table, table[:]])
            layers.setdefault(part.layer, {})[part.name] = Paged(pages, view)
        return [LayerCache(**layers[i]) for i in sorted(layers)]

    def _table(self, number: int, requests: list[Request], empty: int) -> torch.Tensor:
        columns = self.max_tokens // self.groups[number].block_tokens
        held = [request.blocks[number] for request in requests] + [{}] * empty
        rows = [[h[c] if c in h else self._garbage() for c in range(columns)] for h in held]
        return torch.tensor(rows, dtype=torch.int32)

    def _garbage(self) -> int:
        return self.rng.choice([0, -1, 2**31 - 1, -(2**31), self.rng.randrange(self.blocks)])
