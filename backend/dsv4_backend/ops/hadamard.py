"""Hadamard rotation of indexer queries and keys (spec/v4.md 4.5)."""

from __future__ import annotations

import torch

from dsv4_backend.contract import Tolerance, compute, operator
from dsv4_backend.relations import require


@operator(
    "hadamard(Tensor x) -> Tensor",
    rows=(11,),
    arguments={"x": "float [..., n]"},
    relations=(require("x", "n >= 1 and (n & (n - 1)) == 0", "{n} channels", "a power of two"),),
    tolerance=Tolerance(
        reason="fp32 sums of up to 512 terms of size 4 in any order stay within 4e-6; the official "
        "cases lie on a grid where such sums are exact, so the one product by the root and the one "
        "cast to bf16 decide every bit",
        ideal=(4e-6, 1e-6),
    ),
)
def hadamard(x: torch.Tensor) -> torch.Tensor:
    """`H_n x / sqrt(n)` over the last dimension: H_1 = [1],
    H_2m = [[H, H], [H, -H]] (Sylvester, natural order).

    x: [..., n] float, n a power of two. Returns [..., n] in x's dtype: fp32 inside, one cast at the
    end. Applying it twice gives x back. NaN or infinity in a row spreads over the row. Source:
    spec/v4.md 4.5 item 2 [OFF-M].
    """
    return _transform(x)


def _transform(x: torch.Tensor) -> torch.Tensor:
    wide = compute(x)
    scale: float = x.shape[-1] ** -0.5
    return (wide @ sylvester(wide) * scale).to(x.dtype)


def sylvester(like: torch.Tensor) -> torch.Tensor:
    """The matrix H_n, [n, n] of +-1, in the dtype and on the device of `like` [..., n]."""
    h = torch.ones(1, 1, dtype=like.dtype, device=like.device)
    while h.shape[0] < like.shape[-1]:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h
