"""Grouped output projection, its first half (spec/v4.md 4.7)."""

from __future__ import annotations

import torch

from dsv4_backend.contract import Tolerance, compute, operator
from dsv4_backend.relations import require


def _flatten_groups(o: torch.Tensor, wo_a: torch.Tensor) -> torch.Tensor:
    """[T, H, D] -> [T, G, H*D/G], heads in order."""
    return o.reshape(o.shape[0], wo_a.shape[0], wo_a.shape[2])


def _round_weight(o: torch.Tensor, wo_a: torch.Tensor) -> torch.Tensor:
    """wo_a in o's dtype: where an fp32 or FP8 weight becomes bf16 (6.4)."""
    return wo_a.to(o.dtype)


@operator(
    "grouped_output_projection(Tensor o, Tensor wo_a) -> Tensor",
    rows=(17,),
    arguments={"o": "f32|bf16 [T, H, D]", "wo_a": "float [G, R, K]"},
    relations=(
        require(
            "o", "H >= 1 and D >= 1 and R >= 1", "{H} heads of {D}, rank {R}", "none of them 0"
        ),
        require(
            "wo_a",
            "G >= 1 and H % G == 0 and K == H // G * D",
            "shape {sizes(wo_a)}",
            "[G, R, {H * D}/G] with G a divisor of {H} heads",
        ),
    ),
    tolerance=Tolerance(
        reason="fp32 sums of up to 1024 products, near 1 in the cases, in any order; the one cast "
        "to bf16 may then land on the other neighbour (2^-8)",
        ideal=(4e-6, 4e-6),
        official=(4e-6, 2**-7),
    ),
)
def grouped_output_projection(o: torch.Tensor, wo_a: torch.Tensor) -> torch.Tensor:
    """Project each group of heads to R channels; an ordinary linear (wo_b) then joins the groups.

    o: [T, H, D]; wo_a: [G, R, H*D/G] float, wo_a[g] belongs to heads g*H/G .. (g+1)*H/G-1 flattened
    in order (the stored [G*R, H*D/G] as a view). Returns [T, G*R] in o's dtype, the R channels of
    group 0 first. wo_a is rounded to o's dtype, an FP8 one dequantised by the caller; sums are
    fp32, one cast; nothing is quantised. T = 0 gives an empty result. Differentiable. Source:
    spec/v4.md 4.7 step 2, 6.4 [OFF-M, OFF-CONV].
    """
    grouped, weight = compute(_flatten_groups(o, wo_a)), compute(_round_weight(o, wo_a))
    z = grouped.transpose(0, 1) @ weight.transpose(1, 2)  # [G, T, R]
    return z.transpose(0, 1).flatten(1).to(o.dtype)
