"""Proof of the KV compressor: cases, oracle, named faults."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from dsv4_backend import ragged_cases
from dsv4_backend.contract import Case, Draw
from dsv4_backend.faults import Edits, Steps
from dsv4_backend.ops.compressor import (
    Call,
    channel_ranges,
    compress,
    compress_pool,
    finish_entries,
    pool_slots,
    pooled_positions,
    project_tokens,
    store_rows,
)
from dsv4_backend.ops.norm import rms_norm
from dsv4_backend.ops.rope import rope, rope_frequencies
from dsv4_backend.proofs.compressor_oracle import pooled, rotated
from dsv4_backend.proofs.numerics import (
    BF16,
    Array,
    cast,
    far_from_bf16_ties,
    rms_normed,
    round_to,
    wide,
)


@compress.oracle
def _(
    x: Array,
    wkv: Array,
    wgate: Array,
    ape: Array,
    norm_weight: Array,
    inv_freq: Array,
    state_cache: Array,
    state_block_table: Array,
    query_start_loc: Array,
    seq_lens: Array,
    max_seq_len: int,
    eps: float,
) -> Array:
    hd = norm_weight.shape[0]
    state = state_cache, state_block_table, query_start_loc, seq_lens
    entries, blocks = pooled(x, wkv, wgate, ape, *state, hd)
    for out, block in enumerate(blocks):
        scaled = rms_normed(entries[out], norm_weight, eps)
        turned = rotated(round_to(x.dtype, scaled), block * ape.shape[0], inv_freq)
        entries[out] = cast(x.dtype, turned)
    return entries


@compress_pool.oracle
def _(
    x: Array,
    wkv: Array,
    wgate: Array,
    ape: Array,
    state_cache: Array,
    state_block_table: Array,
    query_start_loc: Array,
    seq_lens: Array,
    max_seq_len: int,
    head_dim: int,
) -> Array:
    state = state_cache, state_block_table, query_start_loc, seq_lens
    return pooled(x, wkv, wgate, ape, *state, head_dim)[0]


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
_REAL = {
    "CSA": _Geometry(ratio=4, groups=2, hd=512, d=1024, frequencies=32, block_size=8),
    "index keys": _Geometry(ratio=4, groups=2, hd=128, d=1024, frequencies=32, block_size=8),
    "HCA": _Geometry(ratio=128, groups=1, hd=512, d=1024, frequencies=32, block_size=32),
}
_EDGES = [(0, s) for s in (1, 3, 4, 5, 7, 8, 9, 15, 16, 17)]
_DECODE = [(before, 1) for before in (0, 2, 3, 4, 6, 7, 8, 14, 15, 23)]
_MIXED = [(0, 9), (5, 1), (3, 0), (6, 7), (7, 1), (0, 0), (13, 12)]


def _call(
    draw: Draw,
    g: _Geometry,
    sequences: list[ragged_cases.Sequence],
    dtype: torch.dtype,
    ring: int = 0,
) -> Call:
    """A call with random state everywhere;
    `ring` rows per sequence, or as many as the longest sequence has tokens.
    """
    width, tokens = g.groups * g.hd, ragged_cases.tokens_of(sequences)
    rows = ring or max((before + new for before, new in sequences), default=0)
    table = ragged_cases.shuffled_table(draw, sequences, rows, g.block_size) + 1
    starts, lengths = ragged_cases.offsets(sequences)
    return Call(
        draw.normal(tokens, g.d, dtype=dtype),
        draw.normal(width, g.d, dtype=dtype, scale=g.d**-0.5),
        draw.normal(width, g.d, dtype=dtype, scale=g.d**-0.5),
        draw.normal(g.ratio, width),
        draw.uniform(g.hd, low=0.5, high=1.5, dtype=dtype),
        rope_frequencies(2 * g.frequencies, 10000.0),
        draw.normal(1 + ragged_cases.blocks_of(table), g.block_size, 2 * width),
        table,
        starts,
        lengths,
        max([0, *lengths.tolist()]),
        1e-6,
    )


def _needles(draw: Draw, call: Call) -> Call:
    """Every channel aims at one slot of its entry: that slot's ape is far above the others."""
    hd = call.norm_weight.shape[0]
    slot = draw.integers(hd, high=call.pool.groups * call.pool.ratio, dtype=torch.int64)
    ape = torch.zeros_like(call.ape)
    ape[slot % call.pool.ratio, slot // call.pool.ratio * hd + torch.arange(hd)] = 40.0
    return call._replace(ape=ape)


def _stale(draw: Draw, call: Call) -> Call:
    """NaN in the whole state, nonsense in the unused table entries (all sequences start at 0)."""
    first, block_size = torch.zeros_like(call.seq_lens), call.state_cache.shape[1]
    table = ragged_cases.only_blocks(call.state_block_table, first, call.seq_lens, block_size)
    return call._replace(
        state_cache=torch.full_like(call.state_cache, float("nan")), state_block_table=table
    )


def _special(draw: Draw, call: Call) -> Call:
    x = call.x.clone()
    x[2, 0], x[11, 1], x[16:] = float("nan"), float("inf"), 0.0
    return call._replace(x=x)


def _strided(draw: Draw, call: Call) -> Call:
    x = draw.normal(call.x.shape[0], 2 * call.x.shape[1], dtype=call.x.dtype)[:, ::2]
    cache = draw.normal(*call.state_cache.shape[:2], call.state_cache.shape[2] + 3)[..., 2:-1]
    return call._replace(x=x, state_cache=cache, wkv=call.wkv.T.contiguous().T)


def _decided(draw: Draw, g: _Geometry) -> Call:
    """Equal tokens whose entries hold one product each: only norm and rotation round, at values
    that no order of fp32 sums moves, and otherwise if norms were not rounded before the rotation.
    """
    while True:
        call = _call(draw, g, [(0, 5 * g.ratio)], torch.bfloat16)
        x, wkv = torch.zeros_like(call.x), call.wkv.clone()
        x[:, 0] = 1
        wkv[: g.hd] = wkv[-g.hd :]  # what the first block leaves out has the same values
        entry, weight = (wide(t.float().numpy()) for t in (wkv[-g.hd :, 0], call.norm_weight))
        length = rms_normed(entry, weight, call.eps)
        once, twice = (
            np.stack([rotated(row, g.ratio * i, call.inv_freq.numpy()) for i in range(5)])
            for row in (length, round_to(BF16, length))
        )
        tells = (cast(BF16, twice) != cast(BF16, once)).any()
        if tells and far_from_bf16_ties(length) and far_from_bf16_ties(twice):
            return call._replace(x=x, wkv=wkv)


@compress.cases
def _compressions(draw: Draw) -> Iterator[Case]:
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
                (
                    "ring",
                    [(61, 5), (64, 1), (55, 1), (71, 5)],
                    5 + g.groups * g.ratio - 1 + g.block_size,
                ),
                ("far", [(100_000 * g.ratio - 3, 5)], 5 + g.groups * g.ratio - 1 + g.block_size),
            ):
                yield Case(f"{kind}, {name}", profile, _call(draw, g, sequences, dtype, ring))
            yield Case(
                f"{kind}, needles", profile, _needles(draw, _call(draw, g, _EDGES + _MIXED, dtype))
            )
            yield Case(f"{kind}, stale NaN", profile, _stale(draw, _call(draw, g, _EDGES, dtype)))
            yield Case(
                f"{kind}, NaN, infinity, zero",
                profile,
                _special(draw, _call(draw, g, [(0, 26)], dtype)),
            )
            yield Case(f"{kind}, strided", profile, _strided(draw, _call(draw, g, _MIXED, dtype)))
            call = _call(draw, g, _MIXED, dtype)
            yield Case(f"{kind}, wide scores", profile, call._replace(ape=call.ape * 150))
            low = call._replace(ape=torch.full_like(call.ape, -1e30), wgate=0 * call.wgate)
            yield Case(f"{kind}, scores far below zero", profile, low)
            call = call._replace(wkv=call.wkv * 1e-3, state_cache=call.state_cache * 1e-3)
            yield Case(f"{kind}, epsilon matters", profile, call)
        indexer = _Geometry(ratio=4, groups=2, hd=128, d=256, frequencies=32, block_size=16)
        yield Case("CSA indexer", profile, _call(draw, indexer, [(0, 21), (130, 1)], dtype))
        main = _Geometry(ratio=128, groups=1, hd=512, d=64, frequencies=32, block_size=64)
        yield Case("HCA", profile, _call(draw, main, [(127, 1), (200, 60)], dtype))
    for kind, g in (("overlap", _CSA), ("plain", _HCA)):
        call = _call(draw, g, _MIXED, torch.bfloat16)
        yield Case(f"{kind}, wide gates", "official", call._replace(wgate=call.wgate * 64))
        call = _call(draw, g, _MIXED, torch.float16)
        yield Case(
            f"{kind}, fp16, squares beyond its range", "official", call._replace(wkv=call.wkv * 400)
        )
    for kind, g in _REAL.items():
        sequences = [(0, g.ratio + 3), (g.ratio - 1, 1), (2 * g.ratio + 1, 1)]
        call = _call(draw, g, sequences, torch.bfloat16)
        yield Case(f"{kind}, as on a chip", "official", call)
    for kind, g in (("overlap", _CSA), ("plain", _HCA)):
        yield Case(f"{kind}, each rounding", "official", _decided(draw, g), decided=True)


@compress_pool.measured
def _(*values: Any) -> tuple[Array, Array]:
    """The rows that are entries, as nobody may read those behind them, and the state."""
    *arguments, result, state = values
    ape, starts, ends = arguments[3], arguments[6].astype(np.int64), arguments[7].astype(np.int64)
    ratio = ape.shape[0]
    entries = int((ends // ratio - (ends - np.diff(starts)) // ratio).sum())
    return result[:entries], state


@compress_pool.cases
def _(draw: Draw) -> Iterator[Case]:
    for case in _compressions(draw):
        if "epsilon" not in case.name:
            yield Case(case.name, case.profile, tuple(Call(*case.arguments).pool))


def _rotate(call: Call, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return rope.reference(x, positions.clamp(min=0), call.inv_freq, False)


def _norm(call: Call, pooled: torch.Tensor) -> torch.Tensor:
    return rms_norm.reference(pooled, call.norm_weight, call.eps)


def _pool_before_start(u: torch.Tensor, s: torch.Tensor, absent: torch.Tensor) -> torch.Tensor:
    there = ~absent[..., None]
    return pool_slots(u * there, s * there, torch.zeros_like(absent))


def _pool_without_maximum(u: torch.Tensor, s: torch.Tensor, absent: torch.Tensor) -> torch.Tensor:
    weights = s.exp().masked_fill(absent[..., None], 0)
    return (weights * u.masked_fill(absent[..., None], 0)).sum(1) / weights.sum(1).clamp(min=1e-30)


def _own_block(block: torch.Tensor, ratio: int, groups: int) -> torch.Tensor:
    index = pooled_positions(block, ratio, groups)
    return torch.where(index < block[:, None] * ratio, -1, index)


def _swap_ranges(rows: torch.Tensor, groups: int, ratio: int) -> torch.Tensor:
    return channel_ranges(rows.unflatten(-1, (2, groups, -1)).flip(3).flatten(2), groups, ratio)


compress.wrong_step(
    finish_entries,
    {
        "norm left out": lambda call, y, block: _rotate(call, y, block * call.pool.ratio),
        "epsilon left out": lambda call, y, block: finish_entries(
            call._replace(eps=1e-30), y, block
        ),
        "RoPE left out": lambda call, y, block: _norm(call, y),
        "RoPE before the norm": lambda call, y, i: _norm(
            call, _rotate(call, y, i * call.pool.ratio)
        ),
        "RoPE at the last token": lambda call, y, i: _rotate(
            call, _norm(call, y), (i + 1) * call.pool.ratio - 1
        ),
        "RoPE at the overlapped block": lambda call, y, i: finish_entries(
            call, y, i + 1 - call.pool.groups
        ),
        "RoPE at the entry's index": lambda call, y, block: _rotate(call, _norm(call, y), block),
    },
)
_WRONG_POOLS: dict[str, Steps] = {
    "slots before the start have weight": {pool_slots: _pool_before_start},
    "softmax without maximum": {pool_slots: _pool_without_maximum},
    "one weight for all channels": {
        pool_slots: lambda u, s, gone: pool_slots(u, s.mean(2, True).expand_as(s), gone)
    },
    "mean pooling": {pool_slots: lambda u, s, gone: pool_slots(u, s * 0, gone)},
    "ape of the next token": {project_tokens: lambda call, t: project_tokens(call, t + 1)},
    "projections rounded to bf16": {
        project_tokens: lambda call, t: project_tokens(call, t).bfloat16()
    },
    "last token not stored": {
        store_rows: lambda cache, at, rows: store_rows(cache, at[:-1], rows[:-1])
    },
    "state kept in bf16": {
        store_rows: lambda cache, at, rows: store_rows(cache, at, rows.bfloat16())
    },
    "look-back one token early": {
        pooled_positions: lambda block, r, c: pooled_positions(block, r, c) - 1
    },
    "previous block left out": {pooled_positions: _own_block},
    "channel ranges swapped": {channel_ranges: _swap_ranges},
    "one channel range for both blocks": {
        channel_ranges: lambda rows, c, r: rows.unflatten(-1, (2, c, -1))[..., -1, :]
    },
}
_WRONG_CALLS: dict[str, Edits] = {
    "ape left out": {"ape": torch.zeros_like},
    "positions counted from the call": lambda a: a._replace(seq_lens=a.query_start_loc.diff()),
}
for _op in (compress, compress_pool):
    _op.wrong_steps(_WRONG_POOLS)
    _op.wrong_arguments(_WRONG_CALLS)


@compress.fault("state of earlier calls lost")
def _(*arguments: Any) -> torch.Tensor:
    compress.reference(*arguments)
    return compress.reference(
        *Call(*arguments)._replace(state_cache=torch.zeros_like(arguments[6]))
    )


_POOL_EQUIVALENTS = {
    **dict.fromkeys(
        (
            "pool_blocks: 0 -> 1 (2)",
            "pool_blocks: read < 0 -> read <= 0",
            "gather_rows: 0 -> 1",
            "slots: 0 -> 1 (3)",
            "slots: block >= 0 -> block > 0",
        ),
        "block 0, and so row 0, belongs to nobody",
    ),
    "other max_seq_len": "a bound of the lengths decides no value",
    "closed_blocks: 1 -> 2 (2)": "any negative block is a padding row",
    "slots: 1 -> 2 (2)": "any negative row is an absent one",
    "slots: index.clamp(min=0) -> index": "rows of negative indices are masked whatever they are",
    "gather_rows: flat.clamp(min=0) -> flat": (
        "rows of absent slots are masked whatever they hold"
    ),
    "store_rows: rows.to(cache.dtype) -> rows": "rows are fp32, and so is the state",
}
compress_pool.explain(
    _POOL_EQUIVALENTS, {"pool_slots: 0 -> 1": "only rows behind the entries have no slot at all"}
)
compress.explain(
    _POOL_EQUIVALENTS,
    {
        "finish_entries: (block * call.pool.ratio).clamp(min=0) -> block * call.pool.ratio": (
            "padding rows are 0 at any angle"
        ),
        "rms_norm: weight.to(wide.dtype) -> weight": (
            "a product with an fp32 factor is fp32 without the cast too"
        ),
        "rope: -angles -> angles": "entries are never rotated back",
        "rotation_angles: positions.float() -> positions": (
            "an integer times fp32 is fp32, rounded alike"
        ),
        "rotation_angles: inv_freq.float() -> inv_freq": "frequencies are fp32",
        "rotate_tail: angles.to(wide.dtype) -> angles": "angles are fp32",
        "rotate_tail: 1 -> 2 (3)": "entries have no dimension between the first and the last",
        "rotate_tail: 1 -> 2 (4)": "entries have no dimension between the first and the last",
        "rotate_tail: 1 -> 2 (5)": "entries have no dimension between the first and the last",
    },
)
