"""Paged caches of one model: window keys, compressed entries, indexer keys and compressor states,
in block pools.

A *group* is what shares one block table here (an engine groups in other ways, see paged.py):
"window" (every layer), and per compression ratio "entries:R" (main entries, and the indexer keys of
CSA layers beside them) and "state:R" (the open blocks of the compressors). Window and state groups
are rings, written out as absolute tables: their blocks hold what a step of `max_step_tokens` tokens
can still look back at (ragged.py).
"""

from __future__ import annotations

from collections.abc import Sequence as Sequences
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from dsv4_ascend.arguments import MAX_SIZE, integer
from dsv4_ascend.checkpoint.config import V4Config
from dsv4_ascend.model.cache_parts import PartRows, layer_parts, state_tokens
from dsv4_ascend.model.paged import FLOATS, BytePaged, ByteRows, CacheFormats, LayerCache, Paged
from dsv4_ascend.model.rotary import frequencies_by_ratio
from dsv4_backend.errors import ArgumentError


@dataclass(frozen=True)
class Group:
    """Geometry of one block table: one cache row per `ratio` tokens;
    `ring_rows` rows if old rows are forgotten.
    """

    name: str
    ratio: int
    ring_rows: int | None

    def columns(self, tokens: int, block_size: int) -> int:
        """Blocks that a sequence of `tokens` tokens needs."""
        rows = self.ring_rows if self.ring_rows is not None else tokens // self.ratio
        return -(-rows // block_size)


_GROUPS = {
    "window": "window",
    "entries": "entries:{}",
    "index_keys": "entries:{}",
    "state": "state:{}",
    "index_state": "state:{}",
}
"""Part -> the group whose table finds its rows, by compression ratio."""


def cache_groups(config: V4Config, max_step_tokens: int) -> dict[str, Group]:
    """The groups that the layers of `config` need when no call brings more
    than `max_step_tokens` of a sequence.
    """
    groups = {"window": Group("window", 1, config.sliding_window - 1 + max_step_tokens)}
    for kind, ratio in zip(config.layer_kinds, config.compress_ratios, strict=True):
        if ratio:
            lookback = state_tokens(kind, ratio) - 1
            state = Group(f"state:{ratio}", 1, lookback + max_step_tokens)
            groups[f"entries:{ratio}"] = Group(f"entries:{ratio}", ratio, None)
            groups[state.name] = max(
                state, groups.get(state.name, state), key=lambda g: g.ring_rows or 0
            )
    return groups


def _handed_out(blocks: int, free_order: int | None) -> list[int]:
    """Blocks 1 to `blocks`, the first to hand out last."""
    if free_order is None:
        return list(range(blocks, 0, -1))
    generator = torch.Generator().manual_seed(free_order)
    return (1 + torch.randperm(blocks, generator=generator)).flip(0).tolist()


class Pool(NamedTuple):
    """The pages of one part of one layer, and the group whose table finds rows in them.

    rows: what the pages hold as bytes, None for floats.
    """

    group: str
    pages: torch.Tensor
    rows: ByteRows | None = None

    def part(self, table: torch.Tensor) -> Paged:
        """The pages with a table."""
        return (
            Paged(self.pages, table)
            if self.rows is None
            else BytePaged(self.pages, table, self.rows)
        )


@dataclass
class CachedSequence:
    """One sequence in the cache: how many tokens are in, and its blocks per group."""

    length: int = 0
    blocks: dict[str, list[int]] = field(default_factory=dict)


class PagedCache:
    """Block pools for up to `max_sequences` sequences of up to `max_tokens` tokens.

    block_size: rows per block, any positive number. max_step_tokens: tokens of one sequence in one
    call, at most. Blocks are handed out in the order of `free_order` (a permutation seed, None for
    ascending): results do not depend on it. Block 0 of a pool belongs to nobody. dtype: of rows as
    they are read. formats: in which bytes they are kept. joined: whether the network's launchers
    turn queries, keys and entries of a step in one buffer (joined.py). Source of the geometry:
    spec/v4.md 4.8, 4.3.1 (position-addressed state).
    """

    def __init__(
        self,
        config: V4Config,
        *,
        max_sequences: int,
        max_tokens: int,
        max_step_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        block_size: int = 64,
        free_order: int | None = None,
        formats: CacheFormats = FLOATS,
        joined: bool = False,
    ) -> None:
        block_size = integer("block_size", block_size, 1, MAX_SIZE)
        max_step_tokens = integer("max_step_tokens", max_step_tokens, 1, MAX_SIZE)
        max_sequences = integer("max_sequences", max_sequences, 0, MAX_SIZE)
        max_tokens = integer("max_tokens", max_tokens, 0, MAX_SIZE)
        self.block_size, self.max_tokens = block_size, max_tokens
        self.config, self.joined, self.max_step_tokens = config, joined, max_step_tokens
        self.groups = cache_groups(config, max_step_tokens)
        self.device = torch.device(device)
        self.frequencies = frequencies_by_ratio(config)
        self._free: dict[str, list[int]] = {}
        counts = {}
        for name, group in self.groups.items():
            blocks = max(1, max_sequences * group.columns(max_tokens, block_size))
            counts[name] = 1 + blocks
            self._free[name] = _handed_out(blocks, free_order)

        def pool(part: PartRows, ratio: int) -> Pool:
            group = _GROUPS[part.name].format(ratio)
            if part.rows is None:
                shape = counts[group], block_size, part.width
                return Pool(group, torch.zeros(shape, dtype=part.dtype, device=self.device))
            rows = part.rows._replace(block_size=block_size)
            return Pool(group, rows.empty(counts[group], self.device), rows)

        kinds = zip(config.layer_kinds, config.compress_ratios, strict=True)
        self.pools = [
            {p.name: pool(p, ratio) for p in layer_parts(kind, ratio, config, formats, dtype)}
            for kind, ratio in kinds
        ]

    def new_sequence(self) -> CachedSequence:
        """An empty sequence; it takes blocks as it grows."""
        return CachedSequence(blocks={name: [] for name in self.groups})

    def grow(self, sequence: CachedSequence, tokens: int) -> None:
        """Make room for `tokens` more tokens.
        ArgumentError when the step or the cache is too small.
        """
        length = sequence.length + tokens
        if tokens > self.max_step_tokens:
            raise ArgumentError(
                f"a step of {tokens} tokens; this cache was made for at most {self.max_step_tokens}"
            )
        if length > self.max_tokens:
            raise ArgumentError(
                f"a sequence of {length} tokens; this cache was made for at most {self.max_tokens}"
            )
        needed = {}
        for name, group in self.groups.items():
            needed[name] = group.columns(length, self.block_size) - len(sequence.blocks[name])
            if needed[name] > len(self._free[name]):
                raise ArgumentError(f"cache group {name!r} is out of blocks: free a sequence first")
        for name, count in needed.items():
            sequence.blocks[name] += [self._free[name].pop() for _ in range(count)]
        sequence.length = length

    def rollback(self, sequence: CachedSequence, tokens: int) -> None:
        """Forget the last `tokens` tokens (a rejected draft);
        what they wrote is overwritten by their successors.
        """
        if not 0 <= tokens <= min(sequence.length, self.max_step_tokens - 1):
            raise ArgumentError(f"rollback of {tokens} tokens from a sequence of {sequence.length}")
        sequence.length -= tokens

    def free(self, sequence: CachedSequence) -> None:
        """Give all blocks back; the sequence is empty afterwards."""
        for name, blocks in sequence.blocks.items():
            self._free[name] += blocks
            blocks.clear()
        sequence.length = 0

    def block_tables(
        self, sequences: Sequences[CachedSequence], tokens: int
    ) -> dict[str, torch.Tensor]:
        """Per group an absolute int32 table [R, columns] on the host, -1 where a sequence has no
        block, for sequences of up to `tokens` tokens.

        The blocks of a ring come again and again, up to the last column.
        """
        tables = {}
        for name, group in self.groups.items():
            rows = tokens // group.ratio
            columns = max(1, -(-rows // self.block_size))
            table = torch.full((len(sequences), columns), -1, dtype=torch.int32)
            for row, sequence in zip(table, sequences, strict=True):
                blocks = torch.tensor(sequence.blocks[name][:columns], dtype=torch.int32)
                if group.ring_rows is not None and len(blocks):
                    blocks = blocks.repeat(-(-columns // len(blocks)))[:columns]
                row[: len(blocks)] = blocks
            tables[name] = table
        return tables

    def layers(self, tables: dict[str, torch.Tensor]) -> list[LayerCache]:
        """The parts of every block, MTP blocks last, with tables as of `block_tables`."""

        def parts(pools: dict[str, Pool]) -> dict[str, Paged]:
            return {name: pool.part(tables[pool.group]) for name, pool in pools.items()}

        return [LayerCache(**parts(pools)) for pools in self.pools]

    def parts_by_group(self, layers: Sequences[LayerCache]) -> dict[str, Paged]:
        """One part of each group, of `layers`."""
        parts: dict[str, Paged] = {}
        for pools, layer in zip(self.pools, layers, strict=True):
            for name, pool in pools.items():
                parts.setdefault(pool.group, getattr(layer, name))
        return parts
