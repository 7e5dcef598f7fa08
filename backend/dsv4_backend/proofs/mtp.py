"""Proof of the input of the MTP block (spec/v4.md 8.1): cases, oracles, named faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from dsv4_backend.contract import Case, Draw
from dsv4_backend.mutants import add_output_faults
from dsv4_backend.ops.mtp import mtp_combine
from dsv4_backend.ops.quant import dequantize_fp8
from dsv4_backend.proofs.numerics import Array, cast, fp8_quantised, round_to, tile_values, wide
from dsv4_backend.proofs.rounding_rows import (
    alternating_rows,
    broken_rows,
    explain_quantisation,
    fp32_weight,
    rows_with_outliers,
    tiny_rows,
    weight_of_small_channels,
)

_BLOCK = 128


def _projected(x: Array, weight: Array, scale: Array | None) -> Array:
    """Weight . x, rounded to x's dtype; an FP8 weight takes bf16 activations through e4m3 (6.3)."""
    if scale is None:
        return round_to(x.dtype, wide(x) @ wide(weight).T)
    activations = wide(x) if x.dtype == np.float64 else fp8_quantised(x, _BLOCK)
    return round_to(x.dtype, activations @ tile_values(weight, scale, (_BLOCK, _BLOCK)).T)


@mtp_combine.oracle
def _(
    e: Array,
    x: Array,
    e_proj: Array,
    e_proj_scale: Array | None,
    h_proj: Array,
    h_proj_scale: Array | None,
) -> Array:
    embedding = _projected(e, e_proj, e_proj_scale)
    streams = _projected(x, h_proj, h_proj_scale)
    return cast(x.dtype, embedding[:, None] + streams)


_DTYPES = {"ideal": torch.float32, "official": torch.bfloat16}
_FLOAT_SHAPES = ((0, 4, 64), (1, 1, 1), (3, 2, 7), (5, 4, 130), (2, 4, 1024))
_FP8_SHAPES = ((0, 4, 128), (3, 2, 32), (3, 4, 200), (5, 4, 384))


def _fp8_weight(draw: Draw, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An e4m3 weight [d, d] that maps unit rows to about 0.3, its tile scales spread over a factor of 4."""
    tiles = -(-d // _BLOCK)
    low = 127 - round(d**0.5).bit_length()
    scale = draw.integers(tiles, tiles, low=low - 2, high=low + 1).to(torch.uint8).view(torch.float8_e8m0fnu)
    return draw.normal(d, d, scale=0.6).to(torch.float8_e4m3fn), scale


@mtp_combine.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in _DTYPES.items():
        for tokens, n, d in _FLOAT_SHAPES:
            rows = draw.normal(tokens, d, dtype=dtype), draw.normal(tokens, n, d, dtype=dtype)
            e_proj, h_proj = (draw.normal(d, d, dtype=dtype, scale=0.3 * d**-0.5) for _ in range(2))
            yield Case(f"{tokens}x{n}x{d}", profile, (*rows, e_proj, None, h_proj, None))
        for tokens, n, d in _FP8_SHAPES:
            rows = draw.normal(tokens, d, dtype=dtype), draw.normal(tokens, n, d, dtype=dtype)
            weights = *_fp8_weight(draw, d), *_fp8_weight(draw, d)
            yield Case(f"FP8 {tokens}x{n}x{d}", profile, (*rows, *weights))
        e, x = draw.normal(4, 96, dtype=dtype)[:, ::2], draw.normal(8, 4, 48, dtype=dtype)[::2]
        e_proj, h_proj = (draw.normal(48, 48, dtype=dtype, scale=0.04).T for _ in range(2))
        yield Case("strided", profile, (e, x, e_proj, None, h_proj, None))
        e, x = draw.normal(3, 16, dtype=dtype), draw.normal(3, 2, 16, dtype=dtype)
        e[0, 3], x[1, 1, 2], e[2], x[2] = float("nan"), float("inf"), 0.0, 0.0
        e_proj, h_proj = (draw.uniform(16, 16, low=0.01, high=0.1, dtype=dtype) for _ in range(2))
        yield Case("NaN, infinity, zero row", profile, (e, x, e_proj, None, h_proj, None))
    for name, make, exponent in (
        ("activation scales decide", rows_with_outliers, 2),
        ("activations below the floor", tiny_rows, 26),
        ("FP8 NaN, infinity", broken_rows, -4),
    ):
        projections = (weight_of_small_channels(draw, 256, 256, exponent) for _ in range(2))
        streams = make(draw, 4, 256), make(draw, 12, 256).unflatten(0, (4, 3))
        yield Case(name, "official", (*streams, *(part for pair in projections for part in pair)))
    rows = alternating_rows(draw, 3, 64), alternating_rows(draw, 6, 64).unflatten(0, (3, 2))
    e_proj, h_proj = (fp32_weight(draw, 64, 64) for _ in range(2))
    yield Case("bf16 rows, fp32 weights", "official", (*rows, e_proj, None, h_proj, None))
    wide = draw.normal(3, 64).double(), draw.normal(3, 2, 64).double()
    yield Case("fp64", "ideal", (*wide, e_proj, None, h_proj, None))
    fp8 = *_fp8_weight(draw, 64), *_fp8_weight(draw, 64)
    yield Case("FP8 fp64", "ideal", (*wide, *fp8))


add_output_faults(mtp_combine, "last token zero", "stale tail of channels", "one NaN", "tokens shifted by one")


def _arguments_fault(name: str, edit: Callable[..., tuple[Any, ...]]) -> None:
    """mtp_combine of other arguments: edit maps (e, x, e_proj, e_scale, h_proj, h_scale) to such."""
    mtp_combine.fault(name)(lambda *args: mtp_combine.reference(*edit(*args)))


def _widened(weight: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    return (weight, None) if scale is None else (dequantize_fp8(weight, scale), None)


_arguments_fault("projections exchanged", lambda e, x, e_proj, es, h_proj, hs: (e, x, h_proj, hs, e_proj, es))
_arguments_fault("one projection for both", lambda e, x, e_proj, es, *_: (e, x, e_proj, es, e_proj, es))
_arguments_fault("embedding left out", lambda e, *rest: (torch.zeros_like(e), *rest))
_arguments_fault("hidden streams left out", lambda e, x, *rest: (e, torch.zeros_like(x), *rest))
_arguments_fault("first stream for all", lambda e, x, *rest: (e, x[:, :1].expand_as(x), *rest))
_arguments_fault("mean of the streams", lambda e, x, *rest: (e, x.mean(1, keepdim=True).expand_as(x), *rest))
_arguments_fault("embedding of the previous token", lambda e, *rest: (e.roll(1, 0), *rest))
_arguments_fault("weights transposed", lambda e, x, ew, es, hw, hs: (e, x, ew.T, es, hw.T, hs))
_arguments_fault(
    "scale tiles transposed", lambda e, x, ew, es, hw, hs: (e, x, ew, None if es is None else es.T, hw, hs)
)
_arguments_fault("activations not quantised", lambda e, x, ew, es, hw, hs: (e, x, *_widened(ew, es), *_widened(hw, hs)))


@mtp_combine.fault("embedding added to the first stream only")
def _(e: torch.Tensor, x: torch.Tensor, *projections: Any) -> torch.Tensor:
    alone = mtp_combine.reference(torch.zeros_like(e), x, *projections)
    first = torch.arange(x.shape[1]).view(1, -1, 1) == 0
    return mtp_combine.reference(e, x, *projections).where(first, alone)


@mtp_combine.fault("activations quantised where they must not be")
def _(e: torch.Tensor, x: torch.Tensor, *projections: Any) -> torch.Tensor:
    if projections[1] is None:
        return mtp_combine.reference(e, x, *projections)
    return mtp_combine.reference(e.bfloat16(), x.bfloat16(), *projections).to(x.dtype)


explain_quantisation(mtp_combine)
mtp_combine.equivalent("dequantize_fp8: 0 -> 1", "the projections are square")
