"""The oracle's loops of the KV compressor (spec/v4.md 4.3)."""

from __future__ import annotations

import numpy as np

from dsv4_backend.proofs.numerics import Array, cast, wide
from dsv4_backend.proofs.paging import Pages, tokens_of_call


def pooled(
    x: Array,
    wkv: Array,
    wgate: Array,
    ape: Array,
    state_cache: Array,
    state_block_table: Array,
    query_start_loc: Array,
    seq_lens: Array,
    hd: int,
) -> tuple[Array, list[int]]:
    """(entries, the block of each): token by token and block by block, from the
    position-addressed form of 4.3.1.
    """
    ratio, width = ape.shape
    states = [Pages(state_cache, table) for table in state_block_table]
    tokens = list(tokens_of_call(query_start_loc, seq_lens))
    for row, s, t in tokens:
        states[s][t] = np.concatenate(
            [wide(wkv) @ wide(x[row]), wide(wgate) @ wide(x[row]) + ape[t % ratio]]
        )
    entries = np.zeros((min(len(x), len(x) // ratio + len(seq_lens)), hd), x.dtype)
    closing = [(s, t // ratio) for _, s, t in tokens if (t + 1) % ratio == 0]
    for out, (s, block) in enumerate(closing):
        entries[out] = cast(x.dtype, _softmax_sum(*_slots_of(states[s], block, ratio, width, hd)))
    return entries, [block for _, block in closing]


def _slots_of(state: Pages, block: int, ratio: int, width: int, hd: int) -> tuple[Array, Array]:
    """[slots, hd] u and s of an entry: the block before,
    where blocks overlap, then its own (4.3).
    """
    own = range(block * ratio, (block + 1) * ratio)
    channels = slice(width - hd, width)
    slots = [(state[t][:width][channels], state[t][width:][channels]) for t in own]
    if width == 2 * hd and block > 0:
        before = range((block - 1) * ratio, block * ratio)
        slots = [(state[t][:hd], state[t][width : width + hd]) for t in before] + slots
    u, s = zip(*slots, strict=True)
    return np.stack(u), np.stack(s)


def _softmax_sum(u: Array, s: Array) -> Array:
    """Softmax over the slots, channel by channel, of s; the sum of u so weighted."""
    p = np.exp(s - s.max(0))
    return np.asarray((p * u).sum(0) / p.sum(0))


def rotated(entry: Array, position: int, inv_freq: Array) -> Array:
    """Adjacent pairs of the last channels,
    turned as complex numbers by an angle that is one fp32 product (3.3).
    """
    angle = wide(np.float32(position) * inv_freq.astype(np.float32))
    head, tail = np.split(entry, [len(entry) - 2 * len(angle)])
    turned = (tail[0::2] + 1j * tail[1::2]) * np.exp(1j * angle)
    return np.concatenate([head, np.stack([turned.real, turned.imag], -1).ravel()])
