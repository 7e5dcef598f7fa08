"""Products with float weights, one or two of the same rows (spec/v4.md 2.1, 4.2)."""

from __future__ import annotations

import torch

from dsv4_backend.contract import compute, operator
from dsv4_backend.ops.gemm import TOLERANCE


@operator(
    "linear(Tensor x, Tensor weight) -> Tensor",
    rows=(9,),
    arguments={"x": "float [T, K]", "weight": "float [N, K]"},
    tolerance=TOLERANCE,
)
def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x W^T` with a float weight.

    x: [T, K] float; weight: [N, K] float, widened where it is narrower than x. Returns [T, N] in
    x's dtype: fp32 sums, one cast. Zero tokens give [0, N]. Differentiable. Source: spec/v4.md 6.4
    (what is not quantised), [OFF-M].
    """
    rows = compute(x)
    return (rows @ weight.to(rows.dtype).T).to(x.dtype)


@operator(
    "linear_pair(Tensor x, Tensor first, Tensor second) -> (Tensor, Tensor)",
    rows=(9,),
    arguments={
        "x": "float [T, K]",
        "first": "float like x [N, K]",
        "second": "float like x [P, K]",
    },
    tolerance=TOLERANCE,
)
def linear_pair(
    x: torch.Tensor, first: torch.Tensor, second: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x W^T` with two float weights in one step.

    x: [T, K] float; first: [N, K] and second: [P, K] in its dtype. Returns [T, N] and [T, P] in x's
    dtype, each contiguous: fp32 sums, one cast. Zero tokens give empty results. Source: spec/v4.md
    4.2 (wq_a and wkv have the same input), aclnnGroupedMatmulV5.
    """
    wide = compute(x)
    one, other = ((wide @ w.to(wide.dtype).T).to(x.dtype) for w in (first, second))
    return one, other
