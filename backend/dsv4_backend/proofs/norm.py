"""Proof of RMS normalisation (spec/v4.md 3.1): cases, oracles, named faults."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from dsv4_backend.contract import Case, Draw, compute
from dsv4_backend.mutants import add_output_faults
from dsv4_backend.ops.norm import head_rms_norm, rms_norm
from dsv4_backend.proofs.numerics import Array, cast, round_to, wide

_DTYPES = {"ideal": torch.float32, "official": torch.bfloat16}
_SHAPES = ((0, 64), (1, 1), (1, 512), (3, 7), (5, 4096), (17, 130))


@rms_norm.oracle
def _(x: Array, weight: Array, eps: float) -> Array:
    channels = x.shape[-1]
    length = np.sqrt(np.einsum("...d,...d->...", wide(x), wide(x)) / channels + eps)
    return cast(x.dtype, wide(weight) * wide(x) / length[..., None])


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
            yield Case(f"{rows}x{d}", profile, (draw.spread(rows, d, dtype=dtype), draw.normal(d, dtype=dtype), 1e-6))
        tiny = draw.normal(4, 64, dtype=dtype, scale=1e-4)
        yield Case("epsilon matters", profile, (tiny, draw.normal(64, dtype=dtype), 1e-6))
        yield Case("strided", profile, (draw.normal(6, 4, 48, dtype=dtype)[::2], draw.normal(48, dtype=dtype), 1e-6))
        special = draw.normal(4, 16, dtype=dtype)
        special[0, 3], special[1, 5], special[2] = float("nan"), float("inf"), 0.0
        yield Case("NaN, infinity, zero row", profile, (special, draw.normal(16, dtype=dtype), 1e-6))


add_output_faults(rms_norm, "last token zero", "stale tail of channels", "one NaN", "tokens shifted by one")


@rms_norm.fault("epsilon left out")
def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return rms_norm.reference(x, weight, 0.0)


@rms_norm.fault("epsilon outside the root")
def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = compute(x)
    return (wide / (wide.square().mean(-1, keepdim=True).sqrt() + eps) * compute(weight)).to(x.dtype)


@rms_norm.fault("weight left out")
def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return rms_norm.reference(x, torch.ones_like(weight), eps)


@rms_norm.fault("weight + 1")
def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return rms_norm.reference(x, weight + 1, eps)


@rms_norm.fault("sum instead of mean")
def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = compute(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps) * compute(weight)).to(x.dtype)


@rms_norm.fault("mean subtracted")
def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = compute(x)
    return rms_norm.reference((wide - wide.mean(-1, keepdim=True)).to(x.dtype), weight, eps)


@head_rms_norm.cases
def _(draw: Draw) -> Iterator[Case]:
    for case in _head_cases(draw):
        x, eps = case.arguments
        yield case if case.profile == "ideal" else replace(case, arguments=(_on_grid(x), eps))


def _on_grid(x: torch.Tensor) -> torch.Tensor:
    """Five bits of a row's largest magnitude, in place: fp32 sums of 2^9 of their rounded squares are exact."""
    largest = x.float().abs().amax(-1, keepdim=True) if x.numel() else x.float()
    quantum = torch.exp2(largest.log2().floor() - 4)
    on_grid = (x.float() / quantum).round() * quantum
    return x.copy_(torch.where((largest > 0) & largest.isfinite(), on_grid, x.float()))


def _head_cases(draw: Draw) -> Iterator[Case]:
    for profile, dtype in _DTYPES.items():
        for tokens, heads, d in ((0, 4, 64), (1, 1, 1), (2, 3, 7), (3, 5, 512), (17, 2, 130)):
            yield Case(f"{tokens}x{heads}x{d}", profile, (draw.spread(tokens, heads, d, dtype=dtype), 1e-6))
        yield Case("epsilon matters", profile, (draw.normal(4, 2, 64, dtype=dtype, scale=1e-4), 1e-6))
        yield Case("strided", profile, (draw.normal(6, 4, 96, dtype=dtype)[::2, :, ::2], 1e-6))
        special = draw.normal(4, 1, 16, dtype=dtype)
        special[0, 0, 3], special[1, 0, 5], special[2] = float("nan"), float("inf"), 0.0
        yield Case("NaN, infinity, zero row", profile, (special, 1e-6))


add_output_faults(head_rms_norm, "last token zero", "stale tail of channels", "one NaN", "tokens shifted by one")


@head_rms_norm.fault("epsilon left out")
def _(x: torch.Tensor, eps: float) -> torch.Tensor:
    return head_rms_norm.reference(x, 0.0)


@head_rms_norm.fault("epsilon outside the root")
def _(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True).sqrt() + eps)


@head_rms_norm.fault("one mean over all heads")
def _(x: torch.Tensor, eps: float) -> torch.Tensor:
    return head_rms_norm.reference(x.flatten(1), eps).view(x.shape)


@head_rms_norm.fault("sum instead of mean")
def _(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


@head_rms_norm.fault("mean subtracted")
def _(x: torch.Tensor, eps: float) -> torch.Tensor:
    return head_rms_norm.reference(x - x.mean(-1, keepdim=True), eps)


@head_rms_norm.fault("root left out")
def _(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps)


@head_rms_norm.fault("last channel left out of the mean")
def _(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x[..., :-1].square().sum(-1, keepdim=True) / x.shape[-1] + eps)


rms_norm.equivalent(
    "rms_norm: weight.to(wide.dtype) -> weight", "a product with an fp32 factor is fp32 without the cast too"
)
for _mutant in (
    "compute: x.dtype == torch.float64 -> x.dtype != torch.float64",
    "compute: x.float() -> x",
    "head_rms_norm: compute(x.square()) -> x.square()",
):
    head_rms_norm.equivalent(_mutant, "torch sums bf16 in fp32, so the mean rounds once either way")
