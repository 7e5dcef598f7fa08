"""Proof of sparse attention (spec/v4.md 4.4, 4.6): cases, oracle, named faults."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from dsv4_backend import ragged, ragged_cases
from dsv4_backend.contract import Case, Draw
from dsv4_backend.ops.attention import (
    AttentionCall,
    Keys,
    attend,
    compressed_keys,
    keys_share,
    near_positions,
    round_probabilities,
    running_peaks,
    score_keys,
    sparse_attention,
    visible_entries,
)
from dsv4_backend.proofs import attention_oracle
from dsv4_backend.proofs.bounds import PAIRS
from dsv4_backend.proofs.paging import HIDDEN_ROWS, TILES
from dsv4_backend.proofs.rounding_rows import whole

sparse_attention.oracle(attention_oracle.sparse_attention)

_WINDOW, _RATIO = 7, 4
_EDGES = [(0, s) for s in (1, 3, 4, 5, 6, 7, 8, 9, 13, 14, 15)]
_DECODE = [(before, 1) for before in (0, 2, 3, 5, 6, 7, 8, 11, 15, 16, 19)]
_MIXED = [(0, 9), (5, 1), (3, 0), (6, 7), (7, 1), (0, 0), (13, 12)]
_RINGS = [(61, 3), (64, 1), (55, 1), (71, 3), (5, 2)]
_KINDS = ("window", "all", "chosen")


def _caches(
    draw: Draw,
    kind: str,
    sequences: list[ragged_cases.Sequence],
    dtype: torch.dtype,
    dim: int,
    ring: int,
) -> tuple[Any, ...]:
    """window_cache, window_block_table, cmp_cache, cmp_block_table: random rows everywhere."""
    longest = max((before + new for before, new in sequences), default=0)
    window = ragged_cases.shuffled_table(draw, sequences, ring or longest, 3)
    entries = ragged_cases.shuffled_table(draw, sequences, longest // _RATIO, 5)
    near = draw.normal(ragged_cases.blocks_of(window), 3, dim, dtype=dtype)
    far = draw.normal(ragged_cases.blocks_of(entries), 5, dim, dtype=dtype)
    return (near, window, None, None) if kind == "window" else (near, window, far, entries)


def random_call(
    draw: Draw,
    kind: str,
    sequences: list[ragged_cases.Sequence],
    dtype: torch.dtype,
    ring: int = 0,
    heads: int = 3,
    dim: int = 10,
    window: int = _WINDOW,
) -> AttentionCall:
    """A call over random caches; kind: window, all (entries) or chosen (3 of them);
    ring: window rows, 0 for all.
    """
    tokens = ragged_cases.tokens_of(sequences)
    near, near_table, far, far_table = _caches(draw, kind, sequences, dtype, dim, ring)
    call = AttentionCall(
        draw.normal(tokens, heads, dim, dtype=dtype),
        draw.normal(heads),
        near,
        near_table,
        far,
        far_table,
        None,
        *ragged_cases.offsets(sequences),
        window,
        0 if kind == "window" else _RATIO,
    )
    return call._replace(cmp_indices=_choice(draw, call, 3)) if kind == "chosen" else call


def _shuffled(draw: Draw, call: AttentionCall, least: int = 0) -> torch.Tensor:
    """All visible entries of every token in random order, then -1: int64 [T, at least `least`]."""
    visible = visible_entries(call.positions(), call.ratio)[:, None]
    order = draw.uniform(visible.shape[0], max(least, int(visible.max()) if len(visible) else 0))
    order = order.masked_fill(torch.arange(order.shape[1]) >= visible, 2.0).argsort(1)
    return torch.where(order < visible, order, -1)


def _choice(draw: Draw, call: AttentionCall, k: int) -> torch.Tensor:
    """K random visible entries per token in random order,
    -1 where there are fewer: int32 [T, k].
    """
    return _shuffled(draw, call, k)[:, torch.tensor([1, 0, 2])[:k]].int()


_STAIRS = [(259, 1), (40, 1), (130, 1)]
_STEP, _VALUES = 16, 64


def staircase(
    draw: Draw,
    kind: str,
    dtype: torch.dtype,
    window: int,
    sequences: list[ragged_cases.Sequence] = _STAIRS,
) -> AttentionCall:
    """One token per sequence, whose scores move by 0.2 every 16 keys of its list, by another factor
    per head; large values of both signs. So the probabilities of neighbours are rounded by the same
    amount, and that shows.
    """
    call = random_call(draw, kind, sequences, dtype, dim=24, window=window)
    owners = call.owners()[:, None]
    flat = ragged.slots(
        call.window_block_table,
        owners,
        near_positions(call.positions(), window),
        call.window_cache.shape[1],
    )
    _score_in_order(call.window_cache, flat, 0)
    if call.cmp_cache is not None and call.cmp_block_table is not None:
        everything = torch.arange(int(visible_entries(call.positions(), call.ratio).max()))
        chosen = (
            _shuffled(draw, call) if kind == "chosen" else everything.expand(len(sequences), -1)
        )
        flat = ragged.slots(call.cmp_block_table, owners, chosen, call.cmp_cache.shape[1])
        _score_in_order(call.cmp_cache, flat, window)
        call = call._replace(cmp_indices=chosen.int() if kind == "chosen" else None)
    q = torch.zeros_like(call.q)
    q[..., 0] = torch.tensor([1.0, 0.37, -0.6]) * q.shape[-1] ** 0.5
    return call._replace(q=q, sink=call.sink * 0)


def _score_in_order(cache: torch.Tensor, flat: torch.Tensor, before: int) -> None:
    """Channel 0 of the rows `flat` [T, n] says which step of the staircase they are,
    `before` keys into the list.
    """
    rows = cache.view(-1, cache.shape[-1])
    rows[:, 1:] *= _VALUES
    for token in flat:
        present = token >= 0
        rows[token[present], 0] = ((present.nonzero()[:, 0] + before) // _STEP * 0.2).to(
            cache.dtype
        )


def aim_at_edges(call: AttentionCall) -> AttentionCall:
    """Aim head h of each token at one boundary key: first and last of the window, one before, one
    after, and the same for compressed entries. A hidden target that is seen takes over the row.
    """
    t, owners = call.positions()[:, None], call.owners()[:, None]
    steps = torch.tensor([0, 1 - call.window, -call.window, 1])
    flat = ragged.slots(call.window_block_table, owners, t + steps, call.window_cache.shape[1])
    targets = ragged.gather_rows(call.window_cache, flat)
    if call.cmp_cache is not None and call.cmp_block_table is not None:
        last = visible_entries(t, call.ratio)
        flat = ragged.slots(
            call.cmp_block_table,
            owners,
            torch.cat((last - 1, last, last * 0), 1),
            call.cmp_cache.shape[1],
        )
        targets = torch.cat((targets, ragged.gather_rows(call.cmp_cache, flat)), 1)
    rows = targets.float()
    aimed = rows * (16 * rows.shape[-1] ** 0.5 / rows.square().sum(-1, keepdim=True))
    return call._replace(q=aimed.to(call.q.dtype), sink=torch.zeros(aimed.shape[1]))


def stale(call: AttentionCall) -> AttentionCall:
    """NaN in every row that no token of the call may see,
    nonsense in every table entry that none needs.
    """
    first = (call.seq_lens - call.query_start_loc.diff() + 1 - call.window).clamp(min=0)
    cache, table = call.window_cache, call.window_block_table
    near = ragged_cases.only_rows(cache, table, first, call.seq_lens)
    near_table = ragged_cases.only_blocks(table, first, call.seq_lens, cache.shape[1])
    call = call._replace(window_cache=near, window_block_table=near_table)
    cmp_cache, cmp_table = call.cmp_cache, call.cmp_block_table
    if cmp_cache is None or cmp_table is None:
        return call
    entries = call.seq_lens // call.ratio
    far = ragged_cases.only_rows(cmp_cache, cmp_table, entries * 0, entries)
    far_table = ragged_cases.only_blocks(cmp_table, entries * 0, entries, cmp_cache.shape[1])
    return call._replace(cmp_cache=far, cmp_block_table=far_table)


def newest_nan(call: AttentionCall) -> AttentionCall:
    """NaN in the newest rows of the only sequence: earlier tokens do not notice."""
    newest = call.seq_lens - 1
    near = ragged_cases.only_rows(call.window_cache, call.window_block_table, newest * 0, newest)
    call = call._replace(window_cache=near)
    if call.cmp_cache is None or call.cmp_block_table is None:
        return call
    newest = call.seq_lens // call.ratio - 1
    return call._replace(
        cmp_cache=ragged_cases.only_rows(call.cmp_cache, call.cmp_block_table, newest * 0, newest)
    )


def strided(draw: Draw, call: AttentionCall) -> AttentionCall:
    """The call with other strides of q and of the window's rows."""
    wide = draw.normal(
        *call.window_cache.shape[:2], call.window_cache.shape[2] + 3, dtype=call.q.dtype
    )
    return call._replace(
        q=call.q.transpose(0, 1).contiguous().transpose(0, 1), window_cache=wide[..., 2:-1]
    )


def equal_scores(draw: Draw, call: AttentionCall) -> AttentionCall:
    """Every key and the sink score 0 and rows are whole numbers: results are their sums, which are
    exact, over the number of scores, which no fp32 division takes across the middle of two values.
    """
    near, far = call.window_cache, call.cmp_cache
    return call._replace(
        q=call.q * 0,
        sink=call.sink * 0,
        window_cache=whole(draw, *near.shape, dtype=near.dtype),
        cmp_cache=None if far is None else whole(draw, *far.shape, dtype=far.dtype),
    )


_BATCHES: tuple[tuple[str, list[ragged_cases.Sequence], int], ...] = (
    ("no sequences", [], 0),
    ("zero tokens", [(0, 0), (9, 0)], 0),
    ("one token", [(0, 1)], 0),
    ("one sequence", [(0, 23)], 0),
    ("edges", _EDGES, 0),
    ("decode", _DECODE, 0),
    ("mixed", _MIXED, 0),
    ("ring", _RINGS, _WINDOW + 2),
)
"""Name, sequences, and window rows of each as a ring; 0 for all."""


def _cases_of(draw: Draw, kind: str, dtype: torch.dtype) -> Iterator[tuple[str, AttentionCall]]:
    for name, sequences, ring in _BATCHES:
        yield name, random_call(draw, kind, sequences, dtype, ring)
        if sequences:
            needles = aim_at_edges(random_call(draw, kind, sequences, dtype, ring))
            yield f"{name}, needles", needles
    yield "stale NaN", stale(random_call(draw, kind, _RINGS, dtype, _WINDOW + 2))
    yield "newest NaN", newest_nan(random_call(draw, kind, [(0, 24)], dtype))
    yield "strided", strided(draw, random_call(draw, kind, _MIXED, dtype))
    call = random_call(draw, kind, _EDGES, dtype)
    yield "large scores", call._replace(q=call.q * 40, sink=call.sink * 40)
    yield "extreme sinks", call._replace(sink=torch.tensor([-torch.inf, 6.0, torch.inf]))
    for window in (70, 130):
        yield f"staircase, window {window}", staircase(draw, kind, dtype, window)


@sparse_attention.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in (("ideal", torch.float32), ("official", torch.bfloat16)):
        for kind in _KINDS:
            for name, call in _cases_of(draw, kind, dtype):
                yield Case(f"{kind}, {name}", profile, call)
        yield Case("no window", profile, random_call(draw, "all", _EDGES, dtype, window=0))
        call = random_call(draw, "chosen", [(0, 13)], dtype)
        seen = visible_entries(call.positions(), _RATIO)[:, None] > 0
        repeated = torch.where(seen, 0, -1).expand(-1, 2).int()
        yield Case("an entry chosen twice", profile, call._replace(cmp_indices=repeated))
        nothing = torch.full((13, 0), -1, dtype=torch.int32)
        yield Case("nothing chosen", profile, call._replace(cmp_indices=nothing))
        real = random_call(
            draw, "all", [(125, 6), (515, 1)], dtype, ring=134, heads=4, dim=512, window=128
        )
        yield Case("window 128, 512 channels", profile, real)
        few = random_call(draw, "all", [(0, 61)], dtype, dim=3)
        yield Case("fewer channels than rows of a block", profile, few)
    for kind in _KINDS:
        call = equal_scores(draw, random_call(draw, kind, _MIXED, torch.bfloat16))
        yield Case(f"{kind}, equal scores", "official", call, decided=True)


def separate_softmaxes(q: torch.Tensor, sink: torch.Tensor, parts: list[Keys]) -> torch.Tensor:
    """The mean of one attention per part."""
    return torch.stack([attend(q, sink, [keys]) for keys in parts]).mean(0)


def _row_peaks(scores: torch.Tensor, tile: int) -> torch.Tensor:
    peaks = running_peaks(scores, tile)
    return peaks[..., -1:].expand_as(peaks)


def _packed(q: torch.Tensor, sink: torch.Tensor, parts: list[Keys]) -> torch.Tensor:
    """Every key list without the gaps between its parts."""
    rows = torch.cat([keys.rows for keys in parts], 1)
    valid = torch.cat([keys.valid for keys in parts], 1)
    order = (~valid).int().argsort(dim=1, stable=True)
    token = torch.arange(len(rows))[:, None]
    return attend(q, sink, [Keys(rows[token, order], valid.gather(1, order), True)])


def _ascending(choice: torch.Tensor) -> torch.Tensor:
    rows = choice.masked_fill(choice < 0, torch.iinfo(torch.int32).max).sort(1).values
    return rows.masked_fill(rows == torch.iinfo(torch.int32).max, -1)


sparse_attention.wrong_step(
    near_positions,
    {
        "window one key short": lambda t, window: near_positions(t, window)[:, 1:],
        "window one key long": lambda t, window: near_positions(t, window + 1),
        "current token not seen": lambda t, window: near_positions(t - 1, window),
        "next token seen": lambda t, window: near_positions(t + 1, window),
        "window left out": lambda t, window: near_positions(t, window) * 0 - 1,
        "window padded in front": lambda t, window: t[:, None] + torch.arange(1 - window, 1),
        "newest window key first": lambda t, window: near_positions(t, window).flip(1),
    },
)
sparse_attention.wrong_step(
    score_keys,
    {
        "scale left out": lambda q, keys: score_keys(q * q.shape[-1] ** 0.5, keys),
        "scale of the channels without RoPE": lambda q, keys: score_keys(q * (8 / 7) ** 0.5, keys),
        "hidden keys score 0": lambda q, keys: score_keys(q, keys).masked_fill(
            ~keys.valid[:, None], 0
        ),
    },
)
sparse_attention.wrong_step(
    keys_share,
    {
        "sink left out": lambda peak, total, sink: torch.ones_like(total),
        "sink counted twice": lambda peak, total, sink: keys_share(peak, total, sink + math.log(2)),
        "sink not relative to the maximum": lambda peak, total, sink: keys_share(
            peak * 0, total, sink
        ),
        "sink of the next head": lambda peak, total, sink: keys_share(peak, total, sink.roll(1)),
    },
)
sparse_attention.wrong_step(
    attend,
    {
        "two separate softmaxes": separate_softmaxes,
        "tiles of 32 keys": partial(attend, tile=32),
        "tiles of 128 keys": partial(attend, tile=128),
        "compressed entries before the window": lambda q, sink, parts: attend(q, sink, parts[::-1]),
        "window not padded": _packed,
    },
)
sparse_attention.wrong_steps(
    {
        "compressed entries left out": {compressed_keys: lambda call, tokens: None},
        "entry seen before its block closes": {
            visible_entries: lambda t, r: visible_entries(t + 1, r)
        },
        "newest entry one token late": {visible_entries: lambda t, r: visible_entries(t - 1, r)},
        "softmax without maximum": {
            running_peaks: lambda scores, tile: running_peaks(scores * 0, tile)
        },
        "probabilities rounded against the row's maximum": {running_peaks: _row_peaks},
        "probabilities not rounded": {round_probabilities: lambda p, dtype: p},
    }
)
sparse_attention.wrong_arguments(
    {
        "-1 taken for entry 0": {"cmp_indices": lambda choice: choice.clamp(min=0)},
        "choice ignored": {"cmp_indices": None},
        "last choice dropped": {"cmp_indices": lambda choice: choice[:, :-1]},
        "chosen entries in index order": {"cmp_indices": _ascending},
        "window table not followed": {"window_block_table": lambda table: table.sort(1).values},
        "entry table not followed": {"cmp_block_table": lambda table: table.sort(1).values},
        "positions counted from the call": lambda a: a._replace(seq_lens=a.query_start_loc.diff()),
        "keys rounded to bf16": {"window_cache": lambda cache: cache.bfloat16().to(cache.dtype)},
    }
)


sparse_attention.explain(
    TILES,
    PAIRS,
    HIDDEN_ROWS,
    {
        "attend: 1 -> 2 (6)": "a total of 0 means no key, and then the numerator is 0 too",
        "attend: True -> False (2)": "both lists have one entry per part",
        "attend: sink.to(wide.dtype) -> sink": "a sum with the wider dtype has it",
        "keys_share: x >= 0 -> x > 0": "exp(0) and exp(-0) are 1",
        "keys_share: x >= 0 -> x > 0 (2)": "exp(0) and exp(-0) are 1",
        "round_probabilities: p.to(dtype).to(p.dtype) -> p.to(dtype)": (
            "the product with the fp32 rescaling is fp32"
        ),
        "running_peaks: max(1, -(-scores.shape[-1] // tile)) -> -(-scores.shape[-1] // tile)": (
            "every call has a window or entries, so that a row has keys"
        ),
        "running_peaks: 0 -> 1 (2)": "without a key every p is exp(-inf)",
        "running_peaks: 1 -> 2": "one more tile of -inf behind the row",
    },
)
