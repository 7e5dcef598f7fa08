"""Proof of the lightning indexer in one step (spec/deployments.md 6): cases, oracles, faults."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import torch

from dsv4_backend import ragged_cases
from dsv4_backend.contract import Case, Draw, Operator
from dsv4_backend.ops import lightning_indexer as ops
from dsv4_backend.ops.attention import visible_entries
from dsv4_backend.ops.indexer import IndexerCall, best, hide
from dsv4_backend.ops.token_quant import fp8_token_quant, int8_token_quant
from dsv4_backend.proofs.indexer import BATCHES, random_call, stale
from dsv4_backend.proofs.indexer_oracle import (
    best_entries,
    entry_scores,
    scores_of_choice,
    unrounded,
)
from dsv4_backend.proofs.numerics import Array, round_to
from dsv4_backend.proofs.paging import EDITS_OF_HIDDEN_ROWS, TILES_DECIDE_NO_VALUE

_BATCHES = BATCHES | {"one sequence": [(0, 39)]}
_K = 4
_QUANTISERS = {
    "lightning_indexer_int8": (int8_token_quant, torch.float16, "a2a3-int8"),
    "lightning_indexer_fp8": (fp8_token_quant, torch.float32, "a5-mx"),
}


def _as_bf16(scores: Array) -> Array:
    return round_to(ml_dtypes.bfloat16, scores)


def _prove(contract: Operator) -> None:
    names = tuple(inspect.signature(contract.reference).parameters)
    rounded = _as_bf16 if contract is ops.lightning_indexer_fp8 else unrounded

    def scores(values: tuple[Any, ...]) -> list[Array]:
        named = {"q_scale": None, "k_scale": None} | dict(zip(names, values, strict=True))
        del named["max_seq_len"], named["k"]
        return entry_scores(**named)

    contract.oracle(lambda *values: best_entries(scores(values), values[-1], rounded))
    contract.measured(lambda *values: scores_of_choice(scores(values[:-1]), values[-1]))


def _named(call: IndexerCall, k: int = _K) -> dict[str, Any]:
    """Arguments of the operators by name."""
    *tensors, ratio = call
    longest = max([0, *call.seq_lens.tolist()])
    names = call._fields[:-1]
    named = dict(zip(names, tensors, strict=True))
    return named | {"max_seq_len": longest, "ratio": ratio, "k": k}


def _random(draw: Draw, sequences: list[ragged_cases.Sequence]) -> IndexerCall:
    return random_call(draw, sequences, torch.float32)


def _calls(draw: Draw) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, sequences in _BATCHES.items():
        yield name, _named(_random(draw, sequences))
    yield "more than there are", _named(_random(draw, _BATCHES["mixed"]), 40)
    call = _named(_random(draw, _BATCHES["mixed"]))
    yield "a bound above the lengths", call | {"max_seq_len": call["max_seq_len"] + 1}
    sequences = [(0, 6), (559, 4), (130, 1)]
    real = random_call(draw, sequences, torch.float32, heads=64, dim=128, block_size=16)
    yield "64 heads of 128", _named(real, 64)


@ops.lightning_indexer.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in (("ideal", torch.float32), ("official", torch.bfloat16)):
        for name, call in _calls(draw):
            yield _case(name, profile, _cast(call, dtype))
        hidden = _named(stale(_random(draw, _BATCHES["mixed"])))
        yield _case("stale NaN", profile, _cast(hidden, dtype))
        yield _case("near ties", profile, _cast(_named(_near_ties(draw)), dtype))


def _near_ties(draw: Draw) -> IndexerCall:
    """Two heads of which each sees every other entry, and scores that only fp32 tells apart: by
    their weights for every other token, by their dot products for the rest.
    """
    sequences = [(0, 39)]
    call = random_call(draw, sequences, torch.float32, heads=2, dim=3)
    step, odd = 2.0**-10, torch.arange(39) % 2 == 1
    q, weights, cache = call.q * 0, call.weights * 0 + 1, call.k_cache * 0
    q[:, 0, 0], q[:, 1, 2] = 1.0, 1.0
    q[odd, 0, 1], weights[~odd, 0] = step, 1 + step
    block_size = cache.shape[1]
    for entry in range(39 // call.ratio):
        block = call.block_table[0, entry // block_size]
        row = [1.0, 1.0, 0.0] if entry % 2 else [0.0, 0.0, 1.0]
        cache[block, entry % block_size] = torch.tensor(row)
    return call._replace(q=q, weights=weights, k_cache=cache)


def _cast(call: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return call | {name: call[name].to(dtype) for name in ("q", "k_cache")}


def _case(name: str, profile: str, call: dict[str, Any]) -> Case:
    return Case(name, profile, tuple(call.values()))


def _quantised_cases(contract: Operator) -> None:
    quantise, scale, profile = _QUANTISERS[contract.name]

    @contract.cases
    def _(draw: Draw) -> Iterator[Case]:
        for name, call in _calls(draw):
            q, q_scale = quantise(call["q"].bfloat16())
            pages = call["k_cache"]
            keys, k_scale = quantise(pages.flatten(0, 1).bfloat16())
            scales = k_scale.to(scale).view(pages.shape[:2])
            weights = call["weights"].to(scale)
            rest = tuple(call.values())[3:]
            rows = q, q_scale.to(scale), keys.view(pages.shape), scales, weights
            yield Case(name, profile, (*rows, *rest))


_HIDDEN = "hidden rows are not chosen, whatever they score"
_ENTRY_ROWS = "entry_rows: slots(block_table, sequence[:, None], index, cache.shape[1])"
_E4M3 = ("selectable: *", "_keys: *")
_OTHER_FORMATS = {
    "lightning_indexer": (*_E4M3, "scaled: *", "_scores: *"),
    "lightning_indexer_int8": _E4M3,
    "lightning_indexer_fp8": (),
}
_SCALES = {
    "scaled: q_scale is None or k_scale is None -> q_scale is None and k_scale is None": (
        "codes always come with both"
    )
}
_STEP = "which of the entries within one step of bf16 is chosen is open"
_EQUIVALENT = {
    "other max_seq_len": "a bound of the lengths decides no value",
    "selectable: scores.bfloat16().float() -> scores.bfloat16()": _STEP,
    "selectable: scores.bfloat16() -> scores": _STEP,
    "selectable: codes == torch.float8_e4m3fn -> codes != torch.float8_e4m3fn": _STEP,
    "best: True -> False (2)": "which of equal scores is chosen is open",
    "weighted: (dots.relu() * weights.float()[:, :, None]).sum(1) -> "
    "(dots.relu() * weights.float()[:, :, None]).mean(1)": "a positive factor chooses nothing",
    "key_rows: 1 -> 2": "whether the rows of one sequence are shared decides no value",
    "slots: (index >= 0) & (block >= 0) -> (index >= 0) | (block >= 0)": _HIDDEN,
    f"{_ENTRY_ROWS}.masked_fill(behind, -1) -> {_ENTRY_ROWS.removeprefix('entry_rows: ')}": _HIDDEN,
    "entry_rows: index >= lengths[sequence][:, None] -> "
    "index > lengths[sequence][:, None]": _HIDDEN,
} | dict.fromkeys(
    (
        "compute: x.dtype == torch.float64 -> x.dtype != torch.float64",
        "compute: x.float() -> x",
        "key_rows: compute(rows) -> rows",
        "weighted: weights.float() -> weights",
        "scaled: q_scale.float() -> q_scale",
        "scaled: k_scale.float() -> k_scale",
    ),
    "the product with fp32 widens it",
)

for _contract in ops.LIGHTNING:
    _prove(_contract)
    _contract.no_output_fault("one NaN", "indices are integers")
    if _contract is not ops.lightning_indexer:
        _quantised_cases(_contract)
    _contract.wrong_step(
        ops.weighted,
        {
            "relu left out": lambda dots, w: (dots * w.float()[:, :, None]).sum(1),
            "negative weights cut": lambda dots, w: ops.weighted(dots, w.relu()),
            "weights left out": lambda dots, w: ops.weighted(dots, torch.ones_like(w)),
            "last head left out": lambda dots, w: ops.weighted(dots[:, :-1], w[:, :-1]),
        },
    )
    _contract.wrong_steps(
        {
            "entry seen before its block closes": {
                visible_entries: lambda t, ratio: visible_entries(t + 1, ratio)
            },
            "newest entry one token late": {
                visible_entries: lambda t, ratio: visible_entries(t - 1, ratio)
            },
            "hidden entries compete": {hide: lambda scores, visible: scores},
            "the smallest": {best: lambda scores, n, k: best(-scores, n, k)},
            "one fewer": {best: lambda s, n, k: best(s, n.clamp(max=k - 1), k)},
            "the first ones": {best: lambda s, n, k: best(s * 0, n, k)},
        }
    )
    _contract.wrong_arguments(
        {"block table not followed": {"block_table": lambda table: table.sort(1).values}}
    )
    if _contract is not ops.lightning_indexer:
        _contract.wrong_arguments(
            {
                "scales of queries left out": {"q_scale": torch.ones_like},
                "scales of keys left out": {"k_scale": torch.ones_like},
            }
        )
    _contract.explain(
        dict.fromkeys(("spans: *", "by_tokens: *", "select: *"), TILES_DECIDE_NO_VALUE),
        dict.fromkeys(EDITS_OF_HIDDEN_ROWS, _HIDDEN),
        dict.fromkeys(_OTHER_FORMATS[_contract.name], "for rows of another format"),
        {} if _contract is ops.lightning_indexer else _SCALES,
        _EQUIVALENT,
    )
