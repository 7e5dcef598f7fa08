"""Proof of sparse attention over FP8 rows (spec/deployments.md 7): cases, oracle, named faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from dsv4_backend.contract import Case, Draw
from dsv4_backend.ops.attention import AttentionCall
from dsv4_backend.ops.attention_fp8 import FORMAT, sparse_attention_fp8, widened
from dsv4_backend.ops.cache_formats import Format, Parts, from_bytes, sized, to_bytes
from dsv4_backend.proofs import attention_oracle
from dsv4_backend.proofs.attention import random_call, stale
from dsv4_backend.proofs.attention_p512 import (
    EDGES,
    KINDS,
    SAME_BLOCKS,
    arguments_of,
    attend_wrongly,
    cases_of,
)
from dsv4_backend.proofs.bounds import BOTH_OR_NEITHER, PAIRS
from dsv4_backend.proofs.byte_entries import ENTRIES, read_entry
from dsv4_backend.proofs.numerics import BF16, Array
from dsv4_backend.proofs.paging import HIDDEN_ROWS, TILES
from dsv4_backend.proofs.wrong_formats import wrong_readers

_PROFILE = "a5-mx"
_ROPE = {3: 2, 10: 4, 24: 10, 150: 64, 512: 64}
"""RoPE channels of rows by all their channels."""


class _Rows:
    """bf16 [pages, rows, D] of bytes [pages, rows, bytes], one row when it is asked for."""

    def __init__(self, cache: Array, channels: int, rope: int) -> None:
        self._entry = ENTRIES["kv_epilog"](channels, rope)
        self._pages, self.shape = cache.reshape(len(cache), -1), (*cache.shape[:2], channels)

    def __getitem__(self, at: tuple[int, int]) -> Array:
        page, row = at
        return read_entry(self._entry, self._pages[page], self.shape[1], row).astype(BF16)


@sparse_attention_fp8.oracle
def _(q: Array, sink: Array, near: Array, table: Array, far: Array | None, *rest: Any) -> Array:
    *others, rope = rest
    channels = q.shape[2]
    window = _Rows(near, channels, rope)
    entries = None if far is None else _Rows(far, channels, rope)
    return attention_oracle.sparse_attention_p512(q, sink, window, table, entries, *others)


def _stored(draw: Draw, cache: torch.Tensor, rope: int) -> torch.Tensor:
    """The rows of a float cache as bytes, with bytes of any kind behind them."""
    form = sized(FORMAT, cache.shape[2], rope)
    data = to_bytes(form, cache.flatten(0, 1)).view(*cache.shape[:2], form.entry_bytes)
    filling = form.fields[-1].count
    behind = draw.bytes(*cache.shape[:2], filling)
    return torch.cat([data[..., : form.entry_bytes - filling], behind], -1)


def _any_scales(draw: Draw, cache: torch.Tensor, channels: int, rope: int) -> torch.Tensor:
    """The cache with scales of either sign that are no powers of two."""
    form = sized(FORMAT, channels, rope)
    *before, scale, _ = form.fields
    start = sum(field.width for field in before)
    shape = *cache.shape[:2], scale.count
    factors = draw.uniform(*shape, low=-1.5, high=1.5, dtype=torch.bfloat16) / 448
    cache[..., start : start + scale.width] = factors.view(torch.uint8)
    return cache


Change = Callable[[torch.Tensor], torch.Tensor]


def _with_caches(call: AttentionCall, change: Change) -> AttentionCall:
    far = None if call.cmp_cache is None else change(call.cmp_cache)
    return call._replace(window_cache=change(call.window_cache), cmp_cache=far)


def _over(call: AttentionCall, change: Change, spare: int = 0) -> tuple[Any, ...]:
    """Arguments of the operator whose caches are `change` of the call's."""
    return (*arguments_of(_with_caches(call, change), spare), _ROPE[call.q.shape[2]])


def _in_rope(call: AttentionCall) -> AttentionCall:
    """The call with the first channel last, where no scale rounds it."""
    call = call._replace(q=call.q.roll(-1, -1))
    return _with_caches(call, lambda cache: cache.roll(-1, -1))


def _special_cases(draw: Draw, kind: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    def stored(cache: torch.Tensor) -> torch.Tensor:
        return _stored(draw, cache, _ROPE[cache.shape[2]])

    yield "one long sequence", _over(random_call(draw, kind, [(20, 3)], torch.bfloat16), stored)
    idle = stale(random_call(draw, kind, [(4, 0), (0, 3)], torch.bfloat16))
    yield "nothing of the first sequence", _over(idle, stored)
    call = random_call(draw, kind, EDGES, torch.bfloat16, dim=150)

    def any_scales(cache: torch.Tensor) -> torch.Tensor:
        rope = _ROPE[cache.shape[2]]
        return _any_scales(draw, _stored(draw, cache, rope), cache.shape[2], rope)

    def apart(cache: torch.Tensor) -> torch.Tensor:
        pages = _stored(draw, cache, _ROPE[cache.shape[2]])
        return torch.stack([pages, draw.bytes(*pages.shape)], 1)[:, 0]

    yield "two scales per row, gaps between pages", _over(call, apart)
    large = call._replace(q=call.q * 40, sink=call.sink * 40)
    yield "any scales, large scores", _over(large, any_scales)


@sparse_attention_fp8.cases
def _(draw: Draw) -> Iterator[Case]:
    def stored(cache: torch.Tensor) -> torch.Tensor:
        return _stored(draw, cache, _ROPE[cache.shape[2]])

    for kind in KINDS:
        for name, call in cases_of(draw, kind, torch.bfloat16):
            call = _in_rope(call) if "staircase" in name else call
            yield Case(f"{kind}, {name}", _PROFILE, _over(call, stored))
        for name, arguments in _special_cases(draw, kind):
            yield Case(f"{kind}, {name}", _PROFILE, arguments)
    call = random_call(draw, "all", EDGES, torch.bfloat16, window=0)
    yield Case("no window", _PROFILE, _over(call, stored))
    few = random_call(draw, "all", [(0, 61)], torch.bfloat16, dim=3)
    yield Case("fewer channels than rows of a block", _PROFILE, _over(few, stored))
    call = random_call(draw, "all", [(3, 1), (5, 2)], torch.bfloat16)
    yield Case("a bound above the lengths", _PROFILE, _over(call, stored, spare=1))


def _read_as(change: Callable[[Format], Format]) -> Callable[..., Any]:
    return lambda form, *rest: widened(change(form), *rest)


def _rows_as(dtype: torch.dtype) -> Callable[..., Any]:
    return lambda form, cache, table, seen, _: widened(form, cache, table, seen, dtype)


def _decoding(change: Callable[[dict[str, torch.Tensor]], Parts]) -> Callable[..., Any]:
    def changed(form: Format) -> Format:
        own = form.codec
        codec = replace(own, decode=lambda parts: own.decode(change(dict(parts))))
        return replace(form, codec=codec)

    return _read_as(changed)


def _wrong(name: str) -> Callable[..., Any]:
    return _read_as(lambda form: dict(wrong_readers(form))[name])


attend_wrongly(sparse_attention_fp8)
sparse_attention_fp8.wrong_step(
    widened,
    {
        **{
            name: _wrong(name)
            for name in (
                "fields in reverse order",
                "scale one exponent too small",
                "scale of the row before",
                "tile scales in reverse",
            )
        },
        "scales left out": _decoding(
            lambda parts: parts | {"scale": torch.ones_like(parts["scale"])}
        ),
        "scales without a sign": _decoding(lambda parts: parts | {"scale": parts["scale"].abs()}),
        "rows not rounded": _rows_as(torch.float32),
        "rows in fp16": _rows_as(torch.float16),
    },
)
sparse_attention_fp8.wrong_step(
    from_bytes,
    {"RoPE channels in front": lambda form, data: from_bytes(form, data).roll(form.codec.rope, 1)},
)
_MORE_ROWS = "more rows of a sequence than anybody looks at"
_WINDOW = "min(call.window - 1 + len(call.q), max_seq_len)"
sparse_attention_fp8.explain(
    TILES,
    PAIRS,
    dict.fromkeys(
        (
            f"window_rows: {_WINDOW} -> call.window - 1 + len(call.q)",
            f"window_rows: {_WINDOW} -> max_seq_len",
            f"window_rows: {_WINDOW} -> max(call.window - 1 + len(call.q), max_seq_len)",
        ),
        _MORE_ROWS,
    ),
    {
        f"window_rows: max(1, {_WINDOW}) -> {_WINDOW}": "without tokens nothing is looked at",
        "sparse_attention_fp8: cmp_cache is not None and cmp_block_table is not None -> "
        "cmp_cache is not None or cmp_block_table is not None": BOTH_OR_NEITHER,
    },
    HIDDEN_ROWS,
    SAME_BLOCKS,
    {
        "compressed_rows: 1 -> 2": _MORE_ROWS,
        "window_rows: 1 -> 2 (2)": _MORE_ROWS,
        "window_rows: call.window - 1 -> call.window": _MORE_ROWS,
        "window_rows: call.window - 1 -> call.window + 1": _MORE_ROWS,
        "window_rows: new > 0 -> new >= 0": "a sequence without tokens looks at nothing",
        "widened: 1 -> 2": "every negative index is none",
        "from_bytes: True -> False": "the lengths agree anyway",
    },
)
