"""Lightning indexer scores and top-k selection (spec/v4.md 4.5)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from dsv4_backend import ragged, ragged_cases
from dsv4_backend.contract import Case, Draw, Tolerance, compute, operator
from dsv4_backend.mutants import add_output_faults
from dsv4_backend.tiles import by_tokens, spans

_DTYPES = {"ideal": torch.float32, "official": torch.bfloat16}
_ENTRIES = 1 << 14  # scored at a time
_SORT_BYTES = 32  # of one score: its copies, its index
Step = Callable[..., torch.Tensor]


class _Call(NamedTuple):
    """The arguments of `indexer_scores`."""

    q: torch.Tensor
    k_cache: torch.Tensor
    weights: torch.Tensor
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    ratio: int


def _rows(call: _Call, sequence: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    """Compressed entries [n] of every token's sequence [T], 0 behind the last: [T, n, DI]."""
    lengths = ragged.entries_to_read(call.query_start_loc, call.seq_lens, call.ratio)
    owners = sequence[:1] if len(call.seq_lens) == 1 else sequence  # one sequence: no copy of the rows per token
    rows = ragged.entry_rows(call.k_cache, call.block_table, owners, entries, lengths)
    return compute(rows).expand(len(sequence), -1, -1)


def _dot(q: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Q [T, HI, DI] with each token's rows [T, n, DI]: [T, HI, n] in the accumulation dtype."""
    return torch.bmm(compute(q), rows.transpose(1, 2))


def _combine(dot: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum over heads of relu(dot) * weight, every tensor in the weights' dtype: [T, n]."""
    weighted = dot.to(weights.dtype).relu() * weights[:, :, None]
    return compute(weighted).sum(1).to(weights.dtype)


def _visible(positions: torch.Tensor, ratio: int) -> torch.Tensor:
    return (positions + 1) // ratio


def _hide(scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    entry = torch.arange(scores.shape[1], device=scores.device)
    return scores.masked_fill(entry >= visible[:, None], -torch.inf)


def _token_bytes(call: _Call, entries: int) -> int:
    """Temporaries of one token in `_indexer_scores`, of which `_ENTRIES` bounds the large ones."""
    wide = 8 if call.q.dtype == torch.float64 else 4
    key = 0 if len(call.seq_lens) == 1 else 3 * wide * call.q.shape[2]
    return min(entries, _ENTRIES) * (4 * wide * call.q.shape[1] + key) + 2 * wide * entries


def _indexer_scores(
    call: _Call,
    rows: Step = _rows,
    dot: Step = _dot,
    combine: Step = _combine,
    visible: Step = _visible,
    hide: Step = _hide,
) -> torch.Tensor:
    """`indexer_scores` with steps that faults replace."""
    tokens, entries = call.q.shape[0], call.block_table.shape[1] * call.k_cache.shape[1]
    sequence = ragged.token_sequences(call.query_start_loc, tokens)
    positions = ragged.token_positions(call.query_start_loc, call.seq_lens, tokens)
    index = torch.arange(entries, device=call.q.device)

    def score(part: slice) -> torch.Tensor:
        q, weights, owners = call.q[part], call.weights[part], sequence[part]
        pieces = [combine(dot(q, rows(call, owners, index[span])), weights) for span in spans(entries, _ENTRIES)]
        return hide(torch.cat(pieces, 1), visible(positions[part], call.ratio))

    return by_tokens(score, tokens, _token_bytes(call, entries))


@operator(
    "indexer_scores(Tensor q, Tensor k_cache, Tensor weights, Tensor block_table, Tensor query_start_loc, "
    "Tensor seq_lens, int ratio) -> Tensor",
    rows=(14,),
    arguments={
        "q": "float [T, HI, DI]",
        "k_cache": "float [num_blocks, block_size, DI]",
        "weights": "float [T, HI]",
        "block_table": "i32 [R, columns]",
        "query_start_loc": "i32 [S]",
        "seq_lens": "i32 [R]",
    },
    tolerance=Tolerance(
        reason="fp32 dot products of 128 terms and sums of 64 weighted heads in any order, at weights of (DI*HI)^-0.5; "
        "bf16: a dot product next to a midpoint may round to the other neighbour, and so may the sum",
        ideal=(2e-6, 4e-6),
        official=(2**-9, 2**-7),
    ),
)
def indexer_scores(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    weights: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    ratio: int,
) -> torch.Tensor:
    """`I[t, i] = sum_h relu(q[t, h] . k[i]) * weights[t, h]` for every compressed entry i of the token's sequence.

    q: [T, HI, DI]; weights: [T, HI], already scaled by DI^-0.5 * HI^-0.5, any sign; k_cache: paged
    [num_blocks, block_size, DI] with this call's entries already in it; all of one float dtype.
    Returns [T, columns * block_size] in that dtype: dot product, relu * weight and the sum are tensors of that dtype
    (bf16 in the official profile), sums inside are fp32. Entries i >= (position + 1) // ratio, which the token must
    not see, are -inf whatever the cache holds there. T = 0 gives an empty result. ArgumentError for dtypes, offsets,
    lengths or blocks that do not fit. Source: spec/v4.md 4.5 [OFF-M Indexer], visibility 4.2.
    """
    return _indexer_scores(_Call(q, k_cache, weights, block_table, query_start_loc, seq_lens, ratio))


@indexer_scores.shapes
def _(*arguments: Any) -> None:
    call = _Call(*arguments)
    for name in ("k_cache", "weights"):
        found = getattr(call, name).dtype
        if found != call.q.dtype:
            raise indexer_scores.reject(name, str(found), f"{call.q.dtype} like q")
    if call.ratio < 1:
        raise indexer_scores.reject("ratio", call.ratio, "at least 1")
    ragged.check_layout("indexer_scores", "k_cache", call.k_cache, call.block_table, call.query_start_loc)


@indexer_scores.contents
def _(*arguments: Any) -> None:
    call = _Call(*arguments)
    ragged.check_batch("indexer_scores", call.query_start_loc, call.seq_lens, call.q.shape[0])
    entries = ragged.entries_to_read(call.query_start_loc, call.seq_lens, call.ratio)
    num_blocks, block_size = call.k_cache.shape[:2]
    first = torch.zeros_like(entries)
    ragged.check_table("indexer_scores", "block_table", call.block_table, first, entries, block_size, num_blocks)


@operator(
    "topk_indices(Tensor scores, Tensor visible, int k) -> Tensor",
    rows=(15,),
    arguments={"scores": "float [T, n]", "visible": "int [T]"},
    tolerance=Tolerance(reason="indices under a total order (score, then smaller index) are exact"),
)
def topk_indices(scores: torch.Tensor, visible: torch.Tensor, k: int) -> torch.Tensor:
    """The k best of the first visible[t] scores of every row: int32 [T, min(k, n)], best first, -1 where there is none.

    scores: float [T, n]; visible: int [T] in [0, n]; k >= 1. Equal scores (-0 equals 0): the smaller index first.
    What lies at or past visible[t] is ignored, NaN included. ArgumentError for NaN among visible scores.
    Source: spec/v4.md 4.5 items 6 to 8, 15.1 (tie rule).
    """
    width = min(k, scores.shape[1])

    def best(part: slice) -> torch.Tensor:
        order = _hide(scores[part], visible[part]).sort(dim=1, descending=True, stable=True).indices[:, :width]
        return _pad(order, visible[part])

    return by_tokens(best, scores.shape[0], _SORT_BYTES * scores.shape[1])


def _pad(order: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    rank = torch.arange(order.shape[1], device=order.device)
    return torch.where(rank < visible[:, None], order, -1).int()


@topk_indices.shapes
def _(scores: torch.Tensor, visible: torch.Tensor, k: int) -> None:
    if k < 1:
        raise topk_indices.reject("k", k, "at least 1")


@topk_indices.contents
def _(scores: torch.Tensor, visible: torch.Tensor, k: int) -> None:
    outside = ((visible < 0) | (visible > scores.shape[1])).nonzero()
    if len(outside):
        t = int(outside[0])
        raise topk_indices.reject(
            "visible", f"{int(visible[t])} at {t}", f"0 to {scores.shape[1]}, the scores of a row"
        )
    has_nan = by_tokens(
        lambda part: _hide(scores[part], visible[part]).isnan().any(1), scores.shape[0], _SORT_BYTES * scores.shape[1]
    )
    if has_nan.any():
        t = int(has_nan.nonzero()[0])
        j = int(scores[t].isnan().nonzero()[0])
        raise topk_indices.reject("scores", f"NaN at [{t}, {j}]", "numbers or infinities where visible")


_BATCHES: dict[str, list[ragged_cases.Sequence]] = {
    "no sequences": [],
    "zero tokens": [(0, 0), (9, 0)],
    "nothing visible yet": [(0, 3)],
    "one sequence": [(0, 19)],
    "edges": [(0, s) for s in (1, 3, 4, 5, 7, 8, 9)],
    "decode": [(before, 1) for before in (0, 2, 3, 4, 6, 7, 8, 30, 31, 32)],
    "mixed": [(0, 9), (5, 1), (3, 0), (6, 7), (7, 1), (0, 0), (33, 12)],
}


def _call(
    draw: Draw,
    sequences: list[ragged_cases.Sequence],
    dtype: torch.dtype,
    ratio: int = 4,
    heads: int = 5,
    dim: int = 12,
    block_size: int = 3,
) -> _Call:
    tokens = ragged_cases.tokens_of(sequences)
    entries = max((before + new for before, new in sequences), default=0) // ratio
    table = ragged_cases.shuffled_table(draw, sequences, entries, block_size)
    return _Call(
        draw.normal(tokens, heads, dim, dtype=dtype),
        draw.normal(ragged_cases.blocks_of(table), block_size, dim, dtype=dtype),
        draw.normal(tokens, heads, dtype=dtype, scale=(heads * dim) ** -0.5),
        table,
        *ragged_cases.offsets(sequences),
        ratio,
    )


def _stale(call: _Call) -> _Call:
    """NaN in every cache row, nonsense in every table entry that belongs to no closed block."""
    entries = call.seq_lens // call.ratio
    cache = ragged_cases.only_rows(call.k_cache, call.block_table, entries * 0, entries)
    table = ragged_cases.only_blocks(call.block_table, entries * 0, entries, cache.shape[1])
    return call._replace(k_cache=cache, block_table=table)


def _special(call: _Call) -> _Call:
    """NaN, infinite and zero queries; a query opposite to all keys, whose scores are exact zeros."""
    q, cache = call.q.clone(), call.k_cache.abs()
    q[8, 0, 0], q[9, 1, 2], q[10] = float("nan"), float("inf"), 0.0
    q[11] = -q[11].abs()
    return call._replace(q=q, k_cache=cache)


def _strided(draw: Draw, call: _Call) -> _Call:
    wide = draw.normal(*call.k_cache.shape[:2], call.k_cache.shape[2] + 3, dtype=call.q.dtype)
    q = call.q.transpose(0, 1).contiguous().transpose(0, 1)
    return call._replace(q=q, k_cache=wide[..., 2:-1], weights=call.weights.T.contiguous().T)


@indexer_scores.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in _DTYPES.items():
        for name, sequences in _BATCHES.items():
            yield Case(name, profile, _call(draw, sequences, dtype))
        yield Case("ratio 3, one head", profile, _call(draw, _BATCHES["mixed"], dtype, ratio=3, heads=1, dim=7))
        yield Case("large blocks", profile, _call(draw, _BATCHES["mixed"], dtype, block_size=16))
        yield Case("stale NaN", profile, _stale(_call(draw, _BATCHES["mixed"], dtype)))
        yield Case("NaN, infinity, zero", profile, _special(_call(draw, [(0, 19)], dtype)))
        yield Case("strided", profile, _strided(draw, _call(draw, _BATCHES["mixed"], dtype)))
        sequences = [(0, 6), (259, 4)]
        yield Case("64 heads of 128", profile, _call(draw, sequences, dtype, heads=64, dim=128, block_size=16))


add_output_faults(indexer_scores, "last token zero", "stale tail of channels", "one NaN", "tokens shifted by one")


def _fault(name: str, **steps: Step) -> None:
    indexer_scores.fault(name)(lambda *arguments: _indexer_scores(_Call(*arguments), **steps))


def _relu_last(dot: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (dot * weights[:, :, None]).relu().sum(1).to(weights.dtype)


_fault("relu left out", combine=lambda dot, w: (dot * w[:, :, None]).sum(1).to(w.dtype))
_fault("relu after the weight", combine=_relu_last)
_fault("negative weights cut", combine=lambda dot, w: _combine(dot, w.relu()))
_fault("weights left out", combine=lambda dot, w: _combine(dot, torch.full_like(w, (w.shape[1] * 128) ** -0.5)))
_fault("last head left out", combine=lambda dot, w: _combine(dot[:, :-1], w[:, :-1]))
_fault("mean over heads", combine=lambda dot, w: _combine(dot, w) / w.shape[1])
_fault("scaled twice", dot=lambda q, rows: _dot(q, rows) * q.shape[2] ** -0.5)
_fault("last channel left out", dot=lambda q, rows: _dot(q[..., :-1], rows[..., :-1]))
_fault("keys of the first sequence", rows=lambda call, sequence, entries: _rows(call, sequence * 0, entries))
_fault("entry seen before its block closes", visible=lambda positions, ratio: _visible(positions + 1, ratio))
_fault("newest entry one token late", visible=lambda positions, ratio: _visible(positions - 1, ratio))
_fault("token's own entry too", visible=lambda positions, ratio: positions // ratio + 1)
_fault("hidden entries are 0", hide=lambda scores, visible: _hide(scores, visible).nan_to_num(neginf=0))


@indexer_scores.fault("block table not followed")
def _(*arguments: Any) -> torch.Tensor:
    call = _Call(*arguments)
    return _indexer_scores(call._replace(block_table=call.block_table.sort(1).values))


@indexer_scores.fault("positions counted from the call")
def _(*arguments: Any) -> torch.Tensor:
    call = _Call(*arguments)
    return _indexer_scores(call._replace(seq_lens=call.query_start_loc.diff()))


@topk_indices.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in _DTYPES.items():
        for tokens, n, k in ((0, 5, 3), (4, 0, 3), (3, 1, 1), (6, 7, 7), (5, 6, 9), (33, 130, 16), (7, 1000, 64)):
            visible = draw.integers(tokens, high=n + 1)
            yield Case(f"{tokens}x{n}, best {k}", profile, (draw.spread(tokens, n, dtype=dtype), visible, k))
        few = draw.integers(9, 60, low=-1, high=2).to(dtype)
        yield Case("ties", profile, (few, draw.integers(9, high=61, dtype=torch.int64), 20))
        yield Case("all equal", profile, (torch.zeros(3, 40, dtype=dtype), torch.tensor([40, 39, 0]), 8))
        zeros = torch.tensor([0.0, -0.0]).repeat(2, 20).to(dtype)
        yield Case("-0 equals 0", profile, (zeros, torch.tensor([40, 7]), 12))
        edge = draw.normal(6, 12, dtype=dtype).sort(1).values  # the best one is always the last
        yield Case("best at the edge", profile, (edge, torch.tensor([0, 1, 4, 5, 11, 12]), 4))
        special = draw.normal(3, 9, dtype=dtype)
        special[0, 2], special[0, 4], special[1, :3], special[:, 6:] = torch.inf, -torch.inf, -torch.inf, torch.nan
        yield Case("infinities, hidden NaN", profile, (special, torch.tensor([6, 5, 2]), 5))
        yield Case("strided", profile, (draw.normal(12, 5, dtype=dtype).T, torch.tensor([12, 3, 9, 0, 7]), 4))


add_output_faults(topk_indices, "last token zero", "stale tail of channels", "tokens shifted by one")


@topk_indices.fault("ties: larger index first")
def _(scores: torch.Tensor, visible: torch.Tensor, k: int) -> torch.Tensor:
    order = _hide(scores, visible).flip(1).sort(dim=1, descending=True, stable=True).indices
    return _pad(scores.shape[1] - 1 - order[:, :k], visible)


@topk_indices.fault("torch.topk, without a tie rule")
def _(scores: torch.Tensor, visible: torch.Tensor, k: int) -> torch.Tensor:
    return _pad(_hide(scores, visible).topk(min(k, scores.shape[1])).indices, visible)


@topk_indices.fault("worst instead of best")
def _(scores: torch.Tensor, visible: torch.Tensor, k: int) -> torch.Tensor:
    order = _hide(-scores, visible).sort(dim=1, descending=True, stable=True).indices
    return _pad(order[:, :k], visible)


@topk_indices.fault("by magnitude")
def _(scores: torch.Tensor, visible: torch.Tensor, k: int) -> torch.Tensor:
    return topk_indices.reference(scores.abs(), visible, k)


@topk_indices.fault("hidden scores compete")
def _(scores: torch.Tensor, visible: torch.Tensor, k: int) -> torch.Tensor:
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.where(order < visible[:, None], order, -1).int()


@topk_indices.fault("one entry too many visible")
def _(scores: torch.Tensor, visible: torch.Tensor, k: int) -> torch.Tensor:
    return topk_indices.reference(scores, (visible + 1).clamp(max=scores.shape[1]), k)


@topk_indices.fault("newest entry missed")
def _(scores: torch.Tensor, visible: torch.Tensor, k: int) -> torch.Tensor:
    return topk_indices.reference(scores, (visible - 1).clamp(min=0), k)


@topk_indices.fault("not padded with -1")
def _(scores: torch.Tensor, visible: torch.Tensor, k: int) -> torch.Tensor:
    return topk_indices.reference(_hide(scores, visible), torch.full_like(visible, scores.shape[1]), k)


@topk_indices.fault("in index order")
def _(scores: torch.Tensor, visible: torch.Tensor, k: int) -> torch.Tensor:
    order = topk_indices.reference(scores, visible, k)
    return torch.where(order < 0, scores.shape[1], order).sort(1).values.int()


@topk_indices.fault("scores compared in bf16")
def _(scores: torch.Tensor, visible: torch.Tensor, k: int) -> torch.Tensor:
    return topk_indices.reference(scores.bfloat16(), visible, k)


@topk_indices.fault("last of the k missed")
def _(scores: torch.Tensor, visible: torch.Tensor, k: int) -> torch.Tensor:
    order = topk_indices.reference(scores, visible, k).clone()
    order[:, -1:] = -1
    return order
