"""Proof of partial interleaved RoPE (spec/v4.md 3.3): cases, oracle, named faults."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from dsv4_backend.contract import Case, Draw
from dsv4_backend.ops.rope import (
    apply_rope,
    rope,
    rope_frequencies,
    rotate_tail,
    rotation_angles,
    rotation_rows,
    yarn_frequencies,
)
from dsv4_backend.proofs.numerics import Array, cast, far_from_bf16_ties, wide

_DTYPES = {"ideal": torch.float32, "official": torch.bfloat16}


@rope.oracle
def _(x: Array, positions: Array, inv_freq: Array, inverse: bool = False) -> Array:
    """Pairs as complex numbers, turned by exp(i a); `a` is the one product in fp32 (spec 3.3)."""
    angles = wide(positions.astype(np.float32)[:, None] * inv_freq.astype(np.float32))
    turns = np.exp((-1j if inverse else 1j) * angles)
    turns = np.expand_dims(turns, tuple(range(1, x.ndim - 1)))
    first = x.shape[-1] - 2 * inv_freq.shape[0]
    turned = (wide(x[..., first::2]) + 1j * wide(x[..., first + 1 :: 2])) * turns
    y = x.copy()
    y[..., first::2] = cast(x.dtype, turned.real)
    y[..., first + 1 :: 2] = cast(x.dtype, turned.imag)
    return y


@rope.cases
def _(draw: Draw) -> Iterator[Case]:
    plain = rope_frequencies(64, 10000.0)
    yarn = yarn_frequencies(64, 160000.0, 16.0, 65536, 32.0, 1.0)
    for profile, dtype in _DTYPES.items():
        for shape, frequencies in (
            ((0, 2, 128), plain),
            ((1, 2), plain[:1]),
            ((5, 64), plain),
            ((3, 3, 512), yarn),
            ((7, 2, 3, 13), yarn[16:21]),
        ):
            for inverse in (False, True):
                positions = draw.integers(shape[0], high=4096, dtype=torch.int64)
                name = f"{'x'.join(map(str, shape))}{' inverse' if inverse else ''}"
                yield Case(
                    name,
                    profile,
                    (draw.normal(*shape, dtype=dtype), positions, frequencies, inverse),
                )
        far = torch.tensor([0, 1, 2, 65535, 65536, 999_983, 1_048_575], dtype=torch.int32)
        yield Case("long context", profile, (draw.normal(7, 2, 70, dtype=dtype), far, yarn, False))
        x = draw.normal(8, 2, 160, dtype=dtype)[::2, :, ::2]
        yield Case("strided", profile, (x, draw.integers(8, high=300)[::2], yarn, True))
        special = draw.normal(3, 8, dtype=dtype)
        special[0, 7], special[1, 0], special[2] = float("nan"), float("inf"), 0.0
        yield Case(
            "NaN, infinity, zero row",
            profile,
            (special, draw.integers(3, high=9), plain[:2], False),
        )
    positions = draw.integers(6, high=4096)
    for inverse in (False, True):
        x = _decided_rows(draw, positions, plain[:6], inverse)
        name = f"each rounding{' inverse' if inverse else ''}"
        yield Case(name, "official", (x, positions, plain[:6], inverse), decided=True)


def _decided_rows(
    draw: Draw, positions: torch.Tensor, frequencies: torch.Tensor, inverse: bool
) -> torch.Tensor:
    """bf16 [T, 2, 16] whose turned values lie where no fp32 arithmetic rounds them otherwise."""
    rows = []
    for position in positions.split(1):
        row = None
        while row is None or not far_from_bf16_ties(
            rope.golden(row.double().numpy(), position.numpy(), frequencies.numpy(), inverse)
        ):
            row = draw.normal(1, 2, 16, dtype=torch.bfloat16)
        rows.append(row)
    return torch.cat(rows)


rope.wrong_arguments(
    {
        "direction ignored": {"inverse": False},
        "position off by one": {"positions": lambda positions: positions + 1},
        "position of the first token for all": {"positions": lambda p: p[:1].expand_as(p)},
        "frequencies inverted": {"inv_freq": lambda frequencies: 1 / frequencies},
    }
)


def _by_rounded_turns(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    pairs = angles.shape[-1]
    angles = angles.view(x.shape[0], *(1 for _ in x.shape[1:-1]), pairs)
    cos, sin = angles.cos().bfloat16().float(), angles.sin().bfloat16().float()
    even, odd = x[..., x.shape[-1] - 2 * pairs :].float().unflatten(-1, (pairs, 2)).unbind(-1)
    rotated = (
        torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)
    )
    return torch.cat((x[..., : x.shape[-1] - 2 * pairs], rotated), -1)


def _by_halves(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    kept, pairs = x.shape[-1] - 2 * angles.shape[-1], angles.shape[-1]
    pair_of = torch.arange(2 * pairs).view(2, pairs).mT.flatten()
    order = torch.cat((torch.arange(kept), kept + pair_of))
    return rotate_tail(x[..., order], angles)[..., order.argsort()]


def _at_the_front(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    kept = x.shape[-1] - 2 * angles.shape[-1]
    return rotate_tail(x.roll(kept, -1), angles).roll(-kept, -1)


def _magnified(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    kept, y = x.shape[-1] - 2 * angles.shape[-1], rotate_tail(x, angles)
    return torch.cat((y[..., :kept], y[..., kept:] * (0.1 * math.log(16.0) + 1)), -1)


rope.wrong_steps(
    {
        "halves instead of adjacent pairs": {rotate_tail: _by_halves},
        "first channels rotated": {rotate_tail: _at_the_front},
        "angle in fp64": {
            rotation_angles: lambda positions, inv_freq: (
                positions.double()[:, None] * inv_freq.double()
            ),
            rotate_tail: lambda x, angles: rotate_tail(x.double(), angles).to(x.dtype),
        },
        "cos and sin rounded to bf16": {rotate_tail: _by_rounded_turns},
        "YaRN magnitude applied": {rotate_tail: _magnified},
    }
)
rope.equivalent("rotation_angles: inv_freq.float() -> inv_freq", "the table is fp32")
rope.equivalent(
    "rotation_angles: positions.float() -> positions", "the product rounds them to fp32"
)
rope.equivalent("rotate_tail: angles.to(wide.dtype) -> angles", "both are fp32")


@apply_rope.oracle
def _(x: Array, cos: Array, sin: Array) -> None:
    """Pair by pair, each channel with the cosine and sine that stand at its own place."""
    first = x.shape[-1] - cos.shape[1]
    c, s = (np.expand_dims(wide(a), tuple(range(1, x.ndim - 1))) for a in (cos, sin))
    even, odd = wide(x[..., first::2]), wide(x[..., first + 1 :: 2])
    x[..., first::2] = cast(x.dtype, even * c[..., 0::2] - odd * s[..., 0::2])
    x[..., first + 1 :: 2] = cast(x.dtype, odd * c[..., 1::2] + even * s[..., 1::2])


@apply_rope.cases
def _(draw: Draw) -> Iterator[Case]:
    plain = rope_frequencies(64, 10000.0)
    for profile, dtype in _DTYPES.items():
        for shape, frequencies in (
            ((0, 2, 128), plain),
            ((1, 2), plain[:1]),
            ((5, 64), plain),
            ((3, 3, 512), plain),
            ((4, 1, 128), plain),
            ((7, 2, 3, 13), plain[16:21]),
        ):
            positions = draw.integers(shape[0], high=1_000_000, dtype=torch.int64)
            rows = rotation_rows(positions, frequencies)
            name = "x".join(map(str, shape))
            yield Case(name, profile, (draw.normal(*shape, dtype=dtype), *rows))
        x = draw.normal(8, 2, 160, dtype=dtype)[::2, :, ::2]
        any_rows = draw.normal(8, 20)[::2, ::2], draw.normal(4, 10)
        yield Case("strided, any rows", profile, (x, *any_rows))
        special = draw.normal(3, 8, dtype=dtype)
        special[0, 7], special[1, 0], special[2] = float("nan"), float("inf"), 0.0
        rows = rotation_rows(draw.integers(3, high=9), plain[:2])
        yield Case("NaN, infinity, zero row", profile, (special, *rows))
    positions = draw.integers(6, high=4096)
    x = _decided_rows(draw, positions, plain[:6], inverse=False)
    arguments = (x, *rotation_rows(positions, plain[:6]))
    yield Case("each rounding", "official", arguments, decided=True)


def _both(edit: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, object]:
    return {"cos": edit, "sin": edit}


apply_rope.wrong_arguments(
    {
        "rotated back": {"sin": lambda sin: -sin},
        "sine left out": {"sin": torch.zeros_like},
        "cosine left out": {"cos": torch.zeros_like},
        "cos and sin swapped": lambda a: a._replace(cos=a.sin, sin=a.cos),
        "rows of the next token": _both(lambda rows: rows.roll(-1, 0)),
        "row of the first token for all": _both(lambda rows: rows[:1].expand_as(rows)),
        "rows of the next channel": _both(lambda rows: rows.roll(1, -1)),
        "rows rounded to bf16": _both(lambda rows: rows.bfloat16().float()),
        "one value for all pairs": _both(lambda rows: rows[:, :1].expand_as(rows)),
    }
)
apply_rope.explain(
    dict.fromkeys(
        (
            "compute: x.float() -> x",
            "apply_rope: compute(tail) -> tail",
            "compute: x.dtype == torch.float64 -> x.dtype != torch.float64",
        ),
        "a product with fp32 rows is fp32 without the cast too",
    ),
    {
        "apply_rope: (wide * cos + turned * sin).to(x.dtype) -> wide * cos + turned * sin": (
            "copying into x casts alike"
        )
    },
)
