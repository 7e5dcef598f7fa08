"""One step of a ragged batch: its tokens and all index tensors that the layers share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dsv4_ascend.model.cache import CachedSequence, PagedCache
from dsv4_backend import ragged


@dataclass(frozen=True)
class RatioIndex:
    """What layers of one compression ratio share. `entry_slots` and `visible` are int64 [rows] and int32 [T]."""

    state_table: torch.Tensor
    entry_table: torch.Tensor
    entry_slots: torch.Tensor
    visible: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """T new tokens of R sequences, flattened (see dsv4_backend.ragged)."""

    input_ids: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    positions: torch.Tensor
    window_table: torch.Tensor
    window_slots: torch.Tensor
    ratios: dict[int, RatioIndex]

    @property
    def last_rows(self) -> torch.Tensor:
        """Row of every sequence's last token; meaningless for a sequence without tokens in this step."""
        return self.query_start_loc[1:].long() - 1


def make_batch(
    cache: PagedCache, sequences: Sequence[CachedSequence], tokens: Sequence[Sequence[int]] | Sequence[torch.Tensor]
) -> Batch:
    """Grow every sequence by its tokens (possibly none) and build the step. Nothing is written to the cache tensors.

    tokens: per sequence the new token ids. ArgumentError (from the cache) when there is no room.
    """
    device = cache.device
    ids = [torch.as_tensor(t, dtype=torch.int64) for t in tokens]
    for sequence, new in zip(sequences, ids, strict=True):
        cache.grow(sequence, len(new))
    lengths = torch.tensor([0] + [len(new) for new in ids])
    query_start_loc = lengths.cumsum(0).to(device, torch.int32)
    seq_lens = torch.tensor([s.length for s in sequences], dtype=torch.int32, device=device)
    input_ids = torch.cat([*ids, torch.zeros(0, dtype=torch.int64)]).to(device)
    tables = cache.block_tables(sequences)
    size, total = cache.block_size, input_ids.shape[0]
    owner = ragged.token_sequences(query_start_loc, total)
    positions = ragged.token_positions(query_start_loc, seq_lens, total)
    ratios = {}
    for ratio in sorted({g.ratio for g in cache.groups.values() if g.ring_rows is None}):
        entry_table = tables[f"entries:{ratio}"]
        sequence_of, block = ragged.closed_blocks(query_start_loc, seq_lens, total, ratio)
        ratios[ratio] = RatioIndex(
            state_table=tables[f"state:{ratio}"],
            entry_table=entry_table,
            entry_slots=ragged.slots(entry_table, sequence_of, block, size),
            visible=((positions + 1) // ratio).int(),
        )
    return Batch(
        input_ids=input_ids,
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        positions=positions,
        window_table=tables["window"],
        window_slots=ragged.slots(tables["window"], owner, positions, size),
        ratios=ratios,
    )
