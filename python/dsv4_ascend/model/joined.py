"""Rotations of rows that lie in one buffer: queries by head, then keys, then entries.

Launchers turn such a buffer in one call if the step has a row of cosines for each of its rows. They
are too many to send: one selection on the device repeats the rows that the step has anyway.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from dsv4_backend.dispatch import Derived

MOST_ROWS = 8192
"""In one buffer; beyond, turning its parts one by one reads less."""


class Buffer(NamedTuple):
    """A buffer that a launcher turns: its name, heads of queries, names of rotations (cos, sin) of
    tokens and of entries, and whether keys of tokens lie behind the queries.
    """

    name: str
    heads: int
    tokens: tuple[str, str]
    entries: tuple[str, str] | None
    keys: bool

    def rows(self, of: Mapping[str, torch.Tensor], field: int) -> list[torch.Tensor]:
        """Parts of the rows of the table that this buffer's rows are turned by, in order.

        of: the rows of every rotation, int64. field: 0 for cos, 1 for sin.
        """
        tokens = of[self.tokens[field]]
        parts = [tokens.repeat_interleave(self.heads)]
        parts += [tokens] if self.keys else []
        return parts if self.entries is None else [*parts, of[self.entries[field]]]

    def size(self, counts: Mapping[str, int]) -> int:
        """Its rows."""
        entries = 0 if self.entries is None else counts[self.entries[0]]
        return counts[self.tokens[0]] * (self.heads + self.keys) + entries

    def given(self, values: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """The rotations that the operator is called with."""
        return [values[name] for name in (*self.tokens, *(self.entries or ()))]


class Joined:
    """Rotations of `buffers`, selected from a table fp32 [rows, rope_dim] on the device.

    values: the rotations by name, views of the table. Buffers of too many rows have none.
    """

    def __init__(
        self, buffers: Sequence[Buffer], values: Mapping[str, torch.Tensor], table: torch.Tensor
    ) -> None:
        names = {name for buffer in buffers for name in (*buffer.tokens, *(buffer.entries or ()))}
        width, first = table.shape[1], table.storage_offset()
        counts = {name: values[name].shape[0] for name in names}
        starts = {name: (values[name].storage_offset() - first) // width for name in names}
        rows = {name: torch.arange(count) + starts[name] for name, count in counts.items()}
        self._table, self._values = table, values
        self._buffers = [b for b in buffers if 0 < b.size(counts) <= MOST_ROWS]
        self._sizes = [b.size(counts) for b in self._buffers for _ in range(2)]
        parts = [part for b in self._buffers for field in range(2) for part in b.rows(rows, field)]
        self._rows = torch.cat([torch.zeros(0, dtype=torch.int64), *parts]).int().to(table.device)

    def derived(self) -> Iterator[tuple[Derived, list[torch.Tensor]]]:
        """What launchers find; selected anew at every call."""
        if not self._buffers:
            return
        parts = self._table.index_select(0, self._rows).split(self._sizes)
        for buffer, cos, sin in zip(self._buffers, parts[::2], parts[1::2], strict=True):
            yield Derived(buffer.name, buffer.given(self._values), [buffer.heads]), [cos, sin]
