"""Ragged batches and paged caches for oracles: the addresses of `ragged.py`,
one token and one row at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

from dsv4_backend.proofs.numerics import Array


class Pages:
    """The rows of one sequence in a paged cache [num_blocks, block_size, D], addressed by index.

    Index i lies in the block of column (i // block_size) % columns: a short table is a ring.
    """

    def __init__(self, cache: Array, table: Array) -> None:
        self._cache, self._table = cache, table.tolist()

    def _at(self, index: int) -> tuple[int, int]:
        page, offset = divmod(index, self._cache.shape[1])
        return self._table[page % len(self._table)], offset

    def __getitem__(self, index: int) -> Array:
        row: Array = self._cache[self._at(index)]
        return row

    def __setitem__(self, index: int, row: Array) -> None:
        self._cache[self._at(index)] = row


def tokens_of_call(query_start_loc: Array, seq_lens: Array) -> Iterator[tuple[int, int, int]]:
    """(row, sequence, position) of every token, in order;
    seq_lens counts the tokens of this call too.
    """
    for s, length in enumerate(seq_lens.tolist()):
        start, end = query_start_loc[s : s + 2].tolist()
        yield from ((row, s, length - end + row) for row in range(start, end))


EDITS_OF_HIDDEN_ROWS = (
    "entries_to_read: 0 -> 1",
    "entries_to_read: query_start_loc.diff() > 0 -> query_start_loc.diff() >= 0",
    "entry_rows: 0 -> 1",
    "entry_rows: 1 -> 2",
    "entry_rows: gather_rows(cache, flat).masked_fill(behind[..., None], 0) -> "
    "gather_rows(cache, flat)",
    "gather_rows: flat.clamp(min=0) -> flat",
    "slots: 1 -> 2 (2)",
    "slots: index.clamp(min=0) -> index",
)
"""Automatic mutants of the shared paged reads that change only rows which no token may see."""

TILES_DECIDE_NO_VALUE = (
    "how a call is cut into tiles decides no value: tests/backend/test_tiles.py cuts them small"
)

HIDDEN_ROWS = dict.fromkeys(
    (
        *EDITS_OF_HIDDEN_ROWS,
        "_chosen: 0 -> 1 (2)",
        "compressed_keys: 1 -> 2 (3)",
        "entries_to_read: 0 -> 1 (2)",
        "entry_rows: index >= lengths[sequence][:, None] -> index > lengths[sequence][:, None]",
        "entry_rows: slots(block_table, sequence[:, None], index, cache.shape[1])"
        ".masked_fill(behind, -1) -> "
        "slots(block_table, sequence[:, None], index, cache.shape[1])",
        "near_positions: 1 -> 2 (2)",
    ),
    "rows that are no keys score -inf and weigh 0, whatever they hold",
)
"""Equivalent mutants of every attention: what only moves rows that are no keys."""
TILES = dict.fromkeys(
    ("spans: *", "by_tokens: *", "attend_by_tokens: 0 -> 1"), TILES_DECIDE_NO_VALUE
)
"""Equivalent mutants of every attention: how tokens are cut into tiles."""
