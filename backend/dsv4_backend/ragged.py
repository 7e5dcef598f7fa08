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

from dsv4_backend.errors import argument_error


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


def check_batch(
    operator: str, query_start_loc: torch.Tensor, seq_lens: torch.Tensor, tokens: int
) -> None:
    """Raise ArgumentError unless the offsets start at 0,
    never fall, end at T and fit the sequence lengths.
    """
    offsets, lengths = query_start_loc.tolist(), seq_lens.tolist()
    if len(offsets) != len(lengths) + 1:
        raise argument_error(
            operator, "query_start_loc", f"{len(offsets)} offsets", f"{len(lengths) + 1} (R + 1)"
        )
    if offsets[0] != 0 or offsets[-1] != tokens:
        expected = f"offsets from 0 to the number of tokens {tokens}"
        raise argument_error(
            operator, "query_start_loc", f"{offsets[0]} .. {offsets[-1]}", expected
        )
    for s, (start, end, length) in enumerate(zip(offsets, offsets[1:], lengths, strict=False)):
        if end < start:
            raise argument_error(
                operator, "query_start_loc", f"{start} then {end} at {s}", "offsets that never fall"
            )
        if length < end - start:
            expected = f"at least the {end - start} tokens of this call"
            raise argument_error(operator, "seq_lens", f"{length} at {s}", expected)


def check_table(
    operator: str,
    name: str,
    block_table: torch.Tensor,
    first: torch.Tensor,
    after: torch.Tensor,
    cache: torch.Tensor,
    first_block: int = 0,
) -> None:
    """Raise ArgumentError unless indices first[s] ..
    after[s]-1 of every sequence have distinct rows of the cache, in blocks from first_block on.
    """
    num_blocks, block_size = cache.shape[:2]
    columns = block_table.shape[1]
    rows = (after - first).clamp(min=0)
    if (rows > columns * block_size).any():
        s = int((rows > columns * block_size).nonzero()[0])
        expected = (
            f"at least {int(rows[s])}, to hold indices {int(first[s])} to {int(after[s]) - 1} of "
            f"sequence {s}"
        )
        raise argument_error(operator, name, f"{columns} columns of {block_size} rows", expected)
    low, high = first // block_size, (after - 1) // block_size
    needed = torch.where(rows > 0, high - low + 1, 0)
    if columns == 0:
        return
    distance = (torch.arange(columns) - low[:, None]) % columns
    wrong = (distance < needed[:, None]) & (
        (block_table < first_block) | (block_table >= num_blocks)
    )
    if wrong.any():
        s, column = wrong.nonzero()[0].tolist()
        raise argument_error(
            operator,
            name,
            f"{int(block_table[s, column])} at [{s}, {column}]",
            f"{first_block} to {num_blocks - 1}",
        )


def check_absolute(
    operator: str, name: str, block_table: torch.Tensor, cache: torch.Tensor, rows: int
) -> None:
    """Raise ArgumentError unless a table has columns for `rows` rows."""
    columns, block_size = block_table.shape[1], cache.shape[1]
    if columns * block_size < rows:
        expected = f"an absolute table, of at least {rows} rows"
        raise argument_error(operator, name, f"{columns} columns of {block_size} rows", expected)


def check_bound(operator: str, max_seq_len: int, seq_lens: torch.Tensor) -> None:
    """Raise ArgumentError unless max_seq_len is at least every seq_lens."""
    if len(seq_lens) and int(seq_lens.max()) > max_seq_len:
        expected = f"at least {int(seq_lens.max())}, as in seq_lens"
        raise argument_error(operator, "max_seq_len", max_seq_len, expected)


def check_layout(
    operator: str,
    name: str,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
) -> None:
    """Raise ArgumentError for a cache or table without rows,
    or offsets that are not one more than the sequences.
    """
    if 0 in cache.shape[:2] or block_table.shape[1] == 0:
        found = f"cache {tuple(cache.shape)} with {block_table.shape[1]} columns"
        raise argument_error(
            operator, name, found, "at least one block, one row per block and one column"
        )
    if query_start_loc.shape[0] != block_table.shape[0] + 1:
        expected = f"{block_table.shape[0] + 1} (R + 1)"
        raise argument_error(
            operator, "query_start_loc", f"{query_start_loc.shape[0]} offsets", expected
        )


def check_distinct(operator: str, name: str, flat: torch.Tensor) -> None:
    """Raise ArgumentError if two rows of this call would be written to one cache row."""
    found, counts = flat.unique(return_counts=True)
    if found.numel() != flat.numel():
        raise argument_error(
            operator, name, f"cache row {int(found[counts > 1][0])} written twice", "distinct rows"
        )
