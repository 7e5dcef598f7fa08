"""One step of a ragged batch: its tokens, and the index tensors that all layers share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import torch

from dsv4_ascend.model.paged import Lengths, Paged
from dsv4_ascend.model.rotary import Rotation
from dsv4_backend import ragged
from dsv4_backend.dispatch import Derived, step
from dsv4_backend.errors import ArgumentError

_T = TypeVar("_T")
_Name = tuple[object, ...]
_Found = dict[_Name, tuple[object, Paged | None]]
Derive = Callable[[], Iterable[tuple[Derived, Sequence[torch.Tensor]]]]


class Compressed(NamedTuple):
    """Entries of one ratio that close in a step: int64 [M] of `ragged.closed_blocks`."""

    sequence: torch.Tensor
    block: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """T new tokens of R sequences, flattened (dsv4_backend.ragged): what is true for all layers.

    input_ids: int [T]. query_start_loc: int32 [R + 1], the same offset twice for a sequence without
    tokens. seq_lens: int32 [R], this step's tokens among them. owners, positions: int64 [T], the
    sequence and position of every token. rows: of the results, at least T. max_query_len,
    max_seq_len: bounds that the host knows, of one sequence's tokens in this step and of seq_lens.
    What follows from a table is computed once for all parts with that table and as many rows per
    block; so a table must not change while its step runs.
    """

    input_ids: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    owners: torch.Tensor
    positions: torch.Tensor
    rows: int
    max_query_len: int
    max_seq_len: int | None = None
    _derive: list[Derive] = field(init=False, default_factory=list, repr=False, compare=False)
    _found: _Found = field(init=False, default_factory=dict, repr=False, compare=False)

    @property
    def last_rows(self) -> torch.Tensor:
        """Row of every sequence's last token; meaningless for a sequence without tokens here."""
        return self.query_start_loc[1:].long() - 1

    @property
    def lengths(self) -> Lengths:
        """Which tokens are of which sequence."""
        return Lengths(self.query_start_loc, self.seq_lens, self.max_seq_len)

    def compressed(self, ratio: int) -> Compressed:
        """What layers of that compression ratio share."""

        def find() -> Compressed:
            starts, ends, tokens = self.query_start_loc, self.seq_lens, len(self.positions)
            return Compressed(*ragged.closed_blocks(starts, ends, tokens, ratio))

        return self._once((ratio,), find)

    def rotation(self, ratio: int, inv_freq: torch.Tensor) -> Rotation:
        """Of this step's tokens in layers of a compression ratio: those with entries are alike."""
        return self._once(_turns(ratio), lambda: Rotation.at(self.positions, inv_freq))

    def entry_rotation(self, ratio: int, inv_freq: torch.Tensor) -> Rotation:
        """Of this step's entries, each at its block's first position."""

        def find() -> Rotation:
            return Rotation.at((self.compressed(ratio).block * ratio).clamp(min=0), inv_freq)

        return self._once(("entry rotation", ratio), find)

    def token_slots(self, part: Paged) -> torch.Tensor:
        """Slots int64 [T] of this step's tokens in a part with a row per token."""

        def find() -> torch.Tensor:
            return ragged.slots(part.table, self.owners, self.positions, part.block_size)

        return self._once(("tokens",), find, part)

    def entry_slots(self, part: Paged, ratio: int) -> torch.Tensor:
        """Slots int64 [M] of this step's entries in a part with a row per `ratio` tokens."""

        def find() -> torch.Tensor:
            sequence, block = self.compressed(ratio)
            return ragged.slots(part.table, sequence, block, part.block_size)

        return self._once(("entries", ratio), find, part)

    def reachable(self, part: Paged, ratio: int) -> Paged:
        """A part of entries without the columns behind those of `max_seq_len` tokens."""
        if self.max_seq_len is None:
            return part
        columns = max(1, -(-(self.max_seq_len // ratio) // part.block_size))
        table = self._once(("reachable", ratio), lambda: part.table[:, :columns], part)
        return replace(part, table=table)

    def window(self, part: Paged, window: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages and table of what the `window` last positions of this step's tokens hold."""
        if not part.widens:
            return part.read()  # where it begins need not be known

        def find() -> torch.Tensor:
            return (self.seq_lens - self.query_start_loc.diff() + 1 - window).clamp(min=0)

        return part.read(self._once(("window", window), find), window - 1 + self.max_query_len)

    def own_rows(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of x [rows, ...] that are tokens: [T, ...]."""
        return x[: len(self.positions)]

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of x [T, ...], then zeros: [rows, ...]."""
        missing = self.rows - len(x)
        return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around the layers of this step: launchers share what they derive from its lengths."""
        with step(value for derive in self._derive for value in derive()):
            yield

    def know_derived(self, derive: Derive) -> None:
        """Have launchers take what this gives when the layers begin to run."""
        self._derive.append(derive)

    def know_rotation(self, ratio: int, rotation: Rotation) -> None:
        """Take this as `rotation`."""
        self._found[_turns(ratio)] = rotation, None

    def know_entry_rotation(self, ratio: int, rotation: Rotation) -> None:
        """Take this as `entry_rotation`."""
        self._found[("entry rotation", ratio)] = rotation, None

    def know_tokens(self, part: Paged, slots: torch.Tensor) -> None:
        """Take these as `token_slots` of a part."""
        self._found[("tokens", *_same_slots(part))] = slots, part

    def know_entries(
        self, part: Paged, ratio: int, slots: torch.Tensor, entries: Compressed
    ) -> None:
        """Take these as `entry_slots` of a part, and as what layers of that ratio share."""
        self._found[("entries", ratio, *_same_slots(part))] = slots, part
        self._found[(ratio,)] = entries, None

    def _once(self, name: _Name, find: Callable[[], _T], part: Paged | None = None) -> _T:
        """What `find` gives, from the first of all calls with this name and an equal table."""
        key = name if part is None else (*name, *_same_slots(part))
        if key not in self._found:
            # The part is kept so that no other table can take the address of its table.
            self._found[key] = find(), part
        return self._found[key][0]  # type: ignore[return-value]


def _turns(ratio: int) -> _Name:
    return "rotation", ratio > 0


def _same_slots(part: Paged) -> tuple[object, ...]:
    """Equal for two parts whose tables are the same memory, with as many rows per block."""
    table = part.table
    return table.data_ptr(), table.shape, table.stride(), part.block_size


def build_batch(
    input_ids: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    num_actual_tokens: int | None = None,
    max_query_len: int | None = None,
    max_seq_len: int | None = None,
) -> Batch:
    """The step that an engine's metadata describes; tables come with the layers' caches (paged.py).

    input_ids: int [rows], of which num_actual_tokens are tokens and the others padding;
    query_start_loc[-1] of them if None, which reads a value from the device. query_start_loc: int32
    [R + 1], padded by repeating its last offset. seq_lens: int32 [R], with this step's tokens.
    max_query_len: at least the tokens of every sequence, all of them if None; no more of a window
    is widened from bytes. max_seq_len: at least every seq_lens; tables of entries are then not read
    behind it. ArgumentError for shapes that do not fit; values are the operators' to check.
    """
    rows, sequences = len(input_ids), len(seq_lens)
    if query_start_loc.shape != (sequences + 1,):
        expected = f"shape ({sequences + 1},), one more than seq_lens"
        found = f"shape {tuple(query_start_loc.shape)}"
        raise ArgumentError(f"query_start_loc: found {found}, expected {expected}")
    tokens = int(query_start_loc[-1]) if num_actual_tokens is None else num_actual_tokens
    if not 0 <= tokens <= rows:
        expected = f"0 to {rows}, the rows of input_ids"
        raise ArgumentError(f"num_actual_tokens: found {tokens}, expected {expected}")
    owners = ragged.token_sequences(query_start_loc, tokens)
    positions = ragged.token_positions(query_start_loc, seq_lens, tokens)
    ids = input_ids[:tokens]
    longest = tokens if max_query_len is None else max_query_len
    return Batch(ids, query_start_loc, seq_lens, owners, positions, rows, longest, max_seq_len)
