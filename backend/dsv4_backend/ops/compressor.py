"""The KV compressor with its paged, position-addressed state (spec/v4.md 4.3)."""

from __future__ import annotations

import torch

from dsv4_backend import ragged
from dsv4_backend.contract import Tolerance, compute, operator
from dsv4_backend.ops.norm import rms_norm
from dsv4_backend.ops.rope import rope


def _project(
    x: torch.Tensor, wkv: torch.Tensor, wgate: torch.Tensor, ape: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """State row of every token, `[u | s]` with ape inside s: [T, 2 * c * hd] in the accumulation dtype."""
    wide = compute(x)
    u = wide @ wkv.to(wide.dtype).T
    s = wide @ wgate.to(wide.dtype).T + ape[positions % ape.shape[0]]
    return torch.cat((u, s), -1)


def _store(cache: torch.Tensor, flat: torch.Tensor, rows: torch.Tensor) -> None:
    block_size = cache.shape[1]
    cache.index_put_((flat // block_size, flat % block_size), rows.to(cache.dtype))


def _lookback(last: torch.Tensor, span: int) -> torch.Tensor:
    """Positions of the `span` tokens that end at `last`; negative before the sequence starts."""
    return last[:, None] + torch.arange(1 - span, 1, device=last.device)


def _halves(rows: torch.Tensor, groups: int, ratio: int) -> torch.Tensor:
    """[M, c * r, 2 * c * hd] -> [M, c * r, 2, hd]: block g of the c blocks uses channel range g of u and of s."""
    rows = rows.unflatten(1, (groups, ratio)).unflatten(-1, (2, groups, -1))  # [M, c, r, 2, c, hd]
    return torch.stack([rows[:, g, :, :, g] for g in range(groups)], 1).flatten(1, 2)


def _pool(u: torch.Tensor, s: torch.Tensor, absent: torch.Tensor) -> torch.Tensor:
    """Softmax over slots, separately per channel, of [M, slots, hd]; absent slots weigh 0, all absent gives 0."""
    lowest = torch.finfo(s.dtype).min  # not -inf: padding rows have no slot at all and must not become NaN
    weights = s.masked_fill(absent[..., None], lowest).softmax(1)
    return (weights * u.masked_fill(absent[..., None], 0)).sum(1)


@operator(
    "compress(Tensor x, Tensor wkv, Tensor wgate, Tensor ape, Tensor norm_weight, Tensor inv_freq, "
    "Tensor(a!) state_cache, Tensor state_block_table, Tensor query_start_loc, Tensor seq_lens, float eps) -> Tensor",
    rows=(12, 13),
    arguments={
        "x": "float [T, d]",
        "wkv": "float [w, d]",
        "wgate": "float [w, d]",
        "ape": "f32 [r, w]",
        "norm_weight": "float [hd]",
        "inv_freq": "f32 [F]",
        "state_cache": "f32 [num_blocks, block_size, 2*w]",
        "state_block_table": "i32 [R, columns]",
        "query_start_loc": "i32 [S]",
        "seq_lens": "i32 [R]",
    },
    tolerance=Tolerance(
        reason="fp32 projections in any order are 1e-6 of their largest term; the softmax turns that into as much "
        "relative error; bf16 rounds before the norm, after it and after RoPE (2^-8 each, on the rotated pair)",
        ideal=(2e-6, 2e-5),
        official=(2**-6, 2**-6),
    ),
)
def compress(
    x: torch.Tensor,
    wkv: torch.Tensor,
    wgate: torch.Tensor,
    ape: torch.Tensor,
    norm_weight: torch.Tensor,
    inv_freq: torch.Tensor,
    state_cache: torch.Tensor,
    state_block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """Keep every token's (u, s) and pool each block of r tokens that closes in this call into one entry.

    x: [T, d], the normed hidden state; wkv, wgate: [c*hd, d]; ape: fp32 [r, c*hd]; norm_weight: [hd]; inv_freq: fp32
    [F], 2F <= hd. r = ape.shape[0]; c = 2 (overlap: the previous block's tokens count too, with channels 0..hd-1, the
    block's own with hd..2hd-1) or 1. Everything is fp32 until the pooled entry is cast to x's dtype; RMSNorm (> 0 eps)
    and RoPE at the block's first position i*r follow in that dtype.
    state_cache: fp32 [num_blocks, block_size, 2*c*hd], changed in place: row [u | s + ape] of every token at its
    position (ragged.py; a table with fewer columns is a ring). The ring must hold this call's tokens and the up to
    c*r - 1 before them that the next entry still reads. All T rows are written before any is read, so prefill, chunks,
    decode and overwriting a rejected draft are one path.
    Returns [min(T, T // r + R), hd] in x's dtype: sequences in order, blocks in order (`ragged.closed_blocks`), then
    rows of 0. ArgumentError (nothing written) for offsets, lengths, rings or blocks that do not fit, or a row
    written twice. Source: spec/v4.md 4.3 [OFF-M Compressor].
    """
    ratio, groups = ape.shape[0], ape.shape[1] // norm_weight.shape[0]
    block_size = state_cache.shape[1]
    tokens = x.shape[0]
    sequence = ragged.token_sequences(query_start_loc, tokens)
    positions = ragged.token_positions(query_start_loc, seq_lens, tokens)
    flat = ragged.slots(state_block_table, sequence, positions, block_size)
    _store(state_cache, flat, _project(x, wkv, wgate, ape, positions))

    owner, block = ragged.closed_blocks(query_start_loc, seq_lens, tokens, ratio)
    index = _lookback((block + 1) * ratio - 1, groups * ratio)
    flat = ragged.slots(state_block_table, owner[:, None], index, block_size)
    u, s = _halves(ragged.gather_rows(state_cache, flat), groups, ratio).unbind(2)
    pooled = _pool(u, s, flat < 0).to(x.dtype)
    return rope.reference(rms_norm.reference(pooled, norm_weight, eps), (block * ratio).clamp(min=0), inv_freq, False)
