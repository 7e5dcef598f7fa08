"""RMS normalisation (spec/v4.md 3.1)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dsv4_backend.contract import Case, Draw, Tolerance, compute, operator
from dsv4_backend.mutants import add_output_faults

_DTYPES = {"ideal": torch.float32, "official": torch.bfloat16}
_SHAPES = ((0, 64), (1, 1), (1, 512), (3, 7), (5, 4096), (17, 130))


@operator(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    rows=(5,),
    arguments={"x": "float [..., d]", "weight": "float [d]"},
    tolerance=Tolerance(
        reason="fp32 sums of up to 7168 squares in any order stay within 4e-6 relative; "
        "the one cast to bf16 may then land on the other neighbour (2^-8)",
        ideal=(1e-7, 4e-6),
        official=(1e-9, 2**-7),
    ),
)
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension.

    x: [..., d] float; weight: [d] float; eps: added to the mean square, 1e-6 everywhere in V4.
    Returns [..., d] in x's dtype: fp32 inside, one cast at the end. Zero rows give an empty result.
    NaN in a row makes the row NaN; infinity becomes NaN and makes the rest of its row 0.
    Source: spec/v4.md 3.1 [OFF-M].
    """
    wide = compute(x)
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (scaled * weight.to(wide.dtype)).to(x.dtype)


@rms_norm.shapes
def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    if not eps >= 0:
        raise rms_norm.reject("eps", eps, "a number >= 0")


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


@operator(
    "head_rms_norm(Tensor x, float eps) -> Tensor",
    rows=(5,),
    arguments={"x": "float [..., d]"},
    tolerance=Tolerance(
        reason="fp32 as rms_norm; in bf16 a sum in another order may tip the rounded mean, then the root, then the "
        "product by one neighbour each: half a step, one step and one step of 2^-7",
        ideal=(1e-7, 4e-6),
        official=(1e-9, 2**-6),
    ),
)
def head_rms_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """`x * rsqrt(mean(x^2) + eps)` over the last dimension, without weight, each step rounded to x's dtype.

    x: [..., d] float; eps: >= 0, added to the mean square, 1e-6 everywhere in V4.
    Returns [..., d] in x's dtype. In bf16 the square, the mean (summed in fp32), the sum with eps, the reciprocal root
    and the product each round to bf16, as the official code's tensor operations do. Zero rows give an empty result.
    NaN in a row makes the row NaN; infinity becomes NaN and makes the rest of its row 0.
    Source: spec/v4.md 3.1 [OFF-M].
    """
    mean = compute(x.square()).mean(-1, keepdim=True).to(x.dtype)
    root = torch.rsqrt(compute(mean + eps)).to(x.dtype)  # torch's own in bf16 rounds twice where vectors end
    return x * root


@head_rms_norm.shapes
def _(x: torch.Tensor, eps: float) -> None:
    if not eps >= 0:
        raise head_rms_norm.reject("eps", eps, "a number >= 0")


@head_rms_norm.cases
def _(draw: Draw) -> Iterator[Case]:
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
