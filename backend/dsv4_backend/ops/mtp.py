"""Input of the multi-token-prediction block (spec/v4.md 8.1)."""

from __future__ import annotations

import torch

from dsv4_backend.contract import Tolerance, compute, operator


@operator(
    "mtp_combine(Tensor e, Tensor x) -> Tensor",
    rows=(24,),
    arguments={"e": "f32|bf16 like x [T, d]", "x": "f32|bf16 [T, n, d]"},
    tolerance=Tolerance(
        reason="one fp32 addition, exact but for its own rounding (2^-24); the cast to bf16 "
        "decides every bit",
        ideal=(0.0, 2**-24),
    ),
)
def mtp_combine(e: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Streams entering the MTP block: `x'[t, j] = e[t] + x[t, j]` for each stream j.

    e: [T, d], e_proj of the next token's normed embedding; x: [T, n, d] of the same dtype, h_proj
    of each of the main model's normed streams. Both are results of ordinary linears, which round to
    that dtype (6.3). Returns [T, n, d] in that dtype: an fp32 sum, one cast. T = 0 gives an empty
    result. Differentiable. Source: spec/v4.md 8.1 step 2 [OFF-M].
    """
    return (compute(e).unsqueeze(1) + compute(x)).to(x.dtype)
