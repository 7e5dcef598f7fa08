"""Input of the multi-token-prediction block (spec/v4.md 8.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from dsv4_backend.contract import Case, Draw, Tolerance, operator
from dsv4_backend.mutants import add_output_faults
from dsv4_backend.ops.linear import linear
from dsv4_backend.ops.quant import dequantize_fp8

_BLOCK = 128
_DTYPES = {"ideal": torch.float32, "official": torch.bfloat16}
_FLOAT_SHAPES = ((0, 4, 64), (1, 1, 1), (3, 2, 7), (5, 4, 130), (2, 4, 1024))
_FP8_SHAPES = ((0, 4, 128), (3, 2, 32), (3, 4, 200), (5, 4, 384))


@operator(
    "mtp_combine(Tensor e, Tensor x, Tensor e_proj, Tensor? e_proj_scale, Tensor h_proj, Tensor? h_proj_scale)"
    " -> Tensor",
    rows=(24,),
    arguments={
        "e": "f32|bf16 [T, d]",
        "x": "f32|bf16 [T, n, d]",
        "e_proj": "float|e4m3 [d, d]",
        "e_proj_scale": "e8m0 [d^128, d^128]",
        "h_proj": "float|e4m3 [d, d]",
        "h_proj_scale": "e8m0 [d^128, d^128]",
    },
    tolerance=Tolerance(
        reason="fp32 sums of d products in any order; in bf16 each product, below 2 in the cases, may land on the "
        "other neighbour (2^-7 each), and so may their sum (2^-7 relative)",
        ideal=(1e-5, 1e-5),
        official=(2**-6, 2**-7),
    ),
)
def mtp_combine(
    e: torch.Tensor,
    x: torch.Tensor,
    e_proj: torch.Tensor,
    e_proj_scale: torch.Tensor | None,
    h_proj: torch.Tensor,
    h_proj_scale: torch.Tensor | None,
) -> torch.Tensor:
    """Streams entering the MTP block: `x'[t, j] = e_proj e[t] + h_proj x[t, j]` for each stream j.

    e: [T, d], enorm of the next token's embedding; x: [T, n, d] of the same dtype, hnorm of the main model's streams
    before the head collapse. e_proj, h_proj: [d, d] float without scales, or e4m3 with e8m0 scales
    [ceil(d/128), ceil(d/128)], both alike.
    Returns [T, n, d] in x's dtype. bf16: FP8 weights take the activations through act_quant block 128; both products
    round to bf16, then their sum does. fp32: nothing is quantised. T = 0 gives an empty result.
    Source: spec/v4.md 8.1 step 2 [OFF-M], 6.3.
    """
    embedded = linear(e, e_proj, e_proj_scale)
    hidden = linear(x.flatten(0, 1), h_proj, h_proj_scale).view(x.shape)
    return embedded.unsqueeze(1) + hidden


@mtp_combine.shapes
def _(
    e: torch.Tensor,
    x: torch.Tensor,
    e_proj: torch.Tensor,
    e_proj_scale: torch.Tensor | None,
    h_proj: torch.Tensor,
    h_proj_scale: torch.Tensor | None,
) -> None:
    if e.dtype != x.dtype:
        raise mtp_combine.reject("e", str(e.dtype), f"{x.dtype} like x")
    for name, weight, scale in (("e_proj", e_proj, e_proj_scale), ("h_proj", h_proj, h_proj_scale)):
        if (weight.dtype == torch.float8_e4m3fn) != (scale is not None):
            found = f"{weight.dtype} {'without' if scale is None else 'with'} {name}_scale"
            raise mtp_combine.reject(name, found, "a float weight without scale, or e4m3 with its e8m0 scale")


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
