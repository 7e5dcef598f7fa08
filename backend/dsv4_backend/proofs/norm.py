"""Proof of RMS normalisation (spec/v4.md 3.1): cases, oracles, named faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch

from dsv4_backend.contract import Case, Draw, compute
from dsv4_backend.ops.norm import head_rms_norm, rms_norm
from dsv4_backend.proofs.numerics import (
    Array,
    cast,
    far_from_bf16_ties,
    rms_normed,
    round_to,
    wide,
)

_DTYPES = {"ideal": torch.float32, "official": torch.bfloat16}
_SHAPES = ((0, 64), (1, 1), (1, 512), (3, 7), (5, 4096), (17, 130))


@rms_norm.oracle
def _(x: Array, weight: Array, eps: float) -> Array:
    return cast(x.dtype, rms_normed(x, weight, eps))


@head_rms_norm.oracle
def _(x: Array, eps: float) -> Array:
    """Each step is a tensor operation that rounds to x's dtype (spec 3.1)."""
    square = round_to(x.dtype, wide(x) ** 2)
    mean = round_to(x.dtype, square.sum(-1, keepdims=True) / x.shape[-1])
    root = round_to(x.dtype, 1 / np.sqrt(round_to(x.dtype, mean + eps)))
    return cast(x.dtype, wide(x) * root)


@rms_norm.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in _DTYPES.items():
        for rows, d in _SHAPES:
            yield Case(
                f"{rows}x{d}",
                profile,
                (draw.spread(rows, d, dtype=dtype), draw.normal(d, dtype=dtype), 1e-6),
            )
        tiny = draw.normal(4, 64, dtype=dtype, scale=1e-4)
        yield Case("epsilon matters", profile, (tiny, draw.normal(64, dtype=dtype), 1e-6))
        yield Case(
            "strided",
            profile,
            (draw.normal(6, 4, 48, dtype=dtype)[::2], draw.normal(48, dtype=dtype), 1e-6),
        )
        special = draw.normal(4, 16, dtype=dtype)
        special[0, 3], special[1, 5], special[2] = float("nan"), float("inf"), 0.0
        yield Case(
            "NaN, infinity, zero row", profile, (special, draw.normal(16, dtype=dtype), 1e-6)
        )
    x, weight = draw.normal(40, 96, dtype=torch.bfloat16), draw.normal(96, dtype=torch.bfloat16)
    values = rms_normed(x.float().numpy(), weight.float().numpy(), 1e-6)
    x = x[torch.tensor(list(map(far_from_bf16_ties, values)))]
    yield Case("one rounding", "official", (x, weight, 1e-6), decided=True)


rms_norm.wrong_arguments(
    {
        "epsilon left out": {"eps": 0.0},
        "weight left out": {"weight": torch.ones_like},
        "weight + 1": {"weight": lambda weight: weight + 1},
        "mean subtracted": {
            "x": lambda x: (compute(x) - compute(x).mean(-1, keepdim=True)).to(x.dtype)
        },
    }
)


@rms_norm.fault("epsilon outside the root")
def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = compute(x)
    return (wide / (wide.square().mean(-1, keepdim=True).sqrt() + eps) * compute(weight)).to(
        x.dtype
    )


@rms_norm.fault("sum instead of mean")
def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = compute(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps) * compute(weight)).to(
        x.dtype
    )


@head_rms_norm.cases
def _(draw: Draw) -> Iterator[Case]:
    for case in _head_cases(draw):
        x, eps = case.arguments
        yield case if case.profile == "ideal" else replace(case, arguments=(_on_grid(x), eps))


def _on_grid(x: torch.Tensor) -> torch.Tensor:
    """Five bits of a row's largest magnitude,
    in place: fp32 sums of 2^9 of their rounded squares are exact.
    """
    largest = x.float().abs().amax(-1, keepdim=True) if x.numel() else x.float()
    quantum = torch.exp2(largest.log2().floor() - 4)
    on_grid = (x.float() / quantum).round() * quantum
    return x.copy_(torch.where((largest > 0) & largest.isfinite(), on_grid, x.float()))


def _head_cases(draw: Draw) -> Iterator[Case]:
    for profile, dtype in _DTYPES.items():
        for tokens, heads, d in ((0, 4, 64), (1, 1, 1), (2, 3, 7), (3, 5, 512), (17, 2, 130)):
            yield Case(
                f"{tokens}x{heads}x{d}", profile, (draw.spread(tokens, heads, d, dtype=dtype), 1e-6)
            )
        yield Case(
            "epsilon matters", profile, (draw.normal(4, 2, 64, dtype=dtype, scale=1e-4), 1e-6)
        )
        yield Case("strided", profile, (draw.normal(6, 4, 96, dtype=dtype)[::2, :, ::2], 1e-6))
        special = draw.normal(4, 1, 16, dtype=dtype)
        special[0, 0, 3], special[1, 0, 5], special[2] = float("nan"), float("inf"), 0.0
        yield Case("NaN, infinity, zero row", profile, (special, 1e-6))


head_rms_norm.wrong_arguments(
    {
        "epsilon left out": {"eps": 0.0},
        "mean subtracted": {"x": lambda x: x - x.mean(-1, keepdim=True)},
    }
)


def _divided_by(root: Callable[[torch.Tensor, float], torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda x, eps: x / root(x.square(), eps)


for _name, _root in {
    "epsilon outside the root": lambda squares, eps: squares.mean(-1, True).sqrt() + eps,
    "one mean over all heads": lambda squares, eps: (squares.mean((1, 2), True) + eps).sqrt(),
    "sum instead of mean": lambda squares, eps: (squares.sum(-1, True) + eps).sqrt(),
    "root left out": lambda squares, eps: squares.mean(-1, True) + eps,
    "last channel left out of the mean": lambda q, eps: (
        q[..., :-1].sum(-1, True) / q.shape[-1] + eps
    ).sqrt(),
}.items():
    head_rms_norm.fault(_name)(_divided_by(_root))
rms_norm.equivalent(
    "rms_norm: weight.to(wide.dtype) -> weight",
    "a product with an fp32 factor is fp32 without the cast too",
)
for _mutant in (
    "compute: x.dtype == torch.float64 -> x.dtype != torch.float64",
    "compute: x.float() -> x",
    "head_rms_norm: compute(x.square()) -> x.square()",
):
    head_rms_norm.equivalent(_mutant, "torch sums bf16 in fp32, so the mean rounds once either way")
