"""The KV compressor with its paged, position-addressed state (spec/v4.md 4.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from dsv4_backend import ragged, ragged_cases
from dsv4_backend.contract import Case, Draw, Tolerance, compute, operator
from dsv4_backend.mutants import add_output_faults
from dsv4_backend.ops.norm import rms_norm
from dsv4_backend.ops.rope import rope, rope_frequencies

Step = Callable[..., torch.Tensor]


class _Call(NamedTuple):
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
        return positions, ragged.slots(self.state_block_table, sequence, positions, self.state_cache.shape[1])


def _project(call: _Call, positions: torch.Tensor) -> torch.Tensor:
    """State row of every token, `[u | s]` with ape inside s: [T, 2 * c * hd] in the accumulation dtype."""
    wide = compute(call.x)
    u = wide @ call.wkv.to(wide.dtype).T
    s = wide @ call.wgate.to(wide.dtype).T + call.ape[positions % call.ratio]
    return torch.cat((u, s), -1)


def _store(cache: torch.Tensor, flat: torch.Tensor, rows: torch.Tensor) -> None:
    block_size = cache.shape[1]
    cache.index_put_((flat // block_size, flat % block_size), rows.to(cache.dtype))


def _lookback(block: torch.Tensor, ratio: int, groups: int) -> torch.Tensor:
    """Positions of the tokens that block [M] pools; negative before the sequence starts: [M, c * r]."""
    return (block[:, None] + 1) * ratio + torch.arange(-groups * ratio, 0, device=block.device)


def _halves(rows: torch.Tensor, groups: int, ratio: int) -> torch.Tensor:
    """[M, c * r, 2 * c * hd] -> [M, c * r, 2, hd]: block g of the c blocks uses channel range g of u and of s."""
    rows = rows.unflatten(1, (groups, ratio)).unflatten(-1, (2, groups, -1))  # [M, c, r, 2, c, hd]
    return torch.stack([rows[:, g, :, :, g] for g in range(groups)], 1).flatten(1, 2)


def _pool(u: torch.Tensor, s: torch.Tensor, absent: torch.Tensor) -> torch.Tensor:
    """Softmax over slots, separately per channel, of [M, slots, hd]; absent slots weigh 0, all absent gives 0."""
    lowest = torch.finfo(s.dtype).min  # not -inf: padding rows have no slot at all and must not become NaN
    weights = s.masked_fill(absent[..., None], lowest).softmax(1)
    return (weights * u.masked_fill(absent[..., None], 0)).sum(1)


def _finish(call: _Call, pooled: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """RMSNorm, then RoPE at the block's first position."""
    normed = rms_norm.reference(pooled, call.norm_weight, call.eps)
    return rope.reference(normed, (block * call.ratio).clamp(min=0), call.inv_freq, False)


def _compress(
    call: _Call,
    project: Step = _project,
    store: Callable[..., None] = _store,
    lookback: Step = _lookback,
    halves: Step = _halves,
    pool: Step = _pool,
    finish: Step = _finish,
) -> torch.Tensor:
    """`compress` with steps that faults replace."""
    ratio, groups, cache, table = call.ratio, call.groups, call.state_cache, call.state_block_table
    positions, written = call.rows_of_tokens()
    owner, block = ragged.closed_blocks(call.query_start_loc, call.seq_lens, call.x.shape[0], ratio)
    read = ragged.slots(table, owner[:, None], lookback(block, ratio, groups), cache.shape[1])
    store(cache, written, project(call, positions))
    u, s = halves(ragged.gather_rows(cache, read), groups, ratio).unbind(2)
    return finish(call, pool(u, s, read < 0).to(call.x.dtype), block)


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
        reason="fp32 projections in any order are off by 1e-6 of their terms, and the softmax turns an absolute error "
        "of a score into a relative one of its weight; bf16 rounds before the norm, after it and after RoPE "
        "(2^-8 each, of the rotated pair)",
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
    eps: float,
) -> torch.Tensor:
    """Keep every token's (u, s) and pool each block of r tokens that closes in this call into one entry.

    x: [T, d], the normed hidden state; wkv, wgate: [c*hd, d]; ape: fp32 [r, c*hd]; norm_weight: [hd]; inv_freq: fp32
    [F], 2F <= hd. r = ape.shape[0]; c = 2 (overlap: the previous block's tokens count too, with channels 0..hd-1, the
    block's own with hd..2hd-1) or 1. Everything is fp32 until the pooled entry is cast to x's dtype; RMSNorm (eps > 0)
    and RoPE at the block's first position i*r follow in that dtype.
    state_cache: fp32 [num_blocks, block_size, 2*c*hd], changed in place: row [u | s + ape] of every token at its
    position (ragged.py; a table with fewer columns is a ring). The ring must hold this call's tokens and the up to
    c*r - 1 before them that the next entry still reads. All T rows are written before any is read, so prefill, chunks,
    decode and overwriting a rejected draft are one path.
    Returns [min(T, T // r + R), hd] in x's dtype: sequences in order, blocks in order (`ragged.closed_blocks`), then
    rows of 0. ArgumentError (nothing written) for offsets, lengths, rings or blocks that do not fit, or a row
    written twice. Source: spec/v4.md 4.3 [OFF-M Compressor].
    """
    arguments = (x, wkv, wgate, ape, norm_weight, inv_freq, state_cache, state_block_table, query_start_loc, seq_lens)
    return _compress(_Call(*arguments, eps))


@compress.shapes
def _(*arguments: Any) -> None:
    call = _Call(*arguments)
    width, hd = call.ape.shape[1], call.norm_weight.shape[0]
    if call.ratio < 1:
        raise compress.reject("ape", f"shape {tuple(call.ape.shape)}", "a ratio of at least 1")
    if hd < 1 or width not in (hd, 2 * hd):
        raise compress.reject("norm_weight", f"{hd} channels", f"{width} or half of it, the rows of wkv")
    if not 2 <= 2 * call.inv_freq.shape[0] <= hd:
        raise compress.reject("inv_freq", f"{call.inv_freq.shape[0]} frequencies", f"1 to {hd // 2}, half of the entry")
    if not call.eps > 0:
        raise compress.reject("eps", call.eps, "a number > 0")
    ragged.check_layout("compress", "state_cache", call.state_cache, call.state_block_table, call.query_start_loc)


@compress.contents
def _(*arguments: Any) -> None:
    call = _Call(*arguments)
    ragged.check_batch("compress", call.query_start_loc, call.seq_lens, call.x.shape[0])
    new = call.query_start_loc.diff()
    first = (((call.seq_lens.long() - new) // call.ratio - call.groups + 1) * call.ratio).clamp(min=0)
    after = torch.where(new > 0, call.seq_lens, 0)
    num_blocks, block_size = call.state_cache.shape[:2]
    ragged.check_table("compress", "state_block_table", call.state_block_table, first, after, block_size, num_blocks)
    ragged.check_distinct("compress", "state_block_table", call.rows_of_tokens()[1])


class _Geometry(NamedTuple):
    """Sizes of a case."""

    ratio: int
    groups: int
    hd: int
    d: int
    frequencies: int
    block_size: int


_CSA = _Geometry(ratio=4, groups=2, hd=10, d=6, frequencies=3, block_size=3)
_HCA = _Geometry(ratio=8, groups=1, hd=8, d=5, frequencies=4, block_size=5)
_EDGES = [(0, s) for s in (1, 3, 4, 5, 7, 8, 9, 15, 16, 17)]
_DECODE = [(before, 1) for before in (0, 2, 3, 4, 6, 7, 8, 14, 15, 23)]
_MIXED = [(0, 9), (5, 1), (3, 0), (6, 7), (7, 1), (0, 0), (13, 12)]


def _call(draw: Draw, g: _Geometry, sequences: list[ragged_cases.Sequence], dtype: torch.dtype, ring: int = 0) -> _Call:
    """A call with random state everywhere; `ring` rows per sequence, or as many as the longest sequence has tokens."""
    width, tokens = g.groups * g.hd, ragged_cases.tokens_of(sequences)
    rows = ring or max((before + new for before, new in sequences), default=0)
    table = ragged_cases.shuffled_table(draw, sequences, rows, g.block_size)
    return _Call(
        draw.normal(tokens, g.d, dtype=dtype),
        draw.normal(width, g.d, dtype=dtype, scale=g.d**-0.5),
        draw.normal(width, g.d, dtype=dtype, scale=g.d**-0.5),
        draw.normal(g.ratio, width),
        draw.uniform(g.hd, low=0.5, high=1.5, dtype=dtype),
        rope_frequencies(2 * g.frequencies, 10000.0),
        draw.normal(ragged_cases.blocks_of(table), g.block_size, 2 * width),
        table,
        *ragged_cases.offsets(sequences),
        1e-6,
    )


def _needles(draw: Draw, call: _Call) -> _Call:
    """Every channel aims at one slot of its entry: that slot's ape is far above the others."""
    hd = call.norm_weight.shape[0]
    slot = draw.integers(hd, high=call.groups * call.ratio, dtype=torch.int64)
    ape = torch.zeros_like(call.ape)
    ape[slot % call.ratio, slot // call.ratio * hd + torch.arange(hd)] = 40.0
    return call._replace(ape=ape)


def _stale(draw: Draw, call: _Call) -> _Call:
    """NaN in the whole state, nonsense in the unused table entries (all sequences start at 0)."""
    first, block_size = torch.zeros_like(call.seq_lens), call.state_cache.shape[1]
    table = ragged_cases.only_blocks(call.state_block_table, first, call.seq_lens, block_size)
    return call._replace(state_cache=torch.full_like(call.state_cache, float("nan")), state_block_table=table)


def _special(draw: Draw, call: _Call) -> _Call:
    x = call.x.clone()
    x[2, 0], x[11, 1], x[16:] = float("nan"), float("inf"), 0.0
    return call._replace(x=x)


def _strided(draw: Draw, call: _Call) -> _Call:
    x = draw.normal(call.x.shape[0], 2 * call.x.shape[1], dtype=call.x.dtype)[:, ::2]
    cache = draw.normal(*call.state_cache.shape[:2], call.state_cache.shape[2] + 3)[..., 2:-1]
    return call._replace(x=x, state_cache=cache, wkv=call.wkv.T.contiguous().T)


@compress.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in (("ideal", torch.float32), ("official", torch.bfloat16)):
        for kind, g in (("overlap", _CSA), ("plain", _HCA)):
            for name, sequences, ring in (
                ("no sequences", [], 0),
                ("zero tokens", [(0, 0), (5, 0)], 0),
                ("one token", [(0, 1)], 0),
                ("first block", [(0, g.ratio)], 0),
                ("edges", _EDGES, 0),
                ("decode", _DECODE, 0),
                ("decode that closes", [(2 * g.ratio - 1, 1)], 0),
                ("mixed", _MIXED, 0),
                ("ring", [(61, 5), (64, 1), (55, 1), (71, 5)], 5 + g.groups * g.ratio - 1 + g.block_size),
                ("far", [(100_000 * g.ratio - 3, 5)], 5 + g.groups * g.ratio - 1 + g.block_size),
            ):
                yield Case(f"{kind}, {name}", profile, _call(draw, g, sequences, dtype, ring))
            yield Case(f"{kind}, needles", profile, _needles(draw, _call(draw, g, _EDGES + _MIXED, dtype)))
            yield Case(f"{kind}, stale NaN", profile, _stale(draw, _call(draw, g, _EDGES, dtype)))
            yield Case(f"{kind}, NaN, infinity, zero", profile, _special(draw, _call(draw, g, [(0, 26)], dtype)))
            yield Case(f"{kind}, strided", profile, _strided(draw, _call(draw, g, _MIXED, dtype)))
            call = _call(draw, g, _MIXED, dtype)
            yield Case(f"{kind}, wide scores", profile, call._replace(ape=call.ape * 150))
            call = call._replace(wkv=call.wkv * 1e-3, state_cache=call.state_cache * 1e-3)
            yield Case(f"{kind}, epsilon matters", profile, call)
        indexer = _Geometry(ratio=4, groups=2, hd=128, d=256, frequencies=32, block_size=16)
        yield Case("CSA indexer", profile, _call(draw, indexer, [(0, 21), (130, 1)], dtype))
        main = _Geometry(ratio=128, groups=1, hd=512, d=64, frequencies=32, block_size=64)
        yield Case("HCA", profile, _call(draw, main, [(127, 1), (200, 60)], dtype))


add_output_faults(compress, "last token zero", "stale tail of channels", "one NaN", "tokens shifted by one")


def _fault(name: str, **steps: Any) -> None:
    compress.fault(name)(lambda *arguments: _compress(_Call(*arguments), **steps))


def _rotate(call: _Call, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return rope.reference(x, positions.clamp(min=0), call.inv_freq, False)


def _norm(call: _Call, pooled: torch.Tensor) -> torch.Tensor:
    return rms_norm.reference(pooled, call.norm_weight, call.eps)


def _rotate_at_last(call: _Call, pooled: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    return _rotate(call, _norm(call, pooled), (block + 1) * call.ratio - 1)


def _pool_before_start(u: torch.Tensor, s: torch.Tensor, absent: torch.Tensor) -> torch.Tensor:
    there = ~absent[..., None]
    return _pool(u * there, s * there, torch.zeros_like(absent))


def _pool_without_maximum(u: torch.Tensor, s: torch.Tensor, absent: torch.Tensor) -> torch.Tensor:
    weights = s.exp().masked_fill(absent[..., None], 0)
    return (weights * u.masked_fill(absent[..., None], 0)).sum(1) / weights.sum(1).clamp(min=1e-30)


def _own_block(block: torch.Tensor, ratio: int, groups: int) -> torch.Tensor:
    index = _lookback(block, ratio, groups)
    return torch.where(index < block[:, None] * ratio, -1, index)


def _swap_ranges(rows: torch.Tensor, groups: int, ratio: int) -> torch.Tensor:
    return _halves(rows.unflatten(-1, (2, groups, -1)).flip(3).flatten(2), groups, ratio)


_fault("ape left out", project=lambda call, t: _project(call._replace(ape=call.ape * 0), t))
_fault("ape of the next token", project=lambda call, t: _project(call, t + 1))
_fault("projections rounded to bf16", project=lambda call, t: _project(call, t).bfloat16())
_fault("last token not stored", store=lambda cache, flat, rows: _store(cache, flat[:-1], rows[:-1]))
_fault("state kept in bf16", store=lambda cache, flat, rows: _store(cache, flat, rows.bfloat16()))
_fault("look-back one token early", lookback=lambda block, r, c: _lookback(block, r, c) - 1)
_fault("previous block left out", lookback=_own_block)
_fault("channel ranges swapped", halves=_swap_ranges)
_fault("one channel range for both blocks", halves=lambda rows, c, r: rows.unflatten(-1, (2, c, -1))[..., -1, :])
_fault("slots before the start have weight", pool=_pool_before_start)
_fault("softmax without maximum", pool=_pool_without_maximum)
_fault("one weight for all channels", pool=lambda u, s, gone: _pool(u, s.mean(2, True).expand_as(s), gone))
_fault("mean pooling", pool=lambda u, s, gone: _pool(u, s * 0, gone))
_fault("norm left out", finish=lambda call, y, block: _rotate(call, y, block * call.ratio))
_fault("epsilon left out", finish=lambda call, y, block: _finish(call._replace(eps=1e-30), y, block))
_fault("RoPE left out", finish=lambda call, y, block: _norm(call, y))
_fault("RoPE before the norm", finish=lambda call, y, block: _norm(call, _rotate(call, y, block * call.ratio)))
_fault(
    "RoPE at the last token", finish=lambda call, y, block: _rotate(call, _norm(call, y), (block + 1) * call.ratio - 1)
)
_fault("RoPE at the overlapped block", finish=lambda call, y, block: _finish(call, y, block + 1 - call.groups))
_fault("RoPE at the entry's index", finish=lambda call, y, block: _rotate(call, _norm(call, y), block))


@compress.fault("state of earlier calls lost")
def _(*arguments: Any) -> torch.Tensor:
    call = _Call(*arguments)
    _compress(call)
    return _compress(call._replace(state_cache=torch.zeros_like(call.state_cache)))


@compress.fault("positions counted from the call")
def _(*arguments: Any) -> torch.Tensor:
    call = _Call(*arguments)
    return _compress(call._replace(seq_lens=call.query_start_loc.diff()))
