"""Proof of the input of the MTP block (spec/v4.md 8.1): cases, oracles, named faults."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dsv4_backend.contract import Case, Draw, compute
from dsv4_backend.ops.mtp import mtp_combine
from dsv4_backend.proofs.numerics import Array, cast, wide


@mtp_combine.oracle
def _(e: Array, x: Array) -> Array:
    result = wide(x)
    for stream in range(x.shape[1]):
        result[:, stream] += wide(e)
    return cast(x.dtype, result)


_DTYPES = {"ideal": torch.float32, "official": torch.bfloat16}
_SHAPES = ((0, 4, 64), (1, 1, 1), (3, 2, 7), (5, 4, 130), (2, 4, 1024))


@mtp_combine.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in _DTYPES.items():
        for tokens, n, d in _SHAPES:
            rows = draw.spread(tokens, d, dtype=dtype), draw.normal(tokens, n, d, dtype=dtype)
            yield Case(f"{tokens}x{n}x{d}", profile, rows)
        strided = draw.normal(4, 96, dtype=dtype)[:, ::2], draw.normal(8, 4, 48, dtype=dtype)[::2]
        yield Case("strided", profile, strided)
        e, x = draw.normal(3, 16, dtype=dtype), draw.normal(3, 2, 16, dtype=dtype)
        e[0, 3], x[1, 1, 2], e[2], x[2] = float("nan"), float("inf"), 0.0, 0.0
        yield Case("NaN, infinity, zero row", profile, (e, x))
    x = draw.normal(3, 2, 64).double() * 1.1
    yield Case("fp64", "ideal", (draw.normal(3, 64).double(), x))
    yield Case("fp64, what fp32 cannot hold is left", "ideal", (-x[:, 0].float().double(), x))


mtp_combine.wrong_arguments(
    {
        "embedding left out": {"e": torch.zeros_like},
        "hidden streams left out": {"x": torch.zeros_like},
        "first stream for all": {"x": lambda x: x[:, :1].expand_as(x)},
        "mean of the streams": {"x": lambda x: x.mean(1, keepdim=True).expand_as(x)},
        "embedding of the previous token": {"e": lambda e: e.roll(1, 0)},
        "channels of the embedding shifted": {"e": lambda e: e.roll(1, 1)},
    }
)
mtp_combine.wrong_results(
    {
        "embedding added to the first stream only": lambda a, y: torch.cat(
            (y[:, :1], a.x[:, 1:]), 1
        ),
        "sum rounded to bf16 for fp32 rows": lambda a, y: y.bfloat16().to(y.dtype),
    }
)


@mtp_combine.fault("sum cut off, not rounded, to bf16")
def _(e: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    total = compute(e).unsqueeze(1) + compute(x)
    if x.dtype != torch.bfloat16:
        return total
    return (total.view(torch.int32) & -65536).view(torch.float32).bfloat16()


for _name in (
    "compute: x.float() -> x",
    "mtp_combine: compute(x) -> x",
    "mtp_combine: compute(e) -> e",
):
    mtp_combine.equivalent(_name, "torch adds two bf16 numbers as fp32 ones, and rounds once")
