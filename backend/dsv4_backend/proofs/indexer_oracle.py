"""The lightning indexer in NumPy (spec 4.5): scores rounded at every step,
and the selection under a total order.
"""

from __future__ import annotations

import numpy as np

from dsv4_backend.proofs.numerics import Array, cast, round_to, wide
from dsv4_backend.proofs.paging import Pages, tokens_of_call


def indexer_scores(
    q: Array,
    k_cache: Array,
    weights: Array,
    block_table: Array,
    query_start_loc: Array,
    seq_lens: Array,
    ratio: int,
) -> Array:
    """[T, columns * block_size] scores in the type of q, -inf where nothing may be seen."""
    scores = np.full((len(q), block_table.shape[1] * k_cache.shape[1]), -np.inf).astype(q.dtype)
    for row, s, t in tokens_of_call(query_start_loc, seq_lens):
        keys = Pages(k_cache, block_table[s])
        for i in range((t + 1) // ratio):
            dots = round_to(q.dtype, wide(q[row]) @ wide(keys[i]))
            terms = round_to(q.dtype, np.maximum(dots, 0) * wide(weights[row]))
            scores[row, i] = cast(q.dtype, terms.sum())
    return scores


def topk_indices(scores: Array, visible: Array, k: int) -> Array:
    """[T, n] scores -> int32 [T, min(k, n)]: best first,
    of equal ones the smaller index, then -1.
    """
    chosen = np.full((len(scores), min(k, scores.shape[1])), -1, np.int32)
    for row, (values, count) in enumerate(zip(wide(scores), visible.tolist(), strict=True)):
        order = sorted(range(count), key=lambda i: (-values[i], i))[:k]
        chosen[row, : len(order)] = order
    return chosen
