"""Scores and exact choice of the lightning indexer in one step (spec/v4.md 4.5)."""

from __future__ import annotations

import torch

from dsv4_backend.contract import Tolerance, operator
from dsv4_backend.ops.indexer import (
    ARGUMENTS,
    RELATIONS,
    SORT_BYTES,
    IndexerCall,
    best,
    scores_of,
    token_bytes,
    visible_of,
)
from dsv4_backend.tiles import by_tokens


def choice_bytes(call: IndexerCall) -> int:
    """Temporaries of one token's choice."""
    return token_bytes(call) + SORT_BYTES * call.block_table.shape[1] * call.k_cache.shape[1]


@operator(
    "indexer_topk(Tensor q, Tensor k_cache, Tensor weights, Tensor block_table, "
    "Tensor query_start_loc, Tensor seq_lens, int ratio, int k) -> Tensor",
    rows=(14, 15),
    arguments=ARGUMENTS | {"k": "at least 1"},
    relations=RELATIONS,
    tolerance=Tolerance(
        reason="compared are the exact scores of the chosen entries in order, because sums in any "
        "order may exchange near ones; bf16: three roundings of a score",
        ideal=(2e-6, 4e-6),
        official=(2**-8, 2**-6),
    ),
)
def indexer_topk(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    weights: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    ratio: int,
    k: int,
) -> torch.Tensor:
    """`topk_indices` of `indexer_scores`: the k best visible entries of each token, int32
    [T, min(k, columns * block_size)], best first, of equal scores the smaller index, then -1.

    Arguments as in `indexer_scores`, whose roundings the scores have; entries i < (position + 1) //
    ratio are visible. No score is kept: a kernel's memory does not grow with the context. T = 0
    gives an empty result. A token with NaN among its scores chooses nothing; kernels of a CPU name
    it in an ArgumentError, unless contents are not checked. ArgumentError for dtypes, offsets,
    lengths or blocks that do not fit. Source: spec/v4.md 4.5, 15.1.
    """
    call = IndexerCall(q, k_cache, weights, block_table, query_start_loc, seq_lens, ratio)

    def choose(part: slice) -> torch.Tensor:
        scores = scores_of(call, part)
        chosen = best(scores, visible_of(call)[part], k)
        return chosen.masked_fill(scores.isnan().any(1)[:, None], -1)

    return by_tokens(choose, q.shape[0], choice_bytes(call))
