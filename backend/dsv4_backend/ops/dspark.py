"""DSpark, the drafter that replaces the MTP block (spec/v4.md 13.1, spec/v41.md 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dsv4_backend.contract import Tolerance, operator


@operator(
    "markov_bias(Tensor logits, Tensor previous, Tensor markov_w1, Tensor markov_w2) -> Tensor",
    rows=(25,),
    arguments={
        "logits": "f32 [T, V]",
        "previous": "int [T] in [0, V)",
        "markov_w1": "float [V, R]",
        "markov_w2": "float [V, R]",
    },
    tolerance=Tolerance(
        reason="fp32 sums of R <= 256 products in any order differ by about 4e-7 of the sum of "
        "their magnitudes; products of bf16 values are exact in fp32",
        ideal=(1e-5, 2e-6),
        official=(1e-5, 2e-6),
    ),
)
def markov_bias(
    logits: torch.Tensor, previous: torch.Tensor, markov_w1: torch.Tensor, markov_w2: torch.Tensor
) -> torch.Tensor:
    """`logits[t, v] + sum_r markov_w2[v, r] * markov_w1[previous[t], r]`.

    logits: fp32 [T, V], base logits of drafted tokens; previous: int [T], the token before each, in
    [0, V), checked where values can be read; markov_w1, markov_w2: [V, R] float, bf16 and R = 256
    in checkpoints.
    Returns fp32 [T, V]: both weights are upcast, nothing rounds to bf16; logits are not changed.
    T = 0 gives an empty result.
    Source: spec/v4.md 13.1 item 3; dtypes: spec/v41.md 1.1, 1.3 step 5 [OFF31].
    """
    rank_row = F.embedding(previous, markov_w1).to(logits.dtype)
    return logits + F.linear(rank_row, markov_w2.to(logits.dtype))
