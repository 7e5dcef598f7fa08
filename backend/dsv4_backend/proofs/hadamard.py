"""Proof of the Hadamard transform (spec/v4.md 4.5): cases, oracle, named faults."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dsv4_backend.contract import Case, Draw
from dsv4_backend.ops.hadamard import hadamard, sylvester
from dsv4_backend.proofs.numerics import Array, cast, hadamard_signs, wide

_DTYPES = {"ideal": torch.float32, "official": torch.bfloat16}


@hadamard.oracle
def _(x: Array) -> Array:
    n = x.shape[-1]
    signs = hadamard_signs(n)
    return cast(x.dtype, np.einsum("ij,...j->...i", signs, wide(x)) / np.sqrt(n))


@hadamard.cases
def _(draw: Draw) -> Iterator[Case]:
    for case in _drawn_cases(draw):
        (x,) = case.arguments
        yield case if case.profile == "ideal" else replace(case, arguments=(_on_grid(x),))


def _on_grid(x: torch.Tensor) -> torch.Tensor:
    """The nearest multiples of 2^-8, in place: fp32 sums of 2^9 of them below 2^7 are exact."""
    return x.mul_(256).round_().div_(256)


def _drawn_cases(draw: Draw) -> Iterator[Case]:
    for profile, dtype in _DTYPES.items():
        for shape in ((0, 128), (1, 1), (3, 2), (5, 16), (7, 128), (2, 64, 128), (2, 512)):
            yield Case("x".join(map(str, shape)), profile, (draw.normal(*shape, dtype=dtype),))
        yield Case("strided rows and channels", profile, (draw.normal(128, 6, dtype=dtype).T[::2],))
        special = draw.normal(4, 128, dtype=dtype)
        special[0, 3], special[1, 5], special[2] = torch.nan, torch.inf, 0.0
        yield Case("NaN, infinity, zero row", profile, (special,))
        large = draw.normal(3, 128, dtype=dtype, scale=2.0**-10) + 1
        yield Case("first coefficient alone", profile, (large,))
        for n in (1, 4):
            yield Case(f"-0 in {n} channels", profile, (torch.full((2, n), -0.0, dtype=dtype),))


def _halves(a: Any, y: torch.Tensor) -> torch.Tensor:
    if y.shape[-1] == 1:
        return y
    return torch.cat([hadamard.reference(half) for half in a.x.chunk(2, -1)], -1)


def _bit_reversed(n: int) -> list[int]:
    return [int(f"{i:0{n.bit_length() - 1}b}"[::-1], 2) for i in range(n)]


def _changes(x: torch.Tensor) -> torch.Tensor:
    return (sylvester(x).diff(dim=0) != 0).sum(0)


hadamard.wrong_results(
    {
        "bit-reversed order": lambda a, y: y[..., _bit_reversed(y.shape[-1])],
        "sequency (Walsh) order": lambda a, y: y[..., _changes(a.x).argsort()],
        "last butterfly left out": _halves,
        "left out": lambda a, y: a.x.clone(),
    }
)
hadamard.wrong_steps(
    {
        "not normalised": {sylvester: lambda x: sylvester(x) * x.shape[-1] ** 0.5},
        "divided by n instead of its root": {
            sylvester: lambda x: sylvester(x) * x.shape[-1] ** -0.5
        },
    }
)
hadamard.wrong_arguments(
    {
        "random signs before the transform": {
            "x": lambda x: x * (1 - 2 * (torch.arange(x.shape[-1]) * 5 // 3 % 2)).to(x.dtype)
        }
    }
)


@hadamard.fault("every butterfly rounded to bf16")
def _(x: torch.Tensor) -> torch.Tensor:
    y, scale = x.bfloat16(), float(x.shape[-1] ** -0.5)
    width = 1
    while width < x.shape[-1]:
        pair = y.reshape(-1, x.shape[-1] // (2 * width), 2, width)
        y = torch.stack([pair[:, :, 0] + pair[:, :, 1], pair[:, :, 0] - pair[:, :, 1]], 2)
        width *= 2
    return (y.reshape(x.shape).float() * scale).to(x.dtype)


hadamard.equivalent("sylvester: 0 -> 1", "the matrix is square")
