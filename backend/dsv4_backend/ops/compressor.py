"""The KV compressor with its paged, position-addressed state (spec/v4.md 4.3)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dsv4_backend import ragged
from dsv4_backend.contract import Tolerance, compute, operator
from dsv4_backend.ops.norm import rms_norm
from dsv4_backend.ops.rope import rope
from dsv4_backend.relations import (
    ONE_MORE_OFFSET,
    batch,
    bound,
    distinct_rows,
    paged,
    require,
    table,
)


class Call(NamedTuple):
    """The arguments of `compress`."""

    x: torch.Tensor
    wkv: torch.Tensor
    wgate: torch.Tensor
    ape: torch.Tensor
    norm_weight: torch.Tensor
    inv_freq: torch.Tensor
    state_cache: torch.Tensor
    state_block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    max_seq_len: int
    eps: float

    @property
    def ratio(self) -> int:
        """r, tokens per block."""
        return self.ape.shape[0]

    @property
    def groups(self) -> int:
        """c, blocks that one entry reads."""
        return self.ape.shape[1] // self.norm_weight.shape[0]

    def rows_of_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(position, flat state row) of every token: int64 [T] each."""
        tokens = self.x.shape[0]
        sequence = ragged.token_sequences(self.query_start_loc, tokens)
        positions = ragged.token_positions(self.query_start_loc, self.seq_lens, tokens)
        return positions, ragged.slots(
            self.state_block_table, sequence, positions, self.state_cache.shape[1]
        )


def project_tokens(call: Call, positions: torch.Tensor) -> torch.Tensor:
    """State row of every token,
    `[u | s]` with ape inside s: [T, 2 * c * hd] in the accumulation dtype.
    """
    wide = compute(call.x)
    u = wide @ call.wkv.to(wide.dtype).T
    s = wide @ call.wgate.to(wide.dtype).T + call.ape[positions % call.ratio]
    return torch.cat((u, s), -1)


def store_rows(cache: torch.Tensor, flat: torch.Tensor, rows: torch.Tensor) -> None:
    """Write rows [T, D] at the flat rows [T] of a paged state."""
    block_size = cache.shape[1]
    cache.index_put_((flat // block_size, flat % block_size), rows.to(cache.dtype))


def pooled_positions(block: torch.Tensor, ratio: int, groups: int) -> torch.Tensor:
    """Positions of the tokens that block [M] pools;
    negative before the sequence starts: [M, c * r].
    """
    return (block[:, None] + 1) * ratio + torch.arange(-groups * ratio, 0, device=block.device)


def channel_ranges(rows: torch.Tensor, groups: int, ratio: int) -> torch.Tensor:
    """[M, c * r, 2 * c * hd] -> [M, c * r, 2, hd]:
    block g of the c blocks uses channel range g of u and of s.
    """
    rows = rows.unflatten(1, (groups, ratio)).unflatten(-1, (2, groups, -1))  # [M, c, r, 2, c, hd]
    return torch.stack([rows[:, g, :, :, g] for g in range(groups)], 1).flatten(1, 2)


def pool_slots(u: torch.Tensor, s: torch.Tensor, absent: torch.Tensor) -> torch.Tensor:
    """Softmax over slots, separately per channel, of [M, slots, hd];
    absent slots weigh 0, all absent gives 0.
    """
    lowest = torch.finfo(
        s.dtype
    ).min  # not -inf: padding rows have no slot at all and must not become NaN
    weights = s.masked_fill(absent[..., None], lowest).softmax(1)
    return (weights * u.masked_fill(absent[..., None], 0)).sum(1)


def finish_entries(call: Call, pooled: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """RMSNorm, then RoPE at the block's first position."""
    normed = rms_norm.reference(pooled, call.norm_weight, call.eps)
    return rope.reference(normed, (block * call.ratio).clamp(min=0), call.inv_freq, False)


@operator(
    "compress(Tensor x, Tensor wkv, Tensor wgate, Tensor ape, Tensor norm_weight, Tensor inv_freq, "
    "Tensor(a!) state_cache, Tensor state_block_table, Tensor query_start_loc, Tensor seq_lens, "
    "int max_seq_len, float eps) -> Tensor",
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
        "max_seq_len": "at least 0",
        "eps": "a number > 0",
    },
    relations=(
        require("ape", "r >= 1", "shape {sizes(ape)}", "a ratio of at least 1"),
        require(
            "norm_weight",
            "hd >= 1 and (w == hd or w == 2 * hd)",
            "{hd} channels",
            "{w} or half of it, the rows of wkv",
        ),
        require(
            "inv_freq",
            "2 <= 2 * F <= hd",
            "{F} frequencies",
            "1 to {hd // 2}, half of the entry",
        ),
        paged("state_cache"),
        ONE_MORE_OFFSET,
        batch(),
        table(
            "state_block_table",
            "state_cache",
            first="max(((length - new) // r - w // hd + 1) * r, 0)",
            after="length if new > 0 else 0",
            first_block=1,
        ),
        bound("max_seq_len"),
        distinct_rows("state_block_table", "state_cache"),
    ),
    tolerance=Tolerance(
        reason="fp32 projections in any order are off by 1e-6 of their terms, and the softmax "
        "turns an absolute error of a score into a relative one of its weight; bf16 rounds "
        "before the norm, after it and after RoPE (2^-8 each, of the rotated pair)",
        ideal=(4e-6, 1e-5),
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
    max_seq_len: int,
    eps: float,
) -> torch.Tensor:
    """Keep every token's (u, s) and pool each block of r tokens
    that closes in this call into one entry.

    x: [T, d], the normed hidden state; wkv, wgate: [c*hd, d]; ape: fp32 [r, c*hd]; norm_weight:
    [hd]; inv_freq: fp32 [F], 2F <= hd. r = ape.shape[0]; c = 2 (overlap: the previous block's
    tokens count too, with channels 0..hd-1, the block's own with hd..2hd-1) or 1. Everything is
    fp32 until the pooled entry is cast to x's dtype; RMSNorm (eps > 0) and RoPE at the block's
    first position i*r follow in that dtype.
    state_cache: fp32 [num_blocks, block_size, 2*c*hd], changed in place: row [u | s + ape] of
    every token at its position (ragged.py; a table with fewer columns is a ring). The ring must
    hold this call's tokens and the up to c*r - 1 before them that the next entry still reads. Block
    0 belongs to nobody: chips and engines use it for "no block". max_seq_len is at least every
    seq_lens; it decides no value, but a table that reaches it is surely absolute. All
    T rows are written before any is read, so prefill, chunks, decode and overwriting a rejected
    draft are one path. Returns [min(T, T // r + R), hd] in x's dtype: sequences in order, blocks
    in order (`ragged.closed_blocks`), then rows of 0. ArgumentError (nothing written) for
    offsets, lengths, rings or blocks that do not fit, or a row written twice. Source: spec/v4.md
    4.3 [OFF-M Compressor].
    """
    weights, table = (wkv, wgate, ape, norm_weight, inv_freq), state_block_table
    call = Call(x, *weights, state_cache, table, query_start_loc, seq_lens, max_seq_len, eps)
    positions, written = call.rows_of_tokens()
    owner, block = ragged.closed_blocks(query_start_loc, seq_lens, x.shape[0], call.ratio)
    pooled = pooled_positions(block, call.ratio, call.groups)
    read = ragged.slots(table, owner[:, None], pooled, state_cache.shape[1])
    store_rows(state_cache, written, project_tokens(call, positions))
    u, s = channel_ranges(ragged.gather_rows(state_cache, read), call.groups, call.ratio).unbind(2)
    return finish_entries(call, pool_slots(u, s, read < 0).to(x.dtype), block)
