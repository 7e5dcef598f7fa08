"""Cache parts and their block tables: what a layer keeps between steps, whoever owns the memory.

The contract between the network and an engine (an adapter, `PagedCache`, a test):

* A **part** of a layer's cache is a tensor of pages `[num_blocks, block_size, width]` and the block
  table `[R, columns]` that finds the rows of R sequences in it. Every part has its own pair, because
  engines group parts by their own rules; block_size counts rows and may differ from part to part.
  Pages may have any strides: parts of many layers may lie interleaved in one storage, and share it
  with parts that own other blocks of it.
* Index i of a sequence (a position, or a compressed entry) lies in column `i // block_size`, modulo
  the columns: a table is absolute, or a ring. A step uses no columns but those of these indices, so
  all others may hold anything:
    window       the last sliding_window - 1 positions before the step, and its own
    entries      every closed block of `ratio` tokens; entry i: tokens i * ratio to (i + 1) * ratio - 1
    index_keys   the same entries (CSA)
    state        the last c * ratio - 1 positions before the step, and its own; c is 2 (CSA) or 1 (HCA)
    index_state  the same positions (CSA)
* An index that a step writes lies in a block that no other sequence uses. Blocks of a common prefix
  may be shared for reading, if the prefix ends where a block of every part ends.
* Rows past a sequence's length are not read: to take back tokens (a rejected draft) is to count
  fewer. A sequence without tokens in a step needs no block.
* Nothing of this is copied or made contiguous, and no value is read on the host but by the
  operators' checks, which `dispatch.use(check_contents=False)` switches off.

`batch.build_batch` takes what is true for all layers. Source: spec/v4.md 4.3.1, 4.8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsv4_backend.ops.cache import write_cache


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

    def write(self, rows: torch.Tensor, slots: torch.Tensor) -> None:
        """Store rows [M, width] at slots int64 [M]: block * block_size + offset, -1 skips a row."""
        write_cache(self.tensor, rows, slots)

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Float pages [num_blocks, block_size, width] and their table, as operators take them."""
        return self.tensor, self.table


@dataclass(frozen=True)
class LayerCache:
    """The parts of one layer; None where its kind has none (SWA has a window, HCA no index)."""

    window: Paged
    entries: Paged | None = None
    state: Paged | None = None
    index_keys: Paged | None = None
    index_state: Paged | None = None
