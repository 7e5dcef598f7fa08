"""Scores and exact choice of the lightning indexer in one step (spec/v4.md 4.5)."""

from __future__ import annotations

import torch

from dsv4_backend.contract import Tolerance, operator
from dsv4_backend.errors import argument_error
from dsv4_backend.ops.indexer import (
    SORT_BYTES,
    IndexerCall,
    best,
    scores_of,
    token_bytes,
    visible_of,
)
from dsv4_backend.relations import ONE_MORE_OFFSET, batch, entries, paged
from dsv4_backend.tiles import by_tokens


def _refuse_nan(scores: torch.Tensor, first: int) -> None:
    """ArgumentError for NaN among scores [t, n] on the host; `first`: the first token."""
    if scores.device.type != "cpu" or type(scores) is not torch.Tensor:
        return  # no synchronisation, and no values of a tracer's tensors
    undefined = scores.isnan().any(1)
    if undefined.any():
        found = f"NaN among the scores of token {first + int(undefined.int().argmax())}"
        expected = "queries, keys and weights whose scores are numbers"
        raise argument_error("indexer_topk", "q", found, expected)


@operator(
    "indexer_topk(Tensor q, Tensor k_cache, Tensor weights, Tensor block_table, "
    "Tensor query_start_loc, Tensor seq_lens, int ratio, int k) -> Tensor",
    rows=(14, 15),
    arguments={
        "q": "float [T, HI, DI]",
        "k_cache": "float like q [num_blocks, block_size, DI]",
        "weights": "float like q [T, HI]",
        "block_table": "i32 [R, columns]",
        "query_start_loc": "i32 [S]",
        "seq_lens": "i32 [R]",
        "ratio": "at least 1",
        "k": "at least 1",
    },
    relations=(
        paged("k_cache"),
        ONE_MORE_OFFSET,
        batch(),
        entries("block_table", "k_cache"),
    ),
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
    gives an empty result. ArgumentError for dtypes, offsets, lengths or blocks that do not fit, and
    for NaN among the scores of visible entries: not on an NPU, nor by kernels while contents are
    not checked, where such a token chooses nothing. Source: spec/v4.md 4.5, 15.1.
    """
    call = IndexerCall(q, k_cache, weights, block_table, query_start_loc, seq_lens, ratio)

    def choose(part: slice) -> torch.Tensor:
        scores = scores_of(call, part)
        _refuse_nan(scores, part.start or 0)
        return best(scores, visible_of(call)[part], k)

    entries_of_table = block_table.shape[1] * k_cache.shape[1]
    return by_tokens(choose, q.shape[0], token_bytes(call) + SORT_BYTES * entries_of_table)
