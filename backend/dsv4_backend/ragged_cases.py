"""Ragged batches and shuffled block tables for the parity cases of cached operators."""

from __future__ import annotations

import torch

from dsv4_backend.contract import Draw

Sequence = tuple[int, int]
"""(tokens before this call, tokens of this call)"""

SPARE_BLOCKS = 2


def offsets(sequences: list[Sequence]) -> tuple[torch.Tensor, torch.Tensor]:
    """query_start_loc int32 [R+1] and seq_lens int32 [R]."""
    new = torch.tensor([0] + [tokens for _, tokens in sequences])
    lengths = torch.tensor([before + tokens for before, tokens in sequences], dtype=torch.int32)
    return new.cumsum(0).int(), lengths


def tokens_of(sequences: list[Sequence]) -> int:
    """T of a batch."""
    return sum(new for _, new in sequences)


def shuffled_table(
    draw: Draw, sequences: list[Sequence], rows: int, block_size: int
) -> torch.Tensor:
    """Distinct random blocks that hold `rows` rows for every sequence: int32 [R, columns >= 1]."""
    columns = max(1, -(-rows // block_size))
    count = len(sequences) * columns
    return draw.permutation(count + SPARE_BLOCKS)[:count].view(len(sequences), columns).int()


def blocks_of(table: torch.Tensor) -> int:
    """Blocks of a cache for `shuffled_table`, with some that no sequence owns."""
    return table.numel() + SPARE_BLOCKS


def only_blocks(
    table: torch.Tensor, first: torch.Tensor, after: torch.Tensor, block_size: int
) -> torch.Tensor:
    """A copy of a table with nonsense in every entry that indices first[s] ..
    after[s]-1 do not need.
    """
    kept = torch.full_like(table, 1 << 30)
    for s, (low, high) in enumerate(zip(first.tolist(), after.tolist(), strict=True)):
        for i in range(low, high):
            column = i // block_size % table.shape[1]
            kept[s, column] = table[s, column]
    return kept


def only_rows(
    cache: torch.Tensor, table: torch.Tensor, first: torch.Tensor, after: torch.Tensor
) -> torch.Tensor:
    """A copy of a cache with NaN in every row but indices first[s] ..
    after[s]-1 of the sequences.
    """
    kept = torch.full_like(cache, float("nan"))
    block_size = cache.shape[1]
    for row, low, high in zip(table.tolist(), first.tolist(), after.tolist(), strict=True):
        for i in range(low, high):
            at = row[i // block_size % len(row)], i % block_size
            kept[at] = cache[at]
    return kept
