"""Proof of the lightning indexer (spec/v4.md 4.5): cases, oracles, named faults."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from dsv4_backend import ragged_cases
from dsv4_backend.contract import Case, Draw
from dsv4_backend.ops.attention import visible_entries
from dsv4_backend.ops.indexer import (
    _DTYPES,
    IndexerCall,
    _combine,
    _dot,
    hide,
    indexer_scores,
    key_rows,
    pad_behind,
    topk_indices,
)
from dsv4_backend.proofs import indexer_oracle
from dsv4_backend.proofs.paging import EDITS_OF_HIDDEN_ROWS, TILES_DECIDE_NO_VALUE
from dsv4_backend.proofs.rounding_rows import powers, whole

indexer_scores.oracle(indexer_oracle.indexer_scores)
topk_indices.oracle(indexer_oracle.topk_indices)

BATCHES: dict[str, list[ragged_cases.Sequence]] = {
    "no sequences": [],
    "zero tokens": [(0, 0), (9, 0)],
    "nothing visible yet": [(0, 3)],
    "one sequence": [(0, 19)],
    "decode": [(before, 1) for before in (0, 2, 3, 4, 6, 7, 8, 30, 31, 32)],
    "mixed": [(0, 9), (5, 1), (3, 0), (6, 7), (7, 1), (0, 0), (33, 12)],
}
"""Of every operator that scores a paged cache of keys."""
_BATCHES = BATCHES | {"edges": [(0, s) for s in (1, 3, 4, 5, 7, 8, 9)]}


def random_call(
    draw: Draw,
    sequences: list[ragged_cases.Sequence],
    dtype: torch.dtype,
    ratio: int = 4,
    heads: int = 5,
    dim: int = 12,
    block_size: int = 3,
) -> IndexerCall:
    """A call over random caches and shuffled block tables."""
    tokens = ragged_cases.tokens_of(sequences)
    entries = max((before + new for before, new in sequences), default=0) // ratio
    table = ragged_cases.shuffled_table(draw, sequences, entries, block_size)
    return IndexerCall(
        draw.normal(tokens, heads, dim, dtype=dtype),
        draw.normal(ragged_cases.blocks_of(table), block_size, dim, dtype=dtype),
        draw.normal(tokens, heads, dtype=dtype, scale=(heads * dim) ** -0.5),
        table,
        *ragged_cases.offsets(sequences),
        ratio,
    )


def stale(call: IndexerCall) -> IndexerCall:
    """NaN in every cache row, nonsense in every table entry that belongs to no closed block."""
    entries = call.seq_lens // call.ratio
    cache = ragged_cases.only_rows(call.k_cache, call.block_table, entries * 0, entries)
    table = ragged_cases.only_blocks(call.block_table, entries * 0, entries, cache.shape[1])
    return call._replace(k_cache=cache, block_table=table)


def _special(call: IndexerCall) -> IndexerCall:
    """NaN, infinite and zero queries;
    a query opposite to all keys, whose scores are exact zeros.
    """
    q, cache = call.q.clone(), call.k_cache.abs()
    q[8, 0, 0], q[9, 1, 2], q[10] = float("nan"), float("inf"), 0.0
    q[11] = -q[11].abs()
    return call._replace(q=q, k_cache=cache)


def _strided(draw: Draw, call: IndexerCall) -> IndexerCall:
    wide = draw.normal(*call.k_cache.shape[:2], call.k_cache.shape[2] + 3, dtype=call.q.dtype)
    q = call.q.transpose(0, 1).contiguous().transpose(0, 1)
    return call._replace(q=q, k_cache=wide[..., 2:-1], weights=call.weights.T.contiguous().T)


@indexer_scores.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in _DTYPES.items():
        for name, sequences in _BATCHES.items():
            yield Case(name, profile, random_call(draw, sequences, dtype))
        yield Case(
            "ratio 3, one head",
            profile,
            random_call(draw, _BATCHES["mixed"], dtype, ratio=3, heads=1, dim=7),
        )
        yield Case(
            "large blocks", profile, random_call(draw, _BATCHES["mixed"], dtype, block_size=16)
        )
        yield Case("stale NaN", profile, stale(random_call(draw, _BATCHES["mixed"], dtype)))
        yield Case("NaN, infinity, zero", profile, _special(random_call(draw, [(0, 19)], dtype)))
        yield Case("strided", profile, _strided(draw, random_call(draw, _BATCHES["mixed"], dtype)))
        sequences = [(0, 6), (259, 4)]
        yield Case(
            "64 heads of 128",
            profile,
            random_call(draw, sequences, dtype, heads=64, dim=128, block_size=16),
        )
    call = random_call(draw, _BATCHES["mixed"], torch.bfloat16)
    q, cache = whole(draw, *call.q.shape), whole(draw, *call.k_cache.shape)
    weights = powers(draw, *call.weights.shape).bfloat16()
    call = call._replace(q=q, k_cache=cache, weights=weights)
    yield Case("whole numbers, each rounding", "official", call, decided=True)


indexer_scores.wrong_step(
    _combine,
    {
        "relu left out": lambda dot, w: (dot * w[:, :, None]).sum(1).to(w.dtype),
        "relu after the weight": lambda dot, w: (dot * w[:, :, None]).relu().sum(1).to(w.dtype),
        "negative weights cut": lambda dot, w: _combine(dot, w.relu()),
        "weights left out": lambda dot, w: _combine(
            dot, torch.full_like(w, (w.shape[1] * 128) ** -0.5)
        ),
        "last head left out": lambda dot, w: _combine(dot[:, :-1], w[:, :-1]),
        "mean over heads": lambda dot, w: _combine(dot, w) / w.shape[1],
    },
)
indexer_scores.wrong_steps(
    {
        "scaled twice": {_dot: lambda q, rows: _dot(q, rows) * q.shape[2] ** -0.5},
        "last channel left out": {_dot: lambda q, rows: _dot(q[..., :-1], rows[..., :-1])},
        "keys of the first sequence": {
            key_rows: lambda call, owner, entries: key_rows(call, owner * 0, entries)
        },
        "entry seen before its block closes": {
            visible_entries: lambda t, ratio: visible_entries(t + 1, ratio)
        },
        "newest entry one token late": {
            visible_entries: lambda t, ratio: visible_entries(t - 1, ratio)
        },
        "token's own entry too": {visible_entries: lambda t, ratio: t // ratio + 1},
        "hidden entries are 0": {hide: lambda scores, n: hide(scores, n).nan_to_num(neginf=0)},
    }
)
indexer_scores.wrong_arguments(
    {
        "block table not followed": {"block_table": lambda table: table.sort(1).values},
        "positions counted from the call": lambda a: a._replace(seq_lens=a.query_start_loc.diff()),
    }
)


@topk_indices.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in _DTYPES.items():
        for tokens, n, k in (
            (0, 5, 3),
            (4, 0, 3),
            (3, 1, 1),
            (6, 7, 7),
            (5, 6, 9),
            (33, 130, 16),
            (7, 1000, 64),
        ):
            visible = draw.integers(tokens, high=n + 1)
            yield Case(
                f"{tokens}x{n}, best {k}",
                profile,
                (draw.spread(tokens, n, dtype=dtype), visible, k),
            )
        few = draw.integers(9, 60, low=-1, high=2).to(dtype)
        yield Case("ties", profile, (few, draw.integers(9, high=61, dtype=torch.int64), 20))
        yield Case(
            "all equal", profile, (torch.zeros(3, 40, dtype=dtype), torch.tensor([40, 39, 0]), 8)
        )
        zeros = torch.tensor([0.0, -0.0]).repeat(2, 20).to(dtype)
        yield Case("-0 equals 0", profile, (zeros, torch.tensor([40, 7]), 12))
        edge = draw.normal(6, 12, dtype=dtype).sort(1).values  # the best one is always the last
        yield Case("best at the edge", profile, (edge, torch.tensor([0, 1, 4, 5, 11, 12]), 4))
        special = draw.normal(3, 9, dtype=dtype)
        special[0, 2], special[0, 4], special[1, :3], special[:, 6:] = (
            torch.inf,
            -torch.inf,
            -torch.inf,
            torch.nan,
        )
        yield Case("infinities, hidden NaN", profile, (special, torch.tensor([6, 5, 2]), 5))
        yield Case(
            "strided",
            profile,
            (draw.normal(12, 5, dtype=dtype).T, torch.tensor([12, 3, 9, 0, 7]), 4),
        )


topk_indices.no_output_fault("one NaN", "indices are integers")


@topk_indices.fault("ties: larger index first")
def _(scores: torch.Tensor, visible: torch.Tensor, k: int) -> torch.Tensor:
    order = hide(scores, visible).flip(1).sort(dim=1, descending=True, stable=True).indices
    return pad_behind(scores.shape[1] - 1 - order[:, :k], visible)


@topk_indices.fault("torch.topk, without a tie rule")
def _(scores: torch.Tensor, visible: torch.Tensor, k: int) -> torch.Tensor:
    return pad_behind(hide(scores, visible).topk(min(k, scores.shape[1])).indices, visible)


topk_indices.wrong_arguments(
    {
        "worst instead of best": {"scores": lambda scores: -scores},
        "by magnitude": {"scores": lambda scores: scores.abs()},
        "one entry too many visible": lambda a: a._replace(
            visible=(a.visible + 1).clamp(max=a.scores.shape[1])
        ),
        "newest entry missed": {"visible": lambda visible: (visible - 1).clamp(min=0)},
        "not padded with -1": lambda a: a._replace(
            scores=hide(a.scores, a.visible), visible=torch.full_like(a.visible, a.scores.shape[1])
        ),
        "scores compared in bf16": {"scores": lambda scores: scores.bfloat16()},
    }
)
topk_indices.wrong_steps({"hidden scores compete": {hide: lambda scores, visible: scores}})
topk_indices.wrong_results(
    {
        "in index order": lambda a, order: (
            order.where(order >= 0, a.scores.shape[1]).sort(1).values.int()
        ),
        "last of the k missed": lambda a, order: F.pad(order[:, :-1], (0, 1), value=-1),
    }
)


_HIDDEN = "rows that are no keys are -inf in the result, whatever they hold"
indexer_scores.explain(
    dict.fromkeys(
        ("spans: *", "by_tokens: *", "token_bytes: *", "scores_of: ENTRIES -> ENTRIES + 1"),
        TILES_DECIDE_NO_VALUE,
    ),
    dict.fromkeys(
        (
            *EDITS_OF_HIDDEN_ROWS,
            "slots: (index >= 0) & (block >= 0) -> (index >= 0) | (block >= 0)",
        ),
        _HIDDEN,
    ),
    dict.fromkeys(
        (
            "_combine: compute(weighted) -> weighted",
            "compute: x.dtype == torch.float64 -> x.dtype != torch.float64",
            "compute: x.float() -> x",
        ),
        "torch sums bf16 in fp32, and each of these tensors is rounded to bf16 next",
    ),
)
topk_indices.explain(
    dict.fromkeys(
        (
            "spans: *",
            "by_tokens: *",
            "topk_indices: 0 -> 1",
            "topk_indices: SORT_BYTES -> SORT_BYTES + 1",
            "topk_indices: SORT_BYTES * scores.shape[1] -> SORT_BYTES",
        ),
        TILES_DECIDE_NO_VALUE,
    ),
)
