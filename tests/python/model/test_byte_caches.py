"""Cache parts of bytes: what a step can see is widened for it,
whatever else the tables and pages hold (paged.py).
"""

from __future__ import annotations

import pytest
import torch
from seeds import generator

from dsv4_ascend.model.batch import build_batch
from dsv4_ascend.model.paged import BytePaged, ByteRows, Paged
from dsv4_backend import ragged
from dsv4_backend.errors import ArgumentError
from dsv4_backend.ops.attention import sparse_attention
from dsv4_backend.ops.cache_formats import FORMATS
from dsv4_backend.ops.quant import act_qdq

WINDOW, CHANNELS, ROPE, HEADS = 8, 96, 32, 2
every_form = pytest.mark.parametrize("form", ["a5", "fp8_ds_mla", "kv_epilog"])


def byte_part(form: str, block_size: int, blocks: int, table: torch.Tensor) -> BytePaged:
    """Pages of any bytes, with a stride of their own, in a part whose table is given."""
    rows = ByteRows(form, block_size, CHANNELS, ROPE, torch.bfloat16)
    page = rows.layout.page_bytes(block_size)
    pages = torch.randint(0, 256, (blocks, page + 40), dtype=torch.uint8)[:, 8 : page + 8]
    return BytePaged(pages, table, rows)


def float_part(block_size: int, blocks: int, table: torch.Tensor) -> Paged:
    return Paged(torch.full((blocks, block_size, CHANNELS), torch.nan, dtype=torch.bfloat16), table)


def scattered_table(sequences: int, columns: int, blocks: int) -> torch.Tensor:
    """Block ids of every sequence, scattered, none twice."""
    return torch.randperm(blocks)[: sequences * columns].int().view(sequences, columns)


def fill(part: Paged, lengths: torch.Tensor) -> torch.Tensor:
    """Rows bf16 for all positions of all sequences, written where the table has them; the rows."""
    owners = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    positions = torch.cat([torch.arange(int(n)) for n in lengths])
    # A ring forgets the others.
    kept = positions >= lengths[owners] - part.table.shape[1] * part.block_size
    rows = torch.randn(len(owners), CHANNELS, generator=generator(2)).bfloat16()
    rows = act_qdq(rows, 64, CHANNELS - ROPE) if type(part) is Paged else rows
    slots = ragged.slots(part.table, owners[kept], positions[kept], part.block_size)
    part.write(rows[kept], slots)
    return rows


def attend(part: Paged, new: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Attention of the last new[s] tokens of every sequence to the window;
    of its pages only what a step needs.
    """
    starts = torch.cat([torch.zeros(1), new.cumsum(0)]).int()
    q = torch.randn(int(new.sum()), HEADS, CHANNELS, generator=generator(3)).bfloat16()
    first = (lengths - new + 1 - WINDOW).clamp(min=0)
    pages, table = part.read(first, WINDOW - 1 + len(q))
    sink = torch.zeros(HEADS)
    return sparse_attention(
        q, sink, pages, table, None, None, None, starts, lengths.int(), WINDOW, 0
    )


@every_form
@pytest.mark.parametrize(
    ("block_size", "columns"), [(1, 40), (3, 14), (4, 4), (16, 3), (64, 1)], ids=lambda n: str(n)
)
def test_attention_sees_the_bits_of_rounded_rows(form: str, block_size: int, columns: int) -> None:
    """Absolute tables and rings (4 columns of 4 rows), decode and several new tokens."""
    lengths, new = torch.tensor([33, 9, 40]), torch.tensor([3, 2, 1])
    table, blocks = scattered_table(3, columns, 3 * columns + 5), 3 * columns + 5
    results = []
    for part in (byte_part(form, block_size, blocks, table), float_part(block_size, blocks, table)):
        fill(part, lengths)
        results.append(attend(part, new, lengths))
    assert torch.equal(*results)
    assert torch.isfinite(results[0]).all()


@every_form
def test_columns_that_nobody_sees_may_hold_anything(form: str) -> None:
    lengths, new = torch.tensor([33, 9]), torch.tensor([1, 1])
    table = scattered_table(2, 10, 25)
    part = byte_part(form, 4, 25, table)
    fill(part, lengths)
    want = attend(part, new, lengths)
    for garbage in (-1, -(2**31), 2**31 - 1, 25):
        changed = table.clone()
        changed[0, :6] = changed[1, 3:] = changed[0, 9:] = garbage  # passed, and behind the end
        assert torch.equal(attend(BytePaged(part.tensor, changed, part.rows), new, lengths), want)
    changed[0, 7] = -1  # seen
    with pytest.raises(ArgumentError, match=r"window_block_table.*found -1"):
        attend(BytePaged(part.tensor, changed, part.rows), new, lengths)


@every_form
def test_a_step_widens_what_it_sees_and_not_the_pool(form: str) -> None:
    table = scattered_table(2, 100, 1000)
    part = byte_part(form, 4, 1000, table)
    fill(part, torch.tensor([400, 380]))
    pages, own = part.read(torch.tensor([390, 370]), 10)
    assert pages.shape == (2 * 4, 4, CHANNELS)  # 10 rows lie in 4 blocks of 4 at most
    assert own.shape == (2, 4)
    everything, _ = part.read()
    assert everything.shape == (200, 4, CHANNELS)


def test_a_sequence_without_tokens_needs_no_block() -> None:
    lengths, new = torch.tensor([33, 0, 7]), torch.tensor([1, 0, 1])
    table = scattered_table(3, 10, 40)
    table[1] = -1
    results = []
    for part in (byte_part("a5", 4, 40, table), float_part(4, 40, table)):
        fill(part, lengths)
        results.append(attend(part, new, lengths))
    assert torch.equal(*results)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_every_format_of_a_page_is_a_part(form) -> None:
    channels, rope = (130, 20) if form.codec.rope else (66, 0)
    rows = ByteRows(form.name, 5, channels, rope, torch.float32)
    part = BytePaged(
        rows.empty(4, torch.device("cpu")), torch.tensor([[2, 0]], dtype=torch.int32), rows
    )
    assert part.block_size == 5
    values = torch.randn(7, channels).bfloat16()
    first, places = torch.zeros(7, dtype=torch.int64), torch.arange(7)
    part.write(values, ragged.slots(part.table, first, places, 5))
    (found,) = ragged.entry_rows(*part.read(), torch.tensor([0]), places, torch.tensor([7]))
    assert (found - values).abs().max() < 0.6  # FP4 keeps a bit of 4 at worst
    assert not part.tensor[1].any()
    assert not part.tensor[3].any()


@every_form
def test_a_step_of_many_sequences_widens_what_the_longest_needs(form):
    """Absolute tables: 6 sequences of 5 tokens see 12 rows each,
    not as many as if all 30 tokens were one's.
    """
    lengths, new = torch.tensor([40, 33, 60, 29, 51, 47]), torch.full((6,), 5)
    part = byte_part(form, 4, 120, scattered_table(6, 16, 120))
    fill(part, lengths)
    starts = torch.cat([torch.zeros(1), new.cumsum(0)]).int()
    q = torch.randn(30, HEADS, CHANNELS).bfloat16()
    pages, results = [], []
    for longest in (None, 5):
        batch = build_batch(
            torch.zeros(30, dtype=torch.int64), starts, lengths.int(), max_query_len=longest
        )
        widened, table = batch.window(part, WINDOW)
        pages.append(len(widened))
        sink = torch.zeros(HEADS)
        arguments = (q, sink, widened, table, None, None, None, starts, lengths.int(), WINDOW, 0)
        results.append(sparse_attention(*arguments))
    assert pages == [6 * 10, 6 * 4]
    assert torch.equal(*results)
