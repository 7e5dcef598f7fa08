"""Lightning indexer scores and top-k selection (spec/v4.md 4.5)."""

from __future__ import annotations

import torch

from dsv4_backend import ragged
from dsv4_backend.contract import Tolerance, compute, operator


def _dot(q: torch.Tensor, rows: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
    """Q [T, H, D] with the rows [R, n, D] of each token's sequence: [T, H, n] in the accumulation dtype."""
    if rows.shape[0] == 1:  # one sequence: one product, and no copy of the rows per token
        return compute(q) @ compute(rows[0]).T
    return torch.einsum("thd,tnd->thn", compute(q), compute(rows)[sequence])


def _combine(dot: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum over heads of relu(dot) * weight, every tensor in the inputs' dtype: [T, n]."""
    weighted = dot.to(weights.dtype).relu() * weights[:, :, None]
    return compute(weighted).sum(1).to(weights.dtype)


def _hide(scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    entry = torch.arange(scores.shape[1], device=scores.device)
    return scores.masked_fill(entry >= visible[:, None], -torch.inf)


@operator(
    "indexer_scores(Tensor q, Tensor k_cache, Tensor weights, Tensor block_table, Tensor query_start_loc, "
    "Tensor seq_lens, int ratio) -> Tensor",
    rows=(14,),
    arguments={
        "q": "float [T, HI, DI]",
        "k_cache": "float [num_blocks, block_size, DI]",
        "weights": "float [T, HI]",
        "block_table": "i32 [R, columns]",
        "query_start_loc": "i32 [S]",
        "seq_lens": "i32 [R]",
    },
    tolerance=Tolerance(
        reason="fp32 dots of 128 terms and sums of 64 heads in any order; bf16 tensors after each of three steps",
        ideal=(1e-5, 1e-5),
        official=(2**-6, 2**-6),
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
    """`I[t, i] = sum_h relu(q[t, h] . k[i]) * weights[t, h]` for every compressed entry i of the token's sequence.

    q: [T, HI, DI]; weights: [T, HI], already scaled by DI^-0.5 * HI^-0.5, any sign; k_cache: paged
    [num_blocks, block_size, DI] with this call's entries already in it; all of one float dtype.
    Returns [T, columns * block_size] in that dtype: dot product, relu * weight and the sum are tensors of that dtype
    (bf16 in the official profile), sums inside are fp32. Entries i >= (position + 1) // ratio, which the token must
    not see, are -inf whatever the cache holds there. T = 0 gives an empty result. ArgumentError for offsets, lengths
    or blocks that do not fit. Source: spec/v4.md 4.5 [OFF-M Indexer], visibility 4.2.
    """
    tokens = q.shape[0]
    positions = ragged.token_positions(query_start_loc, seq_lens, tokens)
    rows = ragged.table_rows(k_cache, block_table, seq_lens // ratio)
    scores = _combine(_dot(q, rows, ragged.token_sequences(query_start_loc, tokens)), weights)
    return _hide(scores, (positions + 1) // ratio)


@operator(
    "topk_indices(Tensor scores, Tensor visible, int k) -> Tensor",
    rows=(15,),
    arguments={"scores": "float [T, n]", "visible": "int [T]"},
    tolerance=Tolerance(reason="indices under a total order (score, then smaller index) are exact"),
)
def topk_indices(scores: torch.Tensor, visible: torch.Tensor, k: int) -> torch.Tensor:
    """The k best of the first visible[t] scores of every row: int32 [T, min(k, n)], best first, -1 where there is none.

    scores: float [T, n]; visible: int [T] in [0, n]; k >= 1. Equal scores (-0 equals 0): the smaller index first.
    What lies at or past visible[t] is ignored, NaN included. ArgumentError for NaN among visible scores.
    Source: spec/v4.md 4.5 items 6 to 8, 15.1 (tie rule).
    """
    width = min(k, scores.shape[1])
    order = _hide(scores, visible).sort(dim=1, descending=True, stable=True).indices[:, :width]
    rank = torch.arange(width, device=scores.device)
    return torch.where(rank < visible[:, None], order, -1).int()
