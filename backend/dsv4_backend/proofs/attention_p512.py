"""Proof of sparse attention in blocks of 512 (spec/deployments.md 7): cases and named faults."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from dsv4_backend import ragged_cases
from dsv4_backend.contract import DEPLOYMENTS, Case, Draw, Operator
from dsv4_backend.faults import Edits, Function, Steps
from dsv4_backend.ops.attention import (
    AttentionCall,
    Keys,
    attend,
    compressed_keys,
    near_positions,
    round_probabilities,
    score_keys,
    visible_entries,
)
from dsv4_backend.ops.attention_p512 import attend_blocks, sparse_attention_p512
from dsv4_backend.proofs import attention_oracle
from dsv4_backend.proofs.attention import (
    aim_at_edges,
    equal_scores,
    newest_nan,
    random_call,
    separate_softmaxes,
    staircase,
    stale,
    strided,
)
from dsv4_backend.proofs.bounds import PAIRS
from dsv4_backend.proofs.paging import HIDDEN_ROWS, TILES

sparse_attention_p512.oracle(attention_oracle.sparse_attention_p512)

KINDS = ("window", "all", "chosen")
EDGES = [(0, s) for s in (1, 3, 4, 5, 6, 7, 8, 9, 13, 14, 15)]
_MIXED = [(0, 9), (5, 1), (3, 0), (6, 7), (7, 1), (0, 0), (13, 12)]
_LONG = [(2211, 1), (40, 1), (579, 1)]
_PAGE, _K, _WINDOW = 16, 512, 128
_REAL: dict[str, tuple[int, list[ragged_cases.Sequence]]] = {
    "window": (0, [(0, 3), (125, 6), (200, 1)]),
    "all": (128, [(0, 130), (515, 1), (126, 3)]),
    "chosen": (4, [(2211, 2), (0, 9), (129, 1)]),
}
"""What chips take: kind -> ratio and sequences."""


def _front(choice: torch.Tensor) -> torch.Tensor:
    """Every row with its -1 behind the entries."""
    return choice.gather(1, (choice < 0).int().argsort(dim=1, stable=True))


def arguments_of(call: AttentionCall, spare: int = 0) -> tuple[Any, ...]:
    """Arguments of the operator; max_seq_len is `spare` more than it has to be."""
    if call.cmp_indices is not None:
        call = call._replace(cmp_indices=_front(call.cmp_indices))
    longest = int(call.seq_lens.max()) if len(call.seq_lens) else 0
    return (*call[:9], longest + spare, *call[9:])


def _real(draw: Draw, kind: str, dtype: torch.dtype) -> AttentionCall:
    """Heads, widths and pages as a released model's on a chip."""
    ratio, sequences = _REAL[kind]
    longest = max(before + new for before, new in sequences)
    tokens = ragged_cases.tokens_of(sequences)
    starts, lengths = ragged_cases.offsets(sequences)
    near = ragged_cases.shuffled_table(draw, sequences, longest, _PAGE)
    pool = draw.normal(ragged_cases.blocks_of(near), _PAGE, 512, dtype=dtype)
    q, sink = draw.normal(tokens, 2, 512, dtype=dtype), draw.normal(2)
    call = AttentionCall(q, sink, pool, near, None, None, None, starts, lengths, _WINDOW, ratio)
    if kind == "window":
        return call
    far = ragged_cases.shuffled_table(draw, sequences, longest // ratio, _PAGE)
    pool = draw.normal(ragged_cases.blocks_of(far), _PAGE, 512, dtype=dtype)
    call = call._replace(cmp_cache=pool, cmp_block_table=far)
    if kind == "all":
        return call
    visible = visible_entries(call.positions(), ratio)[:, None]
    order = draw.uniform(tokens, max(_K, int(visible.max())))
    order = order.masked_fill(torch.arange(order.shape[1]) >= visible, 2.0).argsort(1)[:, :_K]
    return call._replace(cmp_indices=torch.where(order < visible, order, -1).int())


def cases_of(draw: Draw, kind: str, dtype: torch.dtype) -> Iterator[tuple[str, AttentionCall]]:
    """Calls over float caches by name; kind: of `KINDS`."""
    for name, sequences in (("no sequences", []), ("zero tokens", [(0, 0), (9, 0)])):
        yield name, random_call(draw, kind, sequences, dtype)
    for name, sequences in (("one token", [(0, 1)]), ("edges", EDGES), ("mixed", _MIXED)):
        yield name, random_call(draw, kind, sequences, dtype)
        yield f"{name}, needles", aim_at_edges(random_call(draw, kind, sequences, dtype))
    yield "stale NaN", stale(random_call(draw, kind, _MIXED, dtype))
    yield "newest NaN", newest_nan(random_call(draw, kind, [(0, 24)], dtype))
    yield "strided", strided(draw, random_call(draw, kind, _MIXED, dtype))
    call = random_call(draw, kind, EDGES, dtype)
    yield "large scores", call._replace(q=call.q * 40, sink=call.sink * 40)
    yield "one large sink", call._replace(sink=torch.tensor([-30.0, 6.0, 90.0]))
    for window in (70, 600):
        stairs = staircase(draw, kind, dtype, window, _LONG)
        yield f"staircase, window {window}", stairs
        yield f"staircase, window {window}, high sink", stairs._replace(sink=stairs.sink + 9)
    yield "as on a chip", _real(draw, kind, dtype)


@sparse_attention_p512.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in zip(DEPLOYMENTS, (torch.bfloat16, torch.float16), strict=True):
        for kind in KINDS:
            for name, call in cases_of(draw, kind, dtype):
                yield Case(f"{kind}, {name}", profile, arguments_of(call))
            call = equal_scores(draw, random_call(draw, kind, _MIXED, dtype))
            yield Case(f"{kind}, equal scores", profile, arguments_of(call), decided=True)
        call = random_call(draw, "all", EDGES, dtype, window=0)
        yield Case("no window", profile, arguments_of(call))
        call = random_call(draw, "chosen", [(0, 13)], dtype)
        seen = visible_entries(call.positions(), call.ratio)[:, None] > 0
        repeated = torch.where(seen, 0, -1).expand(-1, 2).int()
        yield Case(
            "an entry chosen twice", profile, arguments_of(call._replace(cmp_indices=repeated))
        )
        nothing = torch.full((13, 0), -1, dtype=torch.int32)
        yield Case("nothing chosen", profile, arguments_of(call._replace(cmp_indices=nothing)))
        few = random_call(draw, "all", [(0, 61)], dtype, dim=3)
        yield Case("fewer channels than rows of a block", profile, arguments_of(few))
        call = random_call(draw, "all", [(3, 1), (5, 2)], dtype)
        yield Case("a bound above the lengths", profile, arguments_of(call, spare=1))


def _sink_apart(q: torch.Tensor, sink: torch.Tensor, parts: list[Keys]) -> torch.Tensor:
    """The sink is no maximum: blocks of the first softmax, each part padded to whole blocks."""
    whole = []
    for keys in parts:
        missing = -keys.valid.shape[1] % 512
        rows = torch.nn.functional.pad(keys.rows, (0, 0, 0, missing))
        whole.append(Keys(rows, torch.nn.functional.pad(keys.valid, (0, missing)), True))
    return attend(q, sink, whole, tile=512)


_BLOCKS: dict[str, Function] = {
    "blocks of 64 keys": partial(attend_blocks, block=64),
    "blocks of 1024 keys": partial(attend_blocks, block=1024),
    "blocks across the end of the window": partial(attend, tile=512),
    "sink not among the maxima": _sink_apart,
    "sink left out": lambda q, sink, parts: attend_blocks(q, sink - 1e4, parts),
    "sink counted twice": lambda q, sink, parts: attend_blocks(q, sink + math.log(2), parts),
    "entries before the window": lambda q, sink, parts: attend_blocks(q, sink, parts[::-1]),
    "two separate softmaxes": separate_softmaxes,
}
_WINDOWS: dict[str, Function] = {
    "window one key short": lambda t, window: near_positions(t, window)[:, 1:],
    "window one key long": lambda t, window: near_positions(t, window + 1),
    "current token not seen": lambda t, window: near_positions(t - 1, window),
}
_STEPS: dict[str, Steps] = {
    "compressed entries left out": {compressed_keys: lambda call, tokens: None},
    "entry seen before its block closes": {visible_entries: lambda t, r: visible_entries(t + 1, r)},
    "probabilities not rounded": {round_probabilities: lambda p, dtype: p},
    "scale left out": {
        score_keys: lambda q, keys: score_keys(q * q.shape[-1] ** 0.5, keys),
    },
}
_ARGUMENTS: dict[str, Edits] = {
    "choice ignored": {"cmp_indices": None},
    "last choice dropped": {"cmp_indices": lambda choice: choice[:, :-1]},
    "window table not followed": {"window_block_table": lambda table: table.sort(1).values},
    "entry table not followed": {"cmp_block_table": lambda table: table.sort(1).values},
    "positions counted from the call": lambda a: a._replace(seq_lens=a.query_start_loc.diff()),
}


def attend_wrongly(contract: Operator[..., torch.Tensor]) -> None:
    """Give a contract the faults of every attention in blocks of 512."""
    contract.wrong_step(attend_blocks, _BLOCKS)
    contract.wrong_step(near_positions, _WINDOWS)
    contract.wrong_steps(_STEPS)
    contract.wrong_arguments(_ARGUMENTS)


attend_wrongly(sparse_attention_p512)

SAME_BLOCKS = {
    "attend_blocks: sink.to(wide.dtype) -> sink": "both are fp32",
    "other max_seq_len": "a bound of the lengths decides no value",
}
"""Equivalent mutants of every attention in blocks of 512."""
sparse_attention_p512.explain(TILES, PAIRS, HIDDEN_ROWS, SAME_BLOCKS)
