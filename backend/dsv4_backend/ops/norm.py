"""RMS normalisation (spec/v4.md 3.1)."""

from __future__ import annotations

import torch

from dsv4_backend.contract import Tolerance, compute, operator


@operator(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    rows=(5,),
    arguments={"x": "float [..., d]", "weight": "float [d]", "eps": "a number >= 0"},
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


@operator(
    "head_rms_norm(Tensor x, float eps) -> Tensor",
    rows=(5,),
    arguments={"x": "float [..., d]", "eps": "a number >= 0"},
    tolerance=Tolerance(
        reason="fp32 as rms_norm; the official cases lie on a grid where fp32 sums of the rounded "
        "squares are exact, so that every step's rounding decides every bit",
        ideal=(1e-7, 4e-6),
    ),
)
def head_rms_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """`x * rsqrt(mean(x^2) + eps)` over the last dimension,
    without weight, each step rounded to x's dtype.

    x: [..., d] float; eps: >= 0, added to the mean square, 1e-6 everywhere in V4. Returns [..., d]
    in x's dtype. In bf16 the square, the mean (summed in fp32), the sum with eps, the reciprocal
    root and the product each round to bf16, as the official code's tensor operations do. Zero rows
    give an empty result. NaN in a row makes the row NaN; infinity becomes NaN and makes the rest of
    its row 0. Source: spec/v4.md 3.1 [OFF-M].
    """
    mean = compute(x.square()).mean(-1, keepdim=True).to(x.dtype)
    # In bf16 torch would round eps first, and its rsqrt rounds twice where vectors end.
    shifted = (compute(mean) + eps).to(x.dtype)
    return x * torch.rsqrt(compute(shifted)).to(x.dtype)
