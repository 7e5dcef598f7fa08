"""Proof of hyper-connections in HF32 (spec/deployments.md 5): cases, oracles, named faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from dsv4_backend.contract import DEPLOYMENTS, Case, Draw
from dsv4_backend.ops.hyper import _mixes, hc_head, hc_pre
from dsv4_backend.ops.hyper_hf32 import cut_to_hf32, hc_head_hf32, hc_pre_hf32
from dsv4_backend.proofs.hyper import HALVES, halves
from dsv4_backend.proofs.numerics import Array

Mixers = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Inputs = tuple[str, torch.Tensor, Mixers, float, float]
_SETTINGS = 1e-6, 1e-6
_DROPPED_BITS = 13
_SHAPES = ((0, 4, 64), (1, 1, 1), (3, 2, 7), (5, 4, 33), (2, 4, 4096))


def _ten_bits(fn: Array) -> Array:
    """Toward zero to 1 + 10 bits of significand; fp32 values arrive widened to float64."""
    significand, exponent = np.frexp(fn)
    cut: Array = np.ldexp(np.trunc(significand * 2**11) / 2**11, exponent)
    return cut


@hc_pre_hf32.oracle
def _(x: Array, fn: Array, *rest: Any) -> Any:
    return hc_pre.golden(x, _ten_bits(fn), *rest)


@hc_head_hf32.oracle
def _(x: Array, fn: Array, *rest: Any) -> Any:
    return hc_head.golden(x, _ten_bits(fn), *rest)


def _coarse(draw: Draw, rows: int, channels: int) -> torch.Tensor:
    """Weights of one sign just below a step of HF32: what the cut takes adds up."""
    steps = cut_to_hf32(draw.normal(rows, channels, scale=channels**-0.5).abs())
    return (steps.view(torch.int32) + (1 << _DROPPED_BITS) - 1).view(torch.float32)


def _mixers(draw: Draw, x: torch.Tensor, rows: int, scales: int) -> Mixers:
    """Weights fn, base and scale whose logits are near 0 and steep in fn, but less than fp32 sums
    of that many channels are exact.
    """
    steep = 20 / (1 + x[0].numel() ** 0.5 / 32) if x.numel() else 20
    scale = torch.full((scales,), float(steep)) + draw.normal(scales)
    if not x.numel():
        return draw.normal(rows, x.shape[1] * x.shape[2]), draw.normal(rows), scale
    fn = _coarse(draw, rows, x[0].numel())
    middle = _mixes(x, fn, _SETTINGS[0]).mean(0)
    return fn, draw.normal(rows) - steep * middle, scale


def _inputs(draw: Draw, rows: Callable[[int], int], scales: int) -> Iterator[Inputs]:
    """(name, x, weights, eps of the norm, eps of the mix) of cases of both operators."""
    for tokens, n, d in _SHAPES:
        x = _streams(draw, tokens, n, d)
        yield f"{tokens}x{n}x{d}", x, _mixers(draw, x, rows(n), scales), *_SETTINGS
    x = _streams(draw, 4, 4, 24)
    yield "large hc_eps", x, _mixers(draw, x, rows(4), scales), 1e-6, 0.03
    x = x * 2**-10
    yield "norm epsilon matters", x, _mixers(draw, x, rows(4), scales), *_SETTINGS
    x = draw.normal(8, 4, 64, dtype=torch.float16)[::2, :, ::2]
    weights = draw.normal(rows(4), 256)[:, ::2], draw.normal(rows(4)), draw.normal(scales)
    yield "strided", x, weights, *_SETTINGS
    fn = weights[0].clone()
    fn[0, 7], fn[3, 1] = float("nan"), float("inf")
    yield "special weights", x, (fn, *weights[1:]), *_SETTINGS


def _streams(draw: Draw, tokens: int, n: int, d: int) -> torch.Tensor:
    return draw.uniform(tokens, n, d, low=0.5, high=1.5).bfloat16()


@hc_pre_hf32.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile in DEPLOYMENTS:
        for name, x, weights, *eps in _inputs(draw, lambda n: n * (n + 2), 3):
            rounds = 20 if name.startswith("2x") else 3
            yield Case(name, profile, (x, *weights, rounds, *eps))
        arguments = (*halves(draw, 24, 3), 4, 1e-6, 0.0)
        yield Case(HALVES, profile, arguments, decided=True)


@hc_head_hf32.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile in DEPLOYMENTS:
        for name, x, weights, *eps in _inputs(draw, lambda n: n, 1):
            yield Case(name, profile, (x, *weights, *eps))
        yield Case(HALVES, profile, (*halves(draw, 4, 1), 1e-6, 0.0), decided=True)


def _rounded_to_hf32(fn: torch.Tensor) -> torch.Tensor:
    return cut_to_hf32((fn.view(torch.int32) + (1 << 12)).view(torch.float32))


for _contract in (hc_pre_hf32, hc_head_hf32):
    _contract.wrong_step(
        cut_to_hf32,
        {
            "not cut at all": lambda fn: fn,
            "rounded instead of cut": _rounded_to_hf32,
            "cut to bf16": lambda fn: (fn.view(torch.int32) & -(1 << 16)).view(torch.float32),
        },
    )
    _contract.wrong_arguments(
        {
            "base left out": {"base": torch.zeros_like},
            "epsilon of pre left out": {"hc_eps": 0.0},
            "streams reversed": {"x": lambda x: x.flip(1)},
        }
    )


_WIDENS = "beside a wider factor or term it widens without the cast too"
_CASTS = ("_collapse: compute(x) -> x", "_mixes: fn.to(flat.dtype) -> fn")
for _place, _contract in (("_mixing_weights", hc_pre_hf32), ("hc_head", hc_head_hf32)):
    _mixed = (f"{_place}: {name}.to(mix.dtype) -> {name}" for name in ("base", "scale"))
    for _name in (*_CASTS, *_mixed):
        _contract.equivalent(_name, _WIDENS)
hc_head_hf32.equivalent("scale shifted", "there is one scale")
