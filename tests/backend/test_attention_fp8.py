"""Attention over FP8 rows is attention in blocks of 512 over the rows that are read back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsv4_backend.errors import ArgumentError
from dsv4_backend.ops.attention_fp8 import sparse_attention_fp8
from dsv4_backend.ops.attention_p512 import sparse_attention_p512
from dsv4_backend.ops.cache_bytes import READS, WRITES

HEADS, CHANNELS, ROPE, BYTES = 4, 96, 16, 128
"""A row: 32 bytes of RoPE, 80 codes, 2 scales of 2, zeros."""
WINDOW, RATIO = 9, 4
KINDS = ("window", "all", "chosen")


def pages(rows: int, block_size: int, sequences: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages of any bytes with `rows` rows of every sequence written, and their table."""
    columns = max(1, -(-rows // block_size))
    blocks = sequences * columns + 3
    table = torch.randperm(blocks)[: sequences * columns].view(sequences, columns).int()
    cache = torch.randint(0, 256, (blocks, block_size * BYTES), dtype=torch.uint8)
    index = torch.arange(rows)
    slots = (table.long()[:, index // block_size] * block_size + index % block_size).flatten()
    values = torch.randn(sequences * rows, CHANNELS).bfloat16() * 3
    WRITES["kv_epilog"](cache, values, slots, block_size, ROPE)
    return cache.unflatten(1, (block_size, BYTES)), table


def call(kind: str, lengths: list[int], new: list[int], block_size: int = 5) -> dict[str, Any]:
    """Arguments by name; the last new[s] tokens of every sequence attend."""
    longest, tokens = max(lengths), sum(new)
    near, near_table = pages(longest, block_size, len(lengths))
    far, far_table = pages(longest // RATIO, block_size + 2, len(lengths))
    positions = [n - m + i for n, m in zip(lengths, new, strict=True) for i in range(m)]
    seen = (torch.tensor(positions) + 1)[:, None] // RATIO
    order = torch.arange(3).expand(tokens, 3)
    chosen = torch.where(order < seen, seen - 1 - order, -1).int()
    compressed = kind != "window"
    return {
        "q": torch.randn(tokens, HEADS, CHANNELS).bfloat16(),
        "sink": torch.randn(HEADS),
        "window_cache": near,
        "window_block_table": near_table,
        "cmp_cache": far if compressed else None,
        "cmp_block_table": far_table if compressed else None,
        "cmp_indices": chosen if kind == "chosen" else None,
        "query_start_loc": torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()]).int(),
        "seq_lens": torch.tensor(lengths).int(),
        "max_seq_len": longest,
        "window": WINDOW,
        "ratio": RATIO if compressed else 0,
        "rope": ROPE,
    }


def read_back(cache: torch.Tensor | None) -> torch.Tensor | None:
    if cache is None:
        return None
    blocks, size = cache.shape[:2]
    slots = torch.arange(blocks * size)
    rows = READS["kv_epilog"](cache.flatten(1), slots, size, CHANNELS, ROPE)
    return rows.bfloat16().view(blocks, size, CHANNELS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("lengths", "new"), [([40], [40]), ([40, 3, 17], [1, 3, 5]), ([31, 8, 25], [2, 0, 1])]
)
def test_it_is_a_read_and_the_attention_of_float_rows(
    kind: str, lengths: list[int], new: list[int]
) -> None:
    given = call(kind, lengths, new)
    got = sparse_attention_fp8(**given)
    floats = {name: read_back(given[name]) for name in ("window_cache", "cmp_cache")}
    given = {name: value for name, value in given.items() if name != "rope"}
    assert torch.equal(got, sparse_attention_p512.reference(**given | floats))
    assert got.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_that_nobody_sees_may_be_any(kind: str) -> None:
    given = call(kind, [37, 14], [2, 1])
    want = sparse_attention_fp8(**given)
    seen = torch.zeros(given["window_cache"].shape[:2], dtype=torch.bool)
    for table, length, new in zip(given["window_block_table"], (37, 14), (2, 1), strict=True):
        for i in range(max(0, length - new + 1 - WINDOW), length):
            seen[table[i // 5], i % 5] = True
    noise = torch.randint_like(given["window_cache"], 256)
    given["window_cache"] = torch.where(seen[..., None], given["window_cache"], noise)
    given["window_cache"][..., -12:] = 0xFF  # where the writer leaves zeros
    assert torch.equal(sparse_attention_fp8(**given), want)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope": 96}, r"'rope'.*96.*fewer than the 96 channels"),
        ({"rope": 80}, r"'window_cache'.*128 bytes.*192 bytes for 96 channels, 80 of RoPE"),
        ({"cmp_cache": torch.zeros(9, 7, 160).byte()}, r"'cmp_cache'.*160.*128"),
        ({"window_block_table": torch.zeros(1, 3).int()}, r"'window_block_table'.*absolute"),
        ({"max_seq_len": 39}, r"'max_seq_len'.*39.*at least 40"),
        ({"sink": torch.tensor([0.0, torch.inf, 0, 0])}, r"'sink'.*inf of head 1"),
        ({"cmp_indices": torch.tensor([[-1, 0, 1]]).int()}, r"'cmp_indices'.*-1 at \[0, 0\]"),
        ({"cmp_indices": torch.tensor([[0, 1, 10]]).int()}, r"'cmp_indices'.*10 at \[0, 2\]"),
        ({"q": torch.zeros(1, HEADS, CHANNELS)}, r"'q'.*float32.*bf16"),
        ({"q": torch.zeros(1, HEADS, CHANNELS).half()}, r"'q'.*float16.*bf16"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    given = call("chosen", [40], [1])
    sparse_attention_fp8(**given)
    with pytest.raises(ArgumentError, match=f"sparse_attention_fp8.*{message}"):
        sparse_attention_fp8(**given | changes)
