"""Proof of the indexer's scores and choice in one step (spec/v4.md 4.5): cases, oracle, faults."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from dsv4_backend.contract import Case, Draw
from dsv4_backend.ops import indexer as ops
from dsv4_backend.ops.attention import visible_entries
from dsv4_backend.ops.indexer_topk import indexer_topk
from dsv4_backend.proofs import indexer_oracle
from dsv4_backend.proofs.indexer import BATCHES, random_call, stale
from dsv4_backend.proofs.numerics import Array, wide
from dsv4_backend.proofs.paging import EDITS_OF_HIDDEN_ROWS, TILES_DECIDE_NO_VALUE, tokens_of_call
from dsv4_backend.proofs.rounding_rows import powers, whole

_BATCHES = BATCHES | {"one sequence": [(0, 79)]}
_K = 5


def _visible_scores(*call: Any) -> list[Array]:
    """Scores of what each token sees."""
    *_, starts, lengths, ratio = call
    scores = wide(indexer_oracle.indexer_scores(*call))
    counts = ((row, (t + 1) // ratio) for row, _, t in tokens_of_call(starts, lengths))
    return [scores[row, :count] for row, count in counts]


@indexer_topk.oracle
def _(*arguments: Any) -> Array:
    *call, k = arguments
    _, k_cache, _, table, *_ = call
    columns = min(k, table.shape[1] * k_cache.shape[1])
    return indexer_oracle.best_entries(_visible_scores(*call), columns, indexer_oracle.unrounded)


@indexer_topk.measured
def _(*arguments: Any) -> Array:
    *call, _, chosen = arguments
    return indexer_oracle.scores_in_order(_visible_scores(*call), chosen)


def _whole(draw: Draw, call: ops.IndexerCall) -> ops.IndexerCall:
    """Scores that no order of sums changes, and many equal ones."""
    q, keys = whole(draw, *call.q.shape), whole(draw, *call.k_cache.shape)
    signs = draw.integers(*call.weights.shape, high=2) * 2 - 1
    weights = powers(draw, *call.weights.shape).float() * signs
    dtype = call.q.dtype
    return call._replace(q=q.to(dtype), k_cache=keys.to(dtype), weights=weights.to(dtype))


def _signs(call: ops.IndexerCall) -> ops.IndexerCall:
    """Scores of few values."""
    return call._replace(q=call.q.sign(), k_cache=call.k_cache.sign(), weights=call.weights.sign())


@indexer_topk.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in (("ideal", torch.float32), ("official", torch.bfloat16)):
        for name, sequences in _BATCHES.items():
            call = random_call(draw, sequences, dtype)
            yield Case(name, profile, (*call, _K))
            yield Case(f"{name}, whole", profile, (*_whole(draw, call), _K), decided=True)
        mixed = _whole(draw, random_call(draw, _BATCHES["mixed"], dtype))
        yield Case("more than there are", profile, (*mixed, 40), decided=True)
        yield Case("the best alone", profile, (*mixed, 1), decided=True)
        yield Case("stale NaN", profile, (*stale(mixed), _K), decided=True)
        ties = _signs(_whole(draw, random_call(draw, [(0, 79), (40, 9)], dtype, heads=2, dim=3)))
        yield Case("ties", profile, (*ties, _K), decided=True)
        zeros = ties._replace(q=ties.q * 0, weights=-ties.weights.abs())
        yield Case("-0 equals 0", profile, (*zeros, 3), decided=True)
        thirds = random_call(draw, _BATCHES["mixed"], dtype, ratio=3)
        yield Case("ratio 3", profile, (*_whole(draw, thirds), _K), decided=True)
        real = random_call(draw, [(0, 6), (559, 4)], dtype, heads=64, dim=128, block_size=16)
        yield Case("64 heads of 128", profile, (*real, 64))
        yield Case("64 heads of 128, whole", profile, (*_whole(draw, real), 64), decided=True)


indexer_topk.no_output_fault("one NaN", "indices are integers")
indexer_topk.wrong_step(
    ops._combine,
    {
        "relu left out": lambda dot, w: (dot * w[:, :, None]).sum(1).to(w.dtype),
        "negative weights cut": lambda dot, w: ops._combine(dot, w.relu()),
        "weights left out": lambda dot, w: ops._combine(dot, torch.ones_like(w)),
        "last head left out": lambda dot, w: ops._combine(dot[:, :-1], w[:, :-1]),
    },
)
indexer_topk.wrong_steps(
    {
        "last channel left out": {ops._dot: lambda q, rows: ops._dot(q[..., :-1], rows[..., :-1])},
        "entry seen before its block closes": {
            visible_entries: lambda t, ratio: visible_entries(t + 1, ratio)
        },
        "newest entry one token late": {
            visible_entries: lambda t, ratio: visible_entries(t - 1, ratio)
        },
        "hidden entries compete": {ops.hide: lambda scores, visible: scores},
        "the smallest": {ops.best: lambda scores, n, k: ops.best(-scores, n, k)},
        "ties: larger index first": {
            ops.best: lambda scores, n, k: ops.pad_behind(
                scores.shape[1]
                - 1
                - ops.hide(scores, n)
                .flip(1)
                .sort(dim=1, descending=True, stable=True)
                .indices[:, :k],
                n,
            )
        },
        "scores of fp32": {
            ops._combine: lambda dot, w: (dot.float().relu() * w.float()[:, :, None]).sum(1)
        },
    }
)
indexer_topk.wrong_arguments(
    {"block table not followed": {"block_table": lambda table: table.sort(1).values}}
)
indexer_topk.wrong_results(
    {"in index order": lambda a, order: order.where(order >= 0, 1 << 30).sort(1).values.int()}
)
indexer_topk.explain(
    dict.fromkeys(
        (
            "spans: *",
            "by_tokens: *",
            "token_bytes: *",
            "indexer_topk: 0 -> 1",
            "choice_bytes: *",
        ),
        TILES_DECIDE_NO_VALUE,
    ),
    dict.fromkeys(
        (
            "compute: x.dtype == torch.float64 -> x.dtype != torch.float64",
            "compute: x.float() -> x",
        ),
        "torch sums bf16 in fp32, and each of these tensors is rounded to bf16 next",
    ),
    {
        "indexer_topk: chosen.masked_fill(scores.isnan().any(1)[:, None], -1) -> chosen": (
            "kernels refuse NaN, so that no case has it: tests/backend/test_attention_kernels.py"
        )
    },
    dict.fromkeys(
        (
            *EDITS_OF_HIDDEN_ROWS,
            "slots: (index >= 0) & (block >= 0) -> (index >= 0) | (block >= 0)",
        ),
        "hidden rows are not chosen, whatever they score",
    ),
)
