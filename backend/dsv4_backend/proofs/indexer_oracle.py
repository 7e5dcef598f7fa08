"""The lightning indexer in NumPy (spec 4.5): scores rounded at every step,
and the selection under a total order.
"""

from __future__ import annotations

from collections.abc import Callable

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


Rounding = Callable[[Array], Array]


def unrounded(scores: Array) -> Array:
    """Scores that the choice sees as they are."""
    return scores


def entry_scores(
    q: Array,
    q_scale: Array | None,
    k_cache: Array,
    k_scale: Array | None,
    weights: Array,
    block_table: Array,
    query_start_loc: Array,
    seq_lens: Array,
    ratio: int,
) -> list[Array]:
    """Exact scores of the entries that each token sees."""
    found = []
    for row, s, t in tokens_of_call(query_start_loc, seq_lens):
        count = (t + 1) // ratio
        keys = Pages(k_cache, block_table[s])
        rows = np.stack([wide(keys[i]) for i in range(count)] or [np.zeros(q.shape[2])])[:count]
        dots = wide(q[row]) @ rows.T
        if q_scale is not None and k_scale is not None:
            scales = Pages(k_scale[..., None], block_table[s])
            of_keys = np.array([float(wide(scales[i])[0]) for i in range(count)])
            dots = dots * wide(q_scale[row])[:, None] * of_keys
        found.append(wide(weights[row]) @ np.maximum(dots, 0))
    return found


def best_entries(scores: list[Array], k: int, rounded: Rounding) -> Array:
    """int32 [T, k]: best first, of equal ones the smaller index, then -1."""
    chosen = np.full((len(scores), k), -1, np.int32)
    for row, values in enumerate(map(rounded, scores)):
        order = np.argsort(-values, kind="stable")[:k]
        chosen[row, : len(order)] = order
    return chosen


def scores_in_order(scores: list[Array], chosen: Array) -> Array:
    """[T, k] scores of what was chosen, then -inf; NaN for what may not stand there: an entry that
    is not visible, one chosen twice, one behind a -1.
    """
    result = np.full(chosen.shape, -np.inf)
    for row, (values, entries) in enumerate(zip(scores, chosen.tolist(), strict=True)):
        count = sum(entry >= 0 for entry in entries)
        named, behind = entries[:count], entries[count:]
        right = all(0 <= entry < len(values) for entry in named) and len(set(named)) == count
        right &= all(entry == -1 for entry in behind)
        result[row, :count] = values[named] if right else np.nan
    return result


def scores_of_choice(scores: list[Array], chosen: Array) -> Array:
    """`scores_in_order` with the largest first, where the order of the choice is open."""
    return -np.sort(-scores_in_order(scores, chosen), axis=1)
