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
    Relation,
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
    def pool(self) -> PoolCall:
        """The arguments of `compress_pool`."""
        state = self.state_cache, self.state_block_table, self.query_start_loc, self.seq_lens
        bounds = self.max_seq_len, self.norm_weight.shape[0]
        return PoolCall(self.x, self.wkv, self.wgate, self.ape, *state, *bounds)


class PoolCall(NamedTuple):
    """The arguments of `compress_pool`."""

    x: torch.Tensor
    wkv: torch.Tensor
    wgate: torch.Tensor
    ape: torch.Tensor
    state_cache: torch.Tensor
    state_block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    max_seq_len: int
    head_dim: int

    @property
    def ratio(self) -> int:
        """r, tokens per block."""
        return self.ape.shape[0]

    @property
    def groups(self) -> int:
        """c, blocks that one entry reads."""
        return self.ape.shape[1] // self.head_dim

    def rows_of_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(position, flat state row) of every token: int64 [T] each."""
        tokens = self.x.shape[0]
        sequence = ragged.token_sequences(self.query_start_loc, tokens)
        positions = ragged.token_positions(self.query_start_loc, self.seq_lens, tokens)
        return positions, ragged.slots(
            self.state_block_table, sequence, positions, self.state_cache.shape[1]
        )


def project_tokens(call: PoolCall, positions: torch.Tensor) -> torch.Tensor:
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


def pool_blocks(call: PoolCall) -> tuple[torch.Tensor, torch.Tensor]:
    """(pooled entries [rows, hd] in x's dtype, block of each, -1 behind the last)."""
    positions, written = call.rows_of_tokens()
    owner, block = ragged.closed_blocks(
        call.query_start_loc, call.seq_lens, call.x.shape[0], call.ratio
    )
    pooled = pooled_positions(block, call.ratio, call.groups)
    read = ragged.slots(call.state_block_table, owner[:, None], pooled, call.state_cache.shape[1])
    store_rows(call.state_cache, written, project_tokens(call, positions))
    u, s = channel_ranges(
        ragged.gather_rows(call.state_cache, read), call.groups, call.ratio
    ).unbind(2)
    return pool_slots(u, s, read < 0).to(call.x.dtype), block


def finish_entries(call: Call, pooled: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """RMSNorm, then RoPE at the block's first position."""
    normed = rms_norm.reference(pooled, call.norm_weight, call.eps)
    return rope.reference(normed, (block * call.pool.ratio).clamp(min=0), call.inv_freq, False)


_POOLED = {
    "x": "float [T, d]",
    "wkv": "float [w, d]",
    "wgate": "float [w, d]",
    "ape": "f32 [r, w]",
    "state_cache": "f32 [num_blocks, block_size, 2*w]",
    "state_block_table": "i32 [R, columns]",
    "query_start_loc": "i32 [S]",
    "seq_lens": "i32 [R]",
    "max_seq_len": "at least 0",
}
_RATIO = require("ape", "r >= 1", "shape {sizes(ape)}", "a ratio of at least 1")


def _state(entry: str) -> tuple[Relation, ...]:
    """What holds for the state; entry: the name of an entry's channels."""
    return (
        paged("state_cache"),
        ONE_MORE_OFFSET,
        batch(),
        table(
            "state_block_table",
            "state_cache",
            first=f"max(((length - new) // r - w // {entry} + 1) * r, 0)",
            after="length if new > 0 else 0",
            first_block=1,
        ),
        bound("max_seq_len"),
        distinct_rows("state_block_table", "state_cache"),
    )


@operator(
    "compress(Tensor x, Tensor wkv, Tensor wgate, Tensor ape, Tensor norm_weight, Tensor inv_freq, "
    "Tensor(a!) state_cache, Tensor state_block_table, Tensor query_start_loc, Tensor seq_lens, "
    "int max_seq_len, float eps) -> Tensor",
    rows=(12, 13),
    arguments={
        **_POOLED,
        "norm_weight": "float [hd]",
        "inv_freq": "f32 [F]",
        "eps": "a number > 0",
    },
    relations=(
        _RATIO,
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
        *_state("hd"),
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
    weights = wkv, wgate, ape, norm_weight, inv_freq
    state = state_cache, state_block_table, query_start_loc, seq_lens
    call = Call(x, *weights, *state, max_seq_len, eps)
    return finish_entries(call, *pool_blocks(call.pool))


@operator(
    "compress_pool(Tensor x, Tensor wkv, Tensor wgate, Tensor ape, Tensor(a!) state_cache, "
    "Tensor state_block_table, Tensor query_start_loc, Tensor seq_lens, int max_seq_len, "
    "int head_dim) -> Tensor",
    rows=(12, 13),
    arguments={**_POOLED, "head_dim": "at least 1"},
    relations=(
        _RATIO,
        require(
            "head_dim",
            "w == head_dim or w == 2 * head_dim",
            "{head_dim}",
            "{w} or half of it, the rows of wkv",
        ),
        *_state("head_dim"),
    ),
    tolerance=Tolerance(
        reason="fp32 projections in any order are off by 1e-6 of their terms, and the softmax "
        "turns an absolute error of a score into a relative one of its weight; the one cast to "
        "bf16 may land on the other neighbour (2^-7)",
        ideal=(4e-6, 1e-5),
        official=(4e-6, 2**-7),
    ),
)
def compress_pool(
    x: torch.Tensor,
    wkv: torch.Tensor,
    wgate: torch.Tensor,
    ape: torch.Tensor,
    state_cache: torch.Tensor,
    state_block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    max_seq_len: int,
    head_dim: int,
) -> torch.Tensor:
    """`compress` without its norm and RoPE, which all entries of a step may then share.

    Arguments as there; head_dim: hd, the channels of an entry, c = wkv.shape[0] // head_dim of 1
    or 2. Returns the pooled entries [min(T, T // r + R), hd] in x's dtype, cast once: sequences in
    order, blocks in order, then rows that may hold anything: 0, or what memory held. Source:
    spec/v4.md 4.3 [OFF-M Compressor], aclnnCompressor.
    """
    state = state_cache, state_block_table, query_start_loc, seq_lens, max_seq_len, head_dim
    return pool_blocks(PoolCall(x, wkv, wgate, ape, *state))[0]
