"""Sparse shared-KV attention with sink (spec/v4.md 4.6)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from dsv4_backend import ragged
from dsv4_backend.contract import Tolerance, compute, operator
from dsv4_backend.relations import (
    ONE_MORE_OFFSET,
    absent_unless,
    batch,
    entries,
    given_if,
    of_tokens_in,
    paged,
    require,
    table,
)
from dsv4_backend.tiles import by_tokens

TILE = 64  # keys whose probabilities are rounded against one maximum
_POSITIONS = 1 << 31
ARGUMENTS = {
    "q": "float [T, H, D]",
    "sink": "f32 [H]",
    "window_cache": "float like q [num_blocks, block_size, D]",
    "window_block_table": "i32 [R, columns]",
    "cmp_cache": "float like q [cmp_blocks, cmp_block_size, D]",
    "cmp_block_table": "i32 [R, cmp_columns]",
    "cmp_indices": "i32 [T, N]",
    "query_start_loc": "i32 [S]",
    "seq_lens": "i32 [R]",
    "ratio": "at least 0",
}
"""Specification lines of every attention."""
_BY_RATIO = "{} for ratio {{ratio}}"
RELATIONS = (
    require(
        "window",
        f"(0 if ratio > 0 else 1) <= window < {_POSITIONS}",
        "{number(window)}",
        "at least 1, or 0 beside compressed entries, below 2^31",
    ),
    require("q", "H >= 1 and D >= 1", "shape {sizes(q)}", "at least one head and one channel"),
    *given_if("cmp_cache", "ratio > 0", _BY_RATIO),
    *given_if("cmp_block_table", "ratio > 0", _BY_RATIO),
    absent_unless("cmp_indices", "ratio > 0", _BY_RATIO),
    paged("window_cache"),
    ONE_MORE_OFFSET,
    paged("cmp_cache", "cmp_blocks cmp_block_size cmp_columns"),
    batch(),
    table(
        "window_block_table",
        "window_cache",
        first="max(length - new + 1 - window, 0)",
        after="length if new > 0 and window > 0 else 0",
    ),
    entries("cmp_block_table", "cmp_cache"),
    of_tokens_in(
        "cmp_indices",
        low="-1",
        high="(position + 1) // ratio",
        expected="-1 or one of the {(position + 1) // ratio} visible entries",
    ),
)
"""What every attention asks of its arguments together."""


class Keys(NamedTuple):
    """Keys that are also values, in list order: rows [T, n, D] in the accumulation dtype;
    valid: bool [T, n].
    """

    rows: torch.Tensor
    valid: torch.Tensor
    hidden_rows: bool = False  # whether rows without `valid` hold anything but zeros

    def values(self) -> torch.Tensor:
        """Rows for the weighted sum: NaN shows in the scores,
        and where hidden it must not leak as 0 * NaN.
        """
        return self.rows.nan_to_num(0, 0, 0) if self.hidden_rows else self.rows


class AttentionCall(NamedTuple):
    """The arguments of `sparse_attention`."""

    q: torch.Tensor
    sink: torch.Tensor
    window_cache: torch.Tensor
    window_block_table: torch.Tensor
    cmp_cache: torch.Tensor | None
    cmp_block_table: torch.Tensor | None
    cmp_indices: torch.Tensor | None
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    window: int
    ratio: int

    def owners(self) -> torch.Tensor:
        """Sequence of every token: int64 [T]."""
        return ragged.token_sequences(self.query_start_loc, self.q.shape[0])

    def positions(self) -> torch.Tensor:
        """Position of every token: int64 [T]."""
        return ragged.token_positions(self.query_start_loc, self.seq_lens, self.q.shape[0])

    def shares_entries(self) -> bool:
        """Whether all tokens attend to the entries of one sequence,
        in one order: no copy of them per token.
        """
        return self.cmp_indices is None and len(self.seq_lens) == 1

    def token_bytes(self) -> int:
        """Temporaries of one token in `sparse_attention`."""
        wide = 8 if self.q.dtype == torch.float64 else 4
        score, row = 8 * wide * self.q.shape[1], 4 * wide * self.q.shape[2]
        size = self.window * (score + row)
        if self.cmp_indices is not None:
            return size + self.cmp_indices.shape[1] * (score + row)
        if self.cmp_cache is None or self.cmp_block_table is None:
            return size
        entries = self.cmp_block_table.shape[1] * self.cmp_cache.shape[1]
        return size + entries * (score if self.shares_entries() else score + row)


class Tokens(NamedTuple):
    """Some tokens of a call: their rows in it, and int64 [T] each."""

    rows: slice
    owners: torch.Tensor
    positions: torch.Tensor


def near_positions(positions: torch.Tensor, window: int) -> torch.Tensor:
    """Positions of each token's window keys from max(t - window + 1, 0) on,
    -1 behind the token: [T, window].
    """
    first = (positions[:, None] + 1 - window).clamp(min=0)
    index = first + torch.arange(window, device=positions.device)
    return index.masked_fill(index > positions[:, None], -1)


def visible_entries(positions: torch.Tensor, ratio: int) -> torch.Tensor:
    """How many compressed entries each token sees (4.2)."""
    return (positions + 1) // ratio


def _chosen(
    cache: torch.Tensor, block_table: torch.Tensor, owners: torch.Tensor, index: torch.Tensor
) -> Keys:
    """The rows `index` [T, n] of each token's sequence; negative indices are no keys."""
    flat = ragged.slots(block_table, owners[:, None], index, cache.shape[1])
    valid = flat >= 0
    return Keys(compute(ragged.gather_rows(cache, flat)).masked_fill(~valid[..., None], 0), valid)


def window_keys(call: AttentionCall, tokens: Tokens) -> Keys:
    """Window keys of every token, [T, window]."""
    index = near_positions(tokens.positions, call.window)
    return _chosen(call.window_cache, call.window_block_table, tokens.owners, index)


def compressed_keys(call: AttentionCall, tokens: Tokens) -> Keys | None:
    """Compressed entries of every token, the chosen or all visible ones;
    None without compression.
    """
    cache, block_table, owners = call.cmp_cache, call.cmp_block_table, tokens.owners
    if cache is None or block_table is None:
        return None
    if call.cmp_indices is not None:
        return _chosen(cache, block_table, owners, call.cmp_indices[tokens.rows].long())
    index = torch.arange(block_table.shape[1] * cache.shape[1], device=cache.device)
    valid = index < visible_entries(tokens.positions, call.ratio)[:, None]
    if not call.shares_entries():
        return _chosen(cache, block_table, owners, index.where(valid, -1))
    lengths = ragged.entries_to_read(call.query_start_loc, call.seq_lens, call.ratio)
    rows = compute(ragged.entry_rows(cache, block_table, owners[:1], index, lengths))
    return Keys(rows.expand(len(owners), -1, -1), valid, True)


def score_keys(q: torch.Tensor, keys: Keys) -> torch.Tensor:
    """Scaled dot products [T, H, n], -inf where there is no key."""
    dot = torch.bmm(q, keys.rows.transpose(-1, -2))
    return (dot / math.sqrt(q.shape[-1])).masked_fill(~keys.valid[:, None], -torch.inf)


def running_peaks(scores: torch.Tensor, tile: int = TILE) -> torch.Tensor:
    """Largest score up to the end of each tile [T, H, tiles];
    before the first key that of the row, 0 without a key.

    It cancels in the result, but for the rounding of probabilities, so it needs no gradient.
    """
    tiles = max(1, -(-scores.shape[-1] // tile))
    padded = pad(scores.detach(), (0, tiles * tile - scores.shape[-1]), value=-torch.inf)
    peaks = padded.unflatten(-1, (tiles, tile)).amax(-1).cummax(-1).values
    last = peaks[..., -1:].masked_fill(peaks[..., -1:] == -torch.inf, 0)
    return torch.where(peaks == -torch.inf, last, peaks)


def keys_share(peak: torch.Tensor, total: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
    """Total / (total + exp(sink - peak)), without overflow."""
    x = peak + total.log() - sink[:, None]
    small = torch.where(x >= 0, -x, x).exp()  # torch.sigmoid has other bits where vectors end
    return torch.where(x >= 0, 1, small) / (1 + small)


def round_probabilities(p: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What multiplies the values; their sum keeps p as it is."""
    return p.to(dtype).to(p.dtype)


def attend(
    q: torch.Tensor, sink: torch.Tensor, parts: list[Keys], tile: int = TILE
) -> torch.Tensor:
    """One softmax over all parts, in their order, and the sink: [T, H, D] in q's dtype."""
    wide = compute(q)
    logits = torch.cat([score_keys(wide, keys) for keys in parts], -1)
    maxima = running_peaks(logits, tile)
    last = maxima[..., -1:]
    of_key = maxima.repeat_interleave(tile, -1)[..., : logits.shape[-1]]
    p, rescale = (logits - of_key).exp(), (of_key - last).exp()
    total = (p * rescale).sum(-1, keepdim=True)
    total = total.masked_fill(total == 0, 1)
    weights = (round_probabilities(p, q.dtype) * rescale).split(
        [keys.valid.shape[1] for keys in parts], -1
    )
    mixed = torch.stack(
        [torch.bmm(w, keys.values()) for w, keys in zip(weights, parts, strict=True)]
    ).sum(0)
    return (mixed / total * keys_share(last, total, sink.to(wide.dtype))).to(q.dtype)


def attend_by_tokens(
    call: AttentionCall,
    softmax: Callable[[torch.Tensor, torch.Tensor, list[Keys]], torch.Tensor],
) -> torch.Tensor:
    """`softmax(q, sink, parts)` of some tokens at a time: [T, H, D]."""
    owners, positions = call.owners(), call.positions()

    def some(rows: slice) -> torch.Tensor:
        tokens = Tokens(rows, owners[rows], positions[rows])
        parts = [window_keys(call, tokens), compressed_keys(call, tokens)]
        return softmax(call.q[rows], call.sink, [keys for keys in parts if keys is not None])

    return by_tokens(some, call.q.shape[0], call.token_bytes())


@operator(
    "sparse_attention(Tensor q, Tensor sink, Tensor window_cache, Tensor window_block_table, "
    "Tensor? cmp_cache, Tensor? cmp_block_table, Tensor? cmp_indices, Tensor query_start_loc, "
    "Tensor seq_lens, int window, int ratio) -> Tensor",
    rows=(16,),
    arguments=ARGUMENTS,
    relations=RELATIONS,
    tolerance=Tolerance(
        reason="fp32 sums in any order; a bf16 probability next to a midpoint may tip, 2^-8 of it: "
        "seen up to 0.93 of the limit with noise of 4e-6 on the scores, where rounding "
        "against another maximum uses 2.3 or more; the result may land on the other "
        "neighbour (2^-7)",
        ideal=(4e-6, 2e-5),
        official=(2**-9, 2**-7),
    ),
)
def sparse_attention(
    q: torch.Tensor,
    sink: torch.Tensor,
    window_cache: torch.Tensor,
    window_block_table: torch.Tensor,
    cmp_cache: torch.Tensor | None,
    cmp_block_table: torch.Tensor | None,
    cmp_indices: torch.Tensor | None,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    window: int,
    ratio: int,
) -> torch.Tensor:
    """Multi-query attention over window keys and compressed entries,
    one softmax together with a sink per head.

    q: [T, H, D]; sink: fp32 [H], -inf for none; caches: paged [num_blocks, block_size, D] in q's
    dtype with this call's rows already in them; a row is key and value of all heads. The token at
    position t sees window keys t - window + 1 .. t (the window's table may be a ring) and, if
    ratio > 0, compressed entries: those named by cmp_indices (int32 [T, N], each < (t + 1) //
    ratio, -1 = none, a repeated one counts twice), or all i < (t + 1) // ratio when cmp_indices is
    None. ratio 0: the three cmp_ arguments are None. window 0 means no window keys and needs
    ratio > 0. The keys of a token form a list: window rows from position max(t - window + 1, 0) on,
    padded with "no key" to window columns, then compressed entries, in the order of cmp_indices or
    ascending. An online softmax takes it in tiles of 64: a = (q . k) * D^-0.5 in fp32; p = exp(a -
    m), m the largest a up to the end of p's tile, the sink not among them; p is cast to q's dtype
    for the product with the values only. With M the largest a of all and w = p exp(m - M), o = sum
    w k / (sum w + exp(sink - M)), fp32, one cast. So the order of the list matters to roundings of
    p; it does not depend on the chunk. Returns [T, H, D] in q's dtype. Tokens are done in tiles,
    with temporaries of tiles.BUDGET. A row with no key is 0. T = 0 gives an empty result. NaN in
    hidden rows does not matter. ArgumentError for dtypes, offsets, lengths, blocks, or indices that
    do not fit. Source: spec/v4.md 4.2, 4.6 [OFF-K sparse_attn].
    """
    caches = (window_cache, window_block_table, cmp_cache, cmp_block_table, cmp_indices)
    call = AttentionCall(q, sink, *caches, query_start_loc, seq_lens, window, ratio)
    return attend_by_tokens(call, attend)
