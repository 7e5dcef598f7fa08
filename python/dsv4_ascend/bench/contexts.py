"""Attention and indexer over paged caches of one long sequence, and torch's formulations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from dsv4_ascend.bench.dimensions import Dimensions
from dsv4_ascend.bench.products import bf16
from dsv4_ascend.bench.work import Work, cold, copies, ran, rotating, size_of
from dsv4_backend import ragged

_TORCH = {"bf16": torch.bfloat16, "fp32": torch.float32}
_TOKENS = 64
"""Queries whose rows torch's attention gathers at a time."""


@dataclass(frozen=True)
class Pages:
    """A paged cache [blocks, block, width] whose blocks lie in random order, and its table."""

    pages: torch.Tensor
    table: torch.Tensor

    @classmethod
    def random(cls, rows: int, width: int, block: int) -> Pages:
        """At least `rows` rows."""
        blocks = -(-rows // block)
        return cls(bf16(blocks, block, width), torch.randperm(blocks).int()[None])

    def first(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The cache and the table of its first rows."""
        return self.pages, self.table[:, : -(-rows // self.pages.shape[1])].contiguous()

    def slots(self, index: torch.Tensor) -> torch.Tensor:
        """Rows `index` of the sequence in the flat cache."""
        return ragged.slots(self.table, torch.zeros_like(index), index, self.pages.shape[1])

    def in_order(self, rows: int) -> torch.Tensor:
        """The first rows one after another, [rows, width]."""
        return self.pages.flatten(0, 1)[self.slots(torch.arange(rows))]


@dataclass(frozen=True)
class Queries:
    """The last `tokens` tokens of a sequence: position + 1 runs from `context` on, so that the
    first of them sees context // ratio entries.
    """

    q: torch.Tensor
    context: int

    @property
    def tokens(self) -> int:
        """How many."""
        return self.q.shape[0]

    @property
    def length(self) -> int:
        """Of the sequence, with them."""
        return self.context + self.tokens - 1

    def lengths(self) -> tuple[torch.Tensor, torch.Tensor]:
        """query_start_loc and seq_lens."""
        ends = torch.tensor([0, self.tokens], dtype=torch.int32)
        return ends, torch.tensor([self.length], dtype=torch.int32)

    def window(self, size: int) -> torch.Tensor:
        """Positions of every token's window [T, size]."""
        last = torch.arange(self.context - 1, self.length)
        return last[:, None] + torch.arange(1 - size, 1)


def attention(
    q: Queries, window: Pages, entries: Pages, chosen: torch.Tensor | None, of: Dimensions
) -> tuple[Any, ...]:
    """Arguments of `sparse_attention`: over chosen entries (CSA), or over all (HCA)."""
    ratio = of.hca_ratio if chosen is None else of.csa_ratio
    sink = torch.zeros(of.heads)
    pages = entries.first(q.length // ratio)
    return (q.q, sink, window.pages, window.table, *pages, chosen, *q.lengths(), of.window, ratio)


def window_pages(of: Dimensions, tokens: int) -> Pages:
    """A ring for the windows of `tokens` tokens."""
    return Pages.random(of.window + tokens + of.block, of.head_dim, of.block)


def queries(of: Dimensions, tokens: int, context: int) -> Queries:
    """Random queries of all heads."""
    return Queries(bf16(tokens, of.heads, of.head_dim), context)


def index_arguments(q: Queries, weights: torch.Tensor, keys: Pages, ratio: int) -> tuple[Any, ...]:
    """Arguments of `indexer_scores` (`IndexerCall`)."""
    pages, table = keys.first(q.length // ratio)
    return q.q, pages, weights, table, *q.lengths(), ratio


def index_queries(of: Dimensions, tokens: int, context: int) -> tuple[Queries, torch.Tensor]:
    """Random queries of the indexer and their weights."""
    q = Queries(bf16(tokens, of.index_heads, of.index_dim), context)
    return q, bf16(tokens, of.index_heads) * (of.index_heads * of.index_dim) ** -0.5


def _softmax(scores: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
    """Probabilities of keys [T, H, n] beside a sink per head."""
    column = sink[:, None].expand(*scores.shape[:2], 1)
    return torch.cat([scores.float(), column], -1).softmax(-1)[..., :-1]


def _gather_and_bmm(
    dtype: torch.dtype, q: torch.Tensor, sink: torch.Tensor, parts: list[tuple[Pages, torch.Tensor]]
) -> torch.Tensor:
    """Attention to rows [T, n] of caches that are gathered for every token."""
    results = []
    for some in torch.arange(len(q)).split(_TOKENS):
        rows = torch.cat([p.pages.flatten(0, 1)[slots[some]] for p, slots in parts], 1).to(dtype)
        scores = torch.bmm(q[some].to(dtype), rows.mT) * q.shape[-1] ** -0.5
        results.append(torch.bmm(_softmax(scores, sink).to(dtype), rows).to(q.dtype))
    return torch.cat(results)


def sparse_attention(of: Dimensions) -> Iterator[Work]:
    """CSA: a window and as many chosen entries as the indexer gives, random ones each call."""
    size = 2 * of.head_dim * of.context // of.csa_ratio
    most = max(of.many)
    entries = cold(
        lambda: Pages.random(of.context // of.csa_ratio + most, of.head_dim, of.block), size
    )
    window = window_pages(of, most)
    for tokens in of.many:
        q = queries(of, tokens, of.context)
        row = 2 * of.head_dim
        sets = [
            torch.randint(of.context // of.csa_ratio, (tokens, of.selected), dtype=torch.int32)
            for _ in range(copies(tokens * of.selected * row))
        ]
        turns = [entries[i % len(entries)] for i in range(len(sets))]
        calls = [attention(q, window, e, s, of) for e, s in zip(turns, sets, strict=True)]
        near = window.slots(q.window(of.window))
        parts = [[(window, near), (e, e.slots(s.long()))] for e, s in zip(turns, sets, strict=True)]
        keys = of.window + of.selected
        yield Work(
            "sparse_attention",
            f"CSA attention, {of.window} + {of.selected} keys, {of.heads} x {of.head_dim}",
            tokens,
            row * (of.window + tokens - 1 + tokens * of.selected) + 2 * size_of(q.q),
            4 * tokens * of.heads * of.head_dim * keys,
            ran("sparse_attention", *calls[0]),
            rotating(lambda a: torch.ops.dsv4.sparse_attention(*a), calls),
            {
                f"gather + {name} bmm": rotating(
                    partial(_gather_and_bmm, dtype, q.q, calls[0][1]), parts
                )
                for name, dtype in _TORCH.items()
            },
        )


def dense_attention(of: Dimensions) -> Iterator[Work]:
    """HCA: a window and every entry of the context; torch's cache lies in order beforehand."""
    count = of.context // of.hca_ratio
    size = 2 * of.head_dim * count
    entries = cold(lambda: Pages.random(count, of.head_dim, of.block), size)
    floats = {
        name: [e.in_order(count).to(dtype) for e in entries[: copies(size * dtype.itemsize // 2)]]
        for name, dtype in _TORCH.items()
    }
    window = window_pages(of, max(of.few))
    for tokens in of.few:
        q = queries(of, tokens, of.context)
        calls = [attention(q, window, e, None, of) for e in entries]
        near = window.slots(q.window(of.window))
        yield Work(
            "sparse_attention",
            f"HCA attention, {of.window} + {count} keys, {of.heads} x {of.head_dim}",
            tokens,
            size + 2 * of.head_dim * (of.window + tokens - 1) + 2 * size_of(q.q),
            4 * tokens * of.heads * of.head_dim * (of.window + count),
            ran("sparse_attention", *calls[0]),
            rotating(lambda a: torch.ops.dsv4.sparse_attention(*a), calls),
            {
                f"{name} matmul, cache in order": rotating(
                    partial(_dense, q.q, calls[0][1], window, near), some
                )
                for name, some in floats.items()
            },
        )


def _dense(
    q: torch.Tensor, sink: torch.Tensor, window: Pages, near: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """Attention to gathered window rows and to the same rows for all tokens."""
    wide, own = q.to(rows.dtype), window.pages.flatten(0, 1)[near].to(rows.dtype)
    dots = [torch.bmm(wide, own.mT), wide @ rows.T]
    p = _softmax(torch.cat(dots, -1) * q.shape[-1] ** -0.5, sink).to(rows.dtype)
    mine, shared = p.split([own.shape[1], len(rows)], -1)
    mixed: torch.Tensor = torch.bmm(mine, own) + shared @ rows
    return mixed.to(q.dtype)


def indexer(of: Dimensions) -> Iterator[Work]:
    """Scores of all keys and the exact top-k; torch's keys lie in order beforehand."""
    n, k = of.index_keys, of.selected
    most = n + -(-max(of.few) // of.csa_ratio)
    size = 2 * of.index_dim * most
    keys = cold(lambda: Pages.random(most, of.index_dim, of.block), size)
    floats = {
        name: [p.in_order(most).to(dtype) for p in keys[: copies(size * dtype.itemsize // 2)]]
        for name, dtype in _TORCH.items()
    }
    for tokens in of.few:
        q, weights = index_queries(of, tokens, n * of.csa_ratio)
        visible = torch.arange(q.context, q.length + 1) // of.csa_ratio
        calls = [index_arguments(q, weights, p, of.csa_ratio) for p in keys]
        hidden = torch.arange(int(visible[-1])) >= visible[:, None]
        yield Work(
            "indexer_topk",
            f"indexer, {n:,} keys x {of.index_heads} x {of.index_dim}, top-{k}",
            tokens,
            2 * of.index_dim * n + size_of(q.q, weights) + 4 * tokens * k,
            tokens * n * of.index_heads * (2 * of.index_dim + 2),
            ran("indexer_topk", *calls[0], k),
            rotating(lambda a: torch.ops.dsv4.indexer_topk(*a, k), calls),
            {
                f"{name} matmul, relu, bmm, topk": rotating(
                    partial(_torch_choice, q.q, weights, hidden, k), some
                )
                for name, some in floats.items()
            },
        )


def _torch_choice(
    q: torch.Tensor, weights: torch.Tensor, hidden: torch.Tensor, k: int, rows: torch.Tensor
) -> torch.Tensor:
    dots = q.to(rows.dtype).flatten(0, 1) @ rows[: hidden.shape[1]].T
    heads = dots.relu_().view(*weights.shape, -1)
    scores = torch.bmm(weights.to(rows.dtype)[:, None], heads).squeeze(1)
    best: torch.Tensor = scores.masked_fill_(hidden, -torch.inf).topk(k).indices
    return best


def topk(of: Dimensions) -> Iterator[Work]:
    """The exact top-k of bf16 scores alone; numpy has no bf16, its scores are fp32."""
    n, k = of.index_keys, of.selected
    for tokens in of.few:
        sets = cold(lambda t=tokens: torch.randn(t, n).bfloat16(), 2 * tokens * n)  # type: ignore[misc]
        wide = [s.float() for s in sets[: copies(4 * tokens * n)]]
        visible = torch.full((tokens,), n)
        yield Work(
            "topk_indices",
            f"top-{k} of {n:,} bf16 scores",
            tokens,
            size_of(sets[0]) + 4 * tokens * k,
            0,
            ran("topk_indices", sets[0], visible, k),
            rotating(lambda s, v=visible: torch.ops.dsv4.topk_indices(s, v, k), sets),
            {
                "torch.topk, bf16": rotating(lambda s: s.topk(k).indices, sets),
                "torch.topk, fp32": rotating(lambda s: s.topk(k).indices, wide),
                "numpy argpartition, fp32": rotating(_partition(k), [s.numpy() for s in wide]),
            },
        )


def _partition(k: int) -> Callable[[Any], torch.Tensor]:
    return lambda s: torch.from_numpy(np.argpartition(s, -k, axis=-1)[:, -k:])
