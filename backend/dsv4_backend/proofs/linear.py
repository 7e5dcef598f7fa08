"""Proof of products with float weights (spec/v4.md 2.1, 4.2): cases, oracles, named faults."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from dsv4_backend.contract import Case, Draw
from dsv4_backend.ops.linear import linear, linear_pair
from dsv4_backend.proofs.gemm import spread_weight
from dsv4_backend.proofs.numerics import Array, cast, wide
from dsv4_backend.proofs.rounding_rows import WHOLE, whole

_DTYPES = {"ideal": torch.float32, "official": torch.bfloat16}


def _product(x: Array, weight: Array) -> Array:
    """Channel after channel of K."""
    total = np.zeros((x.shape[0], weight.shape[0]))
    for k in range(x.shape[1]):
        total += wide(x[:, k, None]) * wide(weight[None, :, k])
    return cast(x.dtype, total)


linear.oracle(_product)


@linear.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in _DTYPES.items():
        for t, n, k in ((0, 8, 16), (1, 1, 1), (1, 96, 256), (3, 5, 9), (6, 33, 130)):
            x = draw.normal(t, k, dtype=dtype)
            yield Case(f"{t}x{n}x{k}", profile, (x, spread_weight(draw, n, k).to(dtype)))
        x = draw.normal(12, 40, dtype=dtype)[::2, ::2]
        weight = spread_weight(draw, 20, 24).to(dtype).T
        yield Case("strided", profile, (x, weight))
        x = x.clone()
        x[1, 3], x[2, 0] = torch.nan, torch.inf
        yield Case("NaN and infinity", profile, (x, weight.contiguous()))
    narrow = spread_weight(draw, 11, 64).bfloat16()
    yield Case("fp32 rows, bf16 weight", "ideal", (draw.normal(4, 64), narrow))
    wider = spread_weight(draw, 9, 48)
    yield Case("bf16 rows, fp32 weight", "official", (draw.normal(4, 48).bfloat16(), wider))
    yield Case("fp64 rows", "ideal", (draw.normal(3, 48).double(), wider))
    yield Case(WHOLE, "official", (whole(draw, 5, 96), whole(draw, 48, 96)), decided=True)


linear.wrong_arguments(
    {
        "last channel left out": {
            "x": lambda x: torch.cat([x[:, :-1], torch.zeros_like(x[:, -1:])], 1)
        },
        "rows of the next token": {"x": lambda x: x.roll(1, 0)},
        "first row of the weight for all": {"weight": lambda w: w[:1].expand_as(w)},
        "last rows of the weight repeated": {"weight": lambda w: torch.cat([w[1:], w[-1:]])},
        "activations rounded to fp8": {"x": lambda x: x.to(torch.float8_e4m3fn).to(x.dtype)},
        "weight rounded to fp8": {"weight": lambda w: w.to(torch.float8_e4m3fn).to(w.dtype)},
    }
)


@linear_pair.oracle
def _(x: Array, first: Array, second: Array) -> tuple[Array, Array]:
    return _product(x, first), _product(x, second)


@linear_pair.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in _DTYPES.items():
        for t, n, p, k in (
            (0, 8, 4, 16),
            (1, 1, 1, 1),
            (1, 96, 32, 256),
            (3, 5, 7, 9),
            (6, 32, 32, 130),
        ):
            x, weights = draw.normal(t, k, dtype=dtype), [spread_weight(draw, m, k) for m in (n, p)]
            yield Case(f"{t}x{k} to {n}, {p}", profile, (x, *(w.to(dtype) for w in weights)))
        x = draw.normal(12, 40, dtype=dtype)[::2, ::2]
        first, second = (spread_weight(draw, 20, m).to(dtype).T for m in (24, 8))
        yield Case("strided", profile, (x, first, second))
        x = x.clone()
        x[1, 3], x[2, 0] = torch.nan, torch.inf
        yield Case("NaN and infinity", profile, (x, first, second))
    rows = tuple(whole(draw, n, 96) for n in (5, 40, 24))
    yield Case(WHOLE, "official", rows, decided=True)


linear_pair.wrong_arguments(
    {
        "weights swapped": lambda a: a._replace(first=a.second, second=a.first),
        "last channel left out": {
            "x": lambda x: torch.cat([x[:, :-1], torch.zeros_like(x[:, -1:])], 1)
        },
        "rows of the next token": {"x": lambda x: x.roll(1, 0)},
        "last rows of the second repeated": {"second": lambda w: torch.cat([w[:-1], w[:1]])},
        "first weight's first row for all": {"first": lambda w: w[:1].expand_as(w)},
        "activations rounded to fp8": {"x": lambda x: x.to(torch.float8_e4m3fn).to(x.dtype)},
        "first weight rounded to fp8": {"first": lambda w: w.to(torch.float8_e4m3fn).to(w.dtype)},
    }
)
linear_pair.explain(
    dict.fromkeys(
        (
            "compute: x.float() -> x",
            "linear_pair: compute(x) -> x",
            "compute: x.dtype == torch.float64 -> x.dtype != torch.float64",
        ),
        "torch's product of bf16 sums in fp32 and rounds once too",
    )
)
