"""Proof of norms and rotations before the caches (spec/v4.md 4.2): cases, oracle, named faults."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from dsv4_backend.contract import Case, Draw
from dsv4_backend.ops.norm import rms_norm
from dsv4_backend.ops.qkv_norm_rope import norm_rope, qkv_norm_rope
from dsv4_backend.ops.rope import apply_rope, rope_frequencies, rotation_rows
from dsv4_backend.proofs.bounds import BOTH_OR_NEITHER
from dsv4_backend.proofs.numerics import (
    BF16,
    Array,
    cast,
    far_from_bf16_ties,
    rms_normed,
    round_to,
    wide,
)

_DTYPES = {"ideal": torch.float32, "official": torch.bfloat16}


def turned(x: Array, cos: Array, sin: Array) -> Array:
    """float64: the last channels of rows [N, .., D] as complex numbers, turned by [N, r]."""
    first = x.shape[-1] - cos.shape[1]
    turns = np.expand_dims(wide(cos[:, ::2]) + 1j * wide(sin[:, ::2]), tuple(range(1, x.ndim - 1)))
    numbers = (x[..., first::2] + 1j * x[..., first + 1 :: 2]) * turns
    y = x.copy()
    y[..., first::2], y[..., first + 1 :: 2] = numbers.real, numbers.imag
    return y


@qkv_norm_rope.oracle
def _(
    q: Array,
    kv: Array,
    entries: Array | None,
    q_weight: Array,
    kv_weight: Array,
    entry_weight: Array | None,
    eps: float,
    cos: Array,
    sin: Array,
    entry_cos: Array | None,
    entry_sin: Array | None,
) -> tuple[Array, Array, Array]:
    def one(x: Array, weight: Array, cos: Array, sin: Array) -> Array:
        return cast(x.dtype, turned(round_to(x.dtype, rms_normed(x, weight, eps)), cos, sin))

    queries, keys = one(q, q_weight, cos, sin), one(kv, kv_weight, cos, sin)
    if entries is None or entry_weight is None or entry_cos is None or entry_sin is None:
        return queries, keys, kv[:0]
    return queries, keys, one(entries, entry_weight, entry_cos, entry_sin)


def _turns(draw: Draw, rows: int, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    positions = draw.integers(rows, high=1_000_000, dtype=torch.int64)
    return rotation_rows(positions, rope_frequencies(channels, 10000.0))


class _Side(NamedTuple):
    """What rows of one kind are normed and turned by."""

    weight: torch.Tensor
    eps: float
    cos: torch.Tensor
    sin: torch.Tensor

    def decides(self, row: torch.Tensor, at: int) -> bool:
        """Whether sums of fp32 in any order give every bf16 value of a row [D]."""
        length = rms_normed(row[None].float().numpy(), self.weight.numpy(), self.eps)
        turns = self.cos[at : at + 1].numpy(), self.sin[at : at + 1].numpy()
        return far_from_bf16_ties(length) and far_from_bf16_ties(
            turned(round_to(BF16, length), *turns)
        )

    def rows(self, draw: Draw, dtype: torch.dtype, each: int, scale: float) -> torch.Tensor:
        """[N * each, D]: `each` rows for every row of cosines."""
        rows = torch.zeros(0, len(self.weight), dtype=dtype)
        while len(rows) < len(self.cos) * each:
            row = draw.spread(1, len(self.weight), dtype=dtype) * scale
            if dtype == torch.float32 or self.decides(row[0], len(rows) // each):
                rows = torch.cat([rows, row])
        return rows


def _drawn(
    draw: Draw, dtype: torch.dtype, sizes: tuple[int, ...], eps: float = 1e-6, scale: float = 1.0
) -> tuple[Any, ...]:
    """Arguments of (tokens, heads, channels, of which RoPE, entries, -1 for None)."""
    t, h, d, r, m = sizes
    of_tokens, of_entries = _turns(draw, t, r), _turns(draw, max(m, 0), r)
    turns = of_tokens, of_tokens, of_entries
    sides = [_Side(1 + 0.3 * draw.normal(d), eps, *turn) for turn in turns]
    q, kv, entries = (
        side.rows(draw, dtype, each, scale) for side, each in zip(sides, (h, 1, 1), strict=True)
    )
    weights = [side.weight for side in sides]
    if m < 0:
        return q.view(t, h, d), kv, None, *weights[:2], None, eps, *of_tokens, None, None
    return q.view(t, h, d), kv, entries, *weights, eps, *of_tokens, *of_entries


@qkv_norm_rope.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in _DTYPES.items():
        for sizes in (
            (0, 2, 8, 4, -1),
            (0, 2, 8, 4, 0),
            (1, 1, 2, 2, 1),
            (1, 4, 512, 64, 1),
            (3, 3, 34, 10, 2),
            (5, 2, 64, 64, -1),
            (4, 8, 130, 64, 3),
            (1, 16, 512, 64, 0),
        ):
            name = "{} tokens, {} heads of {} ({} turned), {} entries".format(*sizes)
            yield Case(name, profile, _drawn(draw, dtype, sizes))
        q, kv, entries, *rest = _drawn(draw, dtype, (4, 3, 16, 8, 3))
        strided = [torch.stack([x, x], -1)[..., 0] for x in (q, kv, entries)]
        yield Case("strided", profile, (*strided, *rest))
        tiny = _drawn(draw, dtype, (4, 3, 16, 8, 3), 1e-3, 2.0**-9)
        yield Case("epsilon matters", profile, tiny)
        special = [x.clone() for x in (q, kv, entries)]
        special[0][0, 1, 3], special[1][2, 0], special[2][1, 1] = (torch.nan,) * 3
        yield Case("NaN", profile, (*special, *rest))


_WEIGHTS = ("q_weight", "kv_weight", "entry_weight")
_SINES = ("sin", "entry_sin")


qkv_norm_rope.wrong_arguments(
    {
        "epsilon left out": {"eps": 0.0},
        **{f"{name} left out": {name: torch.ones_like} for name in _WEIGHTS},
        **{f"{name} turned back": {name: torch.neg} for name in _SINES},
        "rows of the next token": dict.fromkeys(("cos", "sin"), lambda rows: rows.roll(-1, 0)),
        "rows of the next entry": dict.fromkeys(
            ("entry_cos", "entry_sin"), lambda rows: rows.roll(-1, 0)
        ),
        "rows rounded to bf16": dict.fromkeys(
            ("cos", "sin"), lambda rows: (rows * 1.02).bfloat16().float()
        ),
        "weights of queries and keys swapped": lambda a: a._replace(
            q_weight=a.kv_weight, kv_weight=a.q_weight
        ),
    }
)


def _by_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    tail = x[..., x.shape[-1] - cos.shape[-1] :]
    order = torch.arange(tail.shape[-1]).view(2, -1).mT.flatten()
    mixed = tail[..., order].clone()
    apply_rope.reference(mixed, cos, sin)
    tail.copy_(mixed[..., order.argsort()])


def _unnormed(
    x: torch.Tensor, weight: torch.Tensor, eps: float, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    return (
        norm_rope(x, weight, 1e6, cos, sin) if x.dim() == 2 else norm_rope(x, weight, eps, cos, sin)
    )


def _turned_first(
    x: torch.Tensor, weight: torch.Tensor, eps: float, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    rows = x.clone()
    apply_rope.reference(rows, cos, sin)
    return rms_norm.reference(rows, weight, eps)


qkv_norm_rope.wrong_steps(
    {
        "halves instead of adjacent pairs": {apply_rope.reference: _by_halves},
        "keys not normed": {norm_rope: _unnormed},
        "turned before the norm": {norm_rope: _turned_first},
    }
)
qkv_norm_rope.equivalent(
    "qkv_norm_rope: entries is None or entry_weight is None or entry_cos is None or (entry_sin is "
    "None) -> entries is None and entry_weight is None and (entry_cos is None) and (entry_sin is "
    "None)",
    BOTH_OR_NEITHER,
)
qkv_norm_rope.explain(
    dict.fromkeys(
        (
            "rms_norm: weight.to(wide.dtype) -> weight",
            "apply_rope: compute(tail) -> tail",
        ),
        "a product with an fp32 factor is fp32 without the cast too",
    ),
    {
        "apply_rope: (wide * cos + turned * sin).to(x.dtype) -> wide * cos + turned * sin": (
            "copying into x casts alike"
        )
    },
)
