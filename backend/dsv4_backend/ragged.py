"""Ragged batches and paged caches: the index arithmetic that every cached operator shares.

A call carries T tokens of R sequences, flattened: sequence s owns rows query_start_loc[s] ..
query_start_loc[s+1]-1, and seq_lens[s] counts its tokens *including* these. So row t of sequence s
has position ``seq_lens[s] - query_start_loc[s+1] + t``. A paged cache is
`[num_blocks, block_size, D]`; index i of sequence s lives in block
``block_table[s, (i // block_size) % columns]``: a table with fewer columns than the sequence has
blocks is a ring, which is how sliding windows and compressor states forget.
"""

from __future__ import annotations

import torch


def token_sequences(query_start_loc: torch.Tensor, tokens: int) -> torch.Tensor:
    """Sequence of every token: int64 [T]."""
    rows = torch.arange(tokens, device=query_start_loc.device, dtype=query_start_loc.dtype)
    return torch.searchsorted(query_start_loc[1:].contiguous(), rows, right=True)


def token_positions(
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, tokens: int
) -> torch.Tensor:
    """Absolute 0-based position of every token: int64 [T]."""
    sequence = token_sequences(query_start_loc, tokens)
    offset = (seq_lens - query_start_loc[1:]).long()
    return torch.arange(tokens, device=query_start_loc.device) + offset[sequence]


def closed_blocks(
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, tokens: int, ratio: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sequence, block) of every compressed entry that this call closes:
    two int64 [min(T, T // ratio + R)].

    Sequences in order, blocks in order; rows past the last closed block have block -1 and
    sequence 0.
    """
    ends = seq_lens.long()
    first = (ends - query_start_loc.diff()) // ratio
    after = (ends // ratio - first).cumsum(0)
    row = torch.arange(min(tokens, tokens // ratio + seq_lens.shape[0]), device=seq_lens.device)
    sequence = torch.searchsorted(after, row, right=True)
    present = sequence < seq_lens.shape[0]
    sequence = torch.where(present, sequence, 0)
    before = torch.where(sequence > 0, after[sequence - 1], 0)
    return sequence, torch.where(present, first[sequence] + row - before, -1)


def entries_to_read(
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, ratio: int
) -> torch.Tensor:
    """Compressed entries of every sequence that has tokens in this call,
    0 for the others: int64 [R].
    """
    return torch.where(query_start_loc.diff() > 0, seq_lens.long() // ratio, 0)


def slots(
    block_table: torch.Tensor, sequence: torch.Tensor, index: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Flat cache rows (block * block_size + offset) of `index` in `sequence`,
    broadcast together: int64.

    Rows of negative indices and of absent blocks (-1 in the table) are -1.
    """
    columns = block_table.shape[1]
    safe = index.clamp(min=0)
    block = block_table.long()[sequence, safe // block_size % columns]
    return torch.where((index >= 0) & (block >= 0), block * block_size + safe % block_size, -1)


def gather_rows(cache: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    """Rows of a paged cache `[num_blocks, block_size, D]` at flat slots of any shape;
    -1 gives row 0, to be masked.
    """
    flat, block_size = flat.clamp(min=0), cache.shape[1]
    return cache[flat // block_size, flat % block_size]


def entry_rows(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    sequence: torch.Tensor,
    index: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    """Rows `index` [n] of every named sequence [S],
    0 from lengths[s] (of all R sequences) on: [S, n, D].
    """
    behind = index >= lengths[sequence][:, None]  # the table may hold anything there
    flat = slots(block_table, sequence[:, None], index, cache.shape[1]).masked_fill(behind, -1)
    return gather_rows(cache, flat).masked_fill(behind[..., None], 0)
