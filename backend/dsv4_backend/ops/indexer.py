"""Lightning indexer scores and top-k selection (spec/v4.md 4.5)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dsv4_backend import ragged
from dsv4_backend.contract import Tolerance, compute, operator
from dsv4_backend.ops.attention import visible_entries
from dsv4_backend.relations import ONE_MORE_OFFSET, batch, entries, numbers, paged, values_in
from dsv4_backend.tiles import by_tokens, spans

_DTYPES = {"ideal": torch.float32, "official": torch.bfloat16}
ENTRIES = 1 << 14
"""Entries that are scored at a time."""
SORT_BYTES = 32
"""Of one score while it is sorted: its copies, its index."""
ARGUMENTS = {
    "q": "float [T, HI, DI]",
    "k_cache": "float like q [num_blocks, block_size, DI]",
    "weights": "float like q [T, HI]",
    "block_table": "i32 [R, columns]",
    "query_start_loc": "i32 [S]",
    "seq_lens": "i32 [R]",
    "ratio": "at least 1",
}
"""Of the operators that score a paged cache of keys."""
RELATIONS = (
    paged("k_cache"),
    ONE_MORE_OFFSET,
    batch(),
    entries("block_table", "k_cache"),
)


class IndexerCall(NamedTuple):
    """The arguments of `indexer_scores`."""

    q: torch.Tensor
    k_cache: torch.Tensor
    weights: torch.Tensor
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    ratio: int


def key_rows(call: IndexerCall, sequence: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    """Compressed entries [n] of every token's sequence [T], 0 behind the last: [T, n, DI]."""
    lengths = ragged.entries_to_read(call.query_start_loc, call.seq_lens, call.ratio)
    # One sequence: no copy of the rows per token.
    owners = sequence[:1] if len(call.seq_lens) == 1 else sequence
    rows = ragged.entry_rows(call.k_cache, call.block_table, owners, entries, lengths)
    return compute(rows).expand(len(sequence), -1, -1)


def _dot(q: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Q [T, HI, DI] with each token's rows [T, n, DI]: [T, HI, n] in the accumulation dtype."""
    return torch.bmm(compute(q), rows.transpose(1, 2))


def _combine(dot: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum over heads of relu(dot) * weight, every tensor in the weights' dtype: [T, n]."""
    weighted = dot.to(weights.dtype).relu() * weights[:, :, None]
    return compute(weighted).sum(1).to(weights.dtype)


def hide(scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Scores [T, n] with -inf from visible[t] on."""
    entry = torch.arange(scores.shape[1], device=scores.device)
    return scores.masked_fill(entry >= visible[:, None], -torch.inf)


def visible_of(call: IndexerCall) -> torch.Tensor:
    """How many entries each token sees: [T]."""
    positions = ragged.token_positions(call.query_start_loc, call.seq_lens, call.q.shape[0])
    return visible_entries(positions, call.ratio)


def scores_of(call: IndexerCall, part: slice) -> torch.Tensor:
    """Scores of some tokens: [t, entries], -inf from the first that a token does not see on."""
    entries = call.block_table.shape[1] * call.k_cache.shape[1]
    owners = ragged.token_sequences(call.query_start_loc, call.q.shape[0])[part]
    index = torch.arange(entries, device=call.q.device)
    rows = (key_rows(call, owners, index[span]) for span in spans(entries, ENTRIES))
    scores = [_combine(_dot(call.q[part], some), call.weights[part]) for some in rows]
    return hide(torch.cat(scores, 1), visible_of(call)[part])


def token_bytes(call: IndexerCall) -> int:
    """Temporaries of one token's scores, of which `ENTRIES` bounds the large ones."""
    entries = call.block_table.shape[1] * call.k_cache.shape[1]
    wide = 8 if call.q.dtype == torch.float64 else 4
    key = 0 if len(call.seq_lens) == 1 else 3 * wide * call.q.shape[2]
    return min(entries, ENTRIES) * (4 * wide * call.q.shape[1] + key) + 2 * wide * entries


@operator(
    "indexer_scores(Tensor q, Tensor k_cache, Tensor weights, Tensor block_table, "
    "Tensor query_start_loc, Tensor seq_lens, int ratio) -> Tensor",
    rows=(14,),
    arguments=ARGUMENTS,
    relations=RELATIONS,
    tolerance=Tolerance(
        reason="fp32 dot products of 128 terms and sums of 64 weighted heads in any order, at "
        "weights of (DI*HI)^-0.5; bf16: a dot product next to a midpoint may round to the "
        "other neighbour, and so may the sum",
        ideal=(2e-6, 4e-6),
        official=(2**-9, 2**-7),
    ),
)
def indexer_scores(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    weights: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    ratio: int,
) -> torch.Tensor:
    """`I[t, i] = sum_h relu(q[t, h] . k[i]) * weights[t, h]`
    for every compressed entry i of the token's sequence.

    q: [T, HI, DI]; weights: [T, HI], already scaled by DI^-0.5 * HI^-0.5, any sign; k_cache: paged
    [num_blocks, block_size, DI] with this call's entries already in it; all of one float dtype.
    Returns [T, columns * block_size] in that dtype: dot product, relu * weight and the sum are
    tensors of that dtype (bf16 in the official profile), sums inside are fp32. Entries i >=
    (position + 1) // ratio, which the token must not see, are -inf whatever the cache holds there.
    T = 0 gives an empty result. ArgumentError for dtypes, offsets, lengths or blocks that do not
    fit. Source: spec/v4.md 4.5 [OFF-M Indexer], visibility 4.2.
    """
    call = IndexerCall(q, k_cache, weights, block_table, query_start_loc, seq_lens, ratio)
    return by_tokens(lambda part: scores_of(call, part), q.shape[0], token_bytes(call))


def pad_behind(order: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """int32 [T, n] with -1 behind the first visible[t] of a row."""
    rank = torch.arange(order.shape[1], device=order.device)
    return torch.where(rank < visible[:, None], order, -1).int()


def best(scores: torch.Tensor, visible: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest of the visible scores [T, n], of equal ones the smaller index first, then -1:
    int32 [T, min(k, n)].
    """
    order = hide(scores, visible).sort(dim=1, descending=True, stable=True).indices
    return pad_behind(order[:, :k], visible)


@operator(
    "topk_indices(Tensor scores, Tensor visible, int k) -> Tensor",
    rows=(15,),
    arguments={"scores": "float [T, n]", "visible": "int [T]", "k": "at least 1"},
    relations=(
        values_in("visible", "0", "n + 1", "0 to {n}, the scores of a row"),
        numbers("scores", "visible"),
    ),
    tolerance=Tolerance(reason="indices under a total order (score, then smaller index) are exact"),
)
def topk_indices(scores: torch.Tensor, visible: torch.Tensor, k: int) -> torch.Tensor:
    """The k best of the first visible[t] scores of every row: int32 [T, min(k, n)],
    best first, -1 where there is none.

    scores: float [T, n]; visible: int [T] in [0, n]; k >= 1. Equal scores (-0 equals 0): the
    smaller index first. What lies at or past visible[t] is ignored, NaN included. ArgumentError for
    NaN among visible scores. Source: spec/v4.md 4.5 items 6 to 8, 15.1 (tie rule).
    """
    return by_tokens(
        lambda part: best(scores[part], visible[part], k),
        scores.shape[0],
        SORT_BYTES * scores.shape[1],
    )
