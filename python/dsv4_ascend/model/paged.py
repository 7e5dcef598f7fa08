"""Cache parts and their block tables: what a layer keeps between steps, whoever owns the memory.

The contract between the network and an engine (an adapter, `PagedCache`, a test):

* A **part** of a layer's cache is a tensor of pages `[num_blocks, block_size, width]` and the block
  table `[R, columns]` that finds the rows of R sequences in it. Every part has a pair of its own:
  engines group parts by their own rules. block_size counts rows and may differ from part to part.
  Pages may have any strides: parts of many layers may lie interleaved in one storage, and share it
  with parts that own other blocks of it.
* Index i of a sequence (a position, or a compressed entry) lies in column `i // block_size`, modulo
  the columns: a table is absolute, or a ring. A step uses no columns but those of these indices, so
  all others may hold anything:
    window       the last sliding_window - 1 positions before the step, and its own
    entries      every closed block of `ratio` tokens; entry i is of tokens i * ratio and following
    index_keys   the same entries (CSA)
    state        the last c * ratio - 1 positions before the step, and its own; c: 2 (CSA), 1 (HCA)
    index_state  the same positions (CSA)
* Block 0 of a state belongs to nobody: kernels take it for "no block".
* An index that a step writes lies in a block that no other sequence uses. Blocks of a common prefix
  may be shared for reading, if the prefix ends where a block of every part ends.
* Rows past a sequence's length are not read: to take back tokens (a rejected draft) is to count
  fewer. A sequence without tokens in a step needs no block.
* Nothing of this is copied or made contiguous, and no value is read on the host but by the
  operators' checks, which `dispatch.use(check_contents=False)` switches off.
* Pages may hold bytes of a format of `cache_formats` instead of floats (`BytePaged`): what a step
  can see is then widened for it, into pages of its own, unless attention takes the bytes.

`batch.build_batch` takes what is true for all layers. Source: spec/v4.md 4.3.1, 4.8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from dsv4_backend.ops.attention_fp8 import FORMAT
from dsv4_backend.ops.cache import write_cache, write_caches
from dsv4_backend.ops.cache_bytes import READS, WRITES
from dsv4_backend.ops.cache_formats import FORMATS, Format, sized


@dataclass(frozen=True)
class Paged:
    """One cache part: pages [num_blocks, block_size, width] and block ids int32 [R, columns].

    It owns how rows are stored: `write` and `read` are the ways in and out.
    """

    tensor: torch.Tensor
    table: torch.Tensor

    @property
    def block_size(self) -> int:
        """Rows per block."""
        return self.tensor.shape[1]

    @property
    def widens(self) -> bool:
        """Whether `read` gives pages of its own."""
        return False

    def write(self, rows: torch.Tensor, slots: torch.Tensor) -> None:
        """Store rows [M, width] at slots int64 [M]: block * block_size + offset, -1 skips a row."""
        write_cache(self.tensor, rows, slots)

    def read(
        self, first: torch.Tensor | None = None, rows: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Float pages [num_blocks, block_size, width] and their table, as operators take them.

        first, rows: of sequence s only the indices first[s] .. first[s] + rows - 1 are needed;
        without them, all that lie in the table's columns.
        """
        return self.tensor, self.table


def write_both(
    one: tuple[Paged, torch.Tensor, torch.Tensor], other: tuple[Paged, torch.Tensor, torch.Tensor]
) -> None:
    """Write rows of float parts, (part, rows, slots) each: at once if slots and pages are alike."""
    (part, rows, slots), (second, second_rows, second_slots) = one, other
    if slots is second_slots and part.tensor.shape[:2] == second.tensor.shape[:2]:
        write_caches(part.tensor, second.tensor, rows, second_rows, slots)
        return
    part.write(rows, slots)
    second.write(second_rows, second_slots)


class Lengths(NamedTuple):
    """Which tokens are of which sequence: query_start_loc int32 [R + 1], seq_lens int32 [R], what
    those are at most, None if not known.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    max_seq_len: int | None


class ByteRows(NamedTuple):
    """Rows as bytes: a name of `cache_formats`, rows per block,
    channels, how many of them are RoPE.

    dtype: what they are read as, uint8 for bytes as they are.
    """

    form: str
    block_size: int
    channels: int
    rope: int
    dtype: torch.dtype

    @property
    def layout(self) -> Format:
        """The format for these channels."""
        return sized(_FORMATS[self.form], self.channels, self.rope)

    def empty(self, num_blocks: int, device: torch.device) -> torch.Tensor:
        """Pages of zeros, uint8 [num_blocks, page bytes]."""
        return torch.zeros(
            num_blocks, self.layout.page_bytes(self.block_size), dtype=torch.uint8, device=device
        )

    def widths(self) -> tuple[int, ...]:
        """What reading takes beside the rows per block."""
        return (self.channels, self.rope) if _FORMATS[self.form].latent else (self.channels,)


_FORMATS = {form.name: form for form in FORMATS}


@dataclass(frozen=True)
class BytePaged(Paged):
    """A cache part whose pages uint8 [num_blocks, page bytes] hold `rows`
    in a byte format (spec/v4.md 6.5).
    """

    rows: ByteRows

    @property
    def block_size(self) -> int:
        """Rows per block."""
        return self.rows.block_size

    @property
    def widens(self) -> bool:
        """See `Paged`."""
        return self.rows.dtype != torch.uint8

    def write(self, rows: torch.Tensor, slots: torch.Tensor) -> None:
        """See `Paged`: quantises the rows."""
        WRITES[self.rows.form](self.tensor, rows, slots, self.block_size, *self.rows.widths()[1:])

    def read(
        self, first: torch.Tensor | None = None, rows: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Paged`: new pages that hold what is needed and no more,
        and the ring table that finds it there; or bytes [num_blocks, block_size, bytes], all.
        """
        if not self.widens:
            return self.tensor.unflatten(1, (self.block_size, -1)), self.table
        sequences, columns = self.table.shape
        size, device = self.block_size, self.table.device
        width = columns if rows is None else max(1, min(columns, (rows + size - 2) // size + 1))
        low = (
            torch.zeros(sequences, dtype=torch.int64, device=device)
            if first is None
            else first.long() // size
        )
        column = low[:, None] + torch.arange(width, device=device)
        blocks = self.table.long().gather(1, column % columns)
        there = (blocks >= 0) & (blocks < self.tensor.shape[0])
        own = torch.arange(sequences * width, device=device, dtype=torch.int32).view(
            sequences, width
        )
        table = torch.full_like(own, -1).scatter(1, column % width, own.masked_fill(~there, -1))
        return self._widened(blocks.masked_fill(~there, -1)), table

    def fields(self) -> tuple[torch.Tensor, ...]:
        """Views [num_blocks, block_size, elements] of the format's fields, in page order.

        Only for formats that keep each field in a section of its own.
        """
        start, views = 0, []
        for (field,) in self.rows.layout.sections:
            end = start + self.block_size * field.width
            section = self.tensor[:, start:end].view(field.dtype)
            views.append(section.unflatten(1, (self.block_size, field.count)))
            start = end
        return tuple(views)

    def _widened(self, blocks: torch.Tensor) -> torch.Tensor:
        """Pages of the rows in these blocks, zeros for -1: [blocks, block_size, channels]."""
        size = self.block_size
        slots = blocks.flatten()[:, None] * size + torch.arange(size, device=blocks.device)
        flat = slots.masked_fill(blocks.flatten()[:, None] < 0, -1).flatten()
        values: torch.Tensor = READS[self.rows.form](self.tensor, flat, size, *self.rows.widths())
        return values.to(self.rows.dtype).view(-1, size, self.rows.channels)


class CacheFormats(NamedTuple):
    """Byte formats of window and entries, and of index keys; None for rows of floats."""

    latent: str | None = None
    index_keys: str | None = None

    def latent_dtype(self, floats: torch.dtype) -> torch.dtype:
        """What window and entries are read as: bytes where attention takes them."""
        return torch.uint8 if self.latent == FORMAT.name else floats


FLOATS = CacheFormats()


@dataclass(frozen=True)
class LayerCache:
    """The parts of one layer; None where its kind has none (SWA has a window, HCA no index)."""

    window: Paged
    entries: Paged | None = None
    state: Paged | None = None
    index_keys: Paged | None = None
    index_state: Paged | None = None
