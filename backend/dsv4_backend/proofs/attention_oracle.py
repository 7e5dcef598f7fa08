"""Sparse attention in NumPy,
token by token: the list order of spec 4.4 and the online softmax of spec 4.6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dsv4_backend.proofs.numerics import Array, cast, round_to, wide
from dsv4_backend.proofs.paging import Pages, tokens_of_call

TILE = 64
"""Indices of the list that share one step of the online softmax."""
BLOCK = 512
"""Keys of a part that share one step of Ascend's."""


Keys = list[Array | None]
Softmax = Callable[[Array, Array, Keys, Keys, np.dtype], Array]


def _of_tokens(
    softmax: Softmax,
    q: Array,
    sink: Array,
    window_cache: Array,
    window_block_table: Array,
    cmp_cache: Array | None,
    cmp_block_table: Array | None,
    cmp_indices: Array | None,
    query_start_loc: Array,
    seq_lens: Array,
    window: int,
    ratio: int,
) -> Array:
    """[T, H, D] -> [T, H, D] in the type of q: what `softmax` makes of each token's window
    and entries.
    """
    out = np.zeros(q.shape, q.dtype)
    for row, s, t in tokens_of_call(query_start_loc, seq_lens):
        near = _window_keys(Pages(window_cache, window_block_table[s]), t, window)
        far: Keys = []
        if cmp_cache is not None and cmp_block_table is not None:
            named = range((t + 1) // ratio) if cmp_indices is None else cmp_indices[row].tolist()
            entries = Pages(cmp_cache, cmp_block_table[s])
            far = [entries[i] if i >= 0 else None for i in named]
        out[row] = cast(q.dtype, softmax(wide(q[row]), wide(sink), near, far, q.dtype))
    return out


def _window_keys(rows: Pages, t: int, window: int) -> Keys:
    """Keys of positions max(t - window + 1, 0) .. t, then None (no key) up to `window` columns."""
    seen = [rows[j] for j in range(max(t - window + 1, 0), t + 1)] if window else []
    return [*seen, *[None] * (window - len(seen))]


def sparse_attention(*arguments: Any) -> Array:
    """Every token attends to its list in order, tile by tile."""
    return _of_tokens(
        lambda q, sink, near, far, rounding: _attend(q, sink, near + far, rounding), *arguments
    )


def sparse_attention_p512(*arguments: Any) -> Array:
    """Every token attends to the sink, to its window in blocks, then to its entries in blocks."""
    return _of_tokens(_attend_from_sink, *arguments[:9], *arguments[10:])  # no max_seq_len


def _attend(q: Array, sink: Array, keys: Keys, rounding: np.dtype) -> Array:
    """[H, D] of one token -> [H, D]: probabilities against the running maximum,
    rounded for the values only.
    """
    maximum, total, values = np.full(len(q), -np.inf), np.zeros(len(q)), np.zeros(q.shape)
    for first in range(0, len(keys), TILE):
        present = [wide(key) for key in keys[first : first + TILE] if key is not None]
        if not present:
            continue
        tile = np.stack(present)
        scores = q @ tile.T * q.shape[-1] ** -0.5
        raised = np.maximum(maximum, scores.max(-1))
        kept = np.exp(maximum - raised)
        p = np.exp(scores - raised[:, None])
        total = total * kept + p.sum(-1)
        values = values * kept[:, None] + round_to(rounding, p) @ tile
        maximum = raised
    if not any(key is not None for key in keys):
        return values
    return np.asarray(values / (total + np.exp(sink - maximum))[:, None])


def _blocks(keys: Keys) -> list[Array]:
    present = [wide(key) for key in keys if key is not None]
    return [np.stack(present[first : first + BLOCK]) for first in range(0, len(present), BLOCK)]


def _attend_from_sink(q: Array, sink: Array, near: Keys, far: Keys, rounding: np.dtype) -> Array:
    """[H, D] of one token -> [H, D]: an online softmax that the sink begins."""
    maximum, total, values = sink, np.ones(len(q)), np.zeros(q.shape)
    for block in _blocks(near) + _blocks(far):
        scores = q @ block.T / np.sqrt(q.shape[-1])
        raised = np.maximum(maximum, scores.max(-1))
        p, kept = np.exp(scores - raised[:, None]), np.exp(maximum - raised)
        total = total * kept + p.sum(-1)
        values = values * kept[:, None] + round_to(rounding, p) @ block
        maximum = raised
    return np.asarray(values / total[:, None])
