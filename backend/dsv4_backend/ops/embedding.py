"""Token embedding into residual streams, and the LM head (spec/v4.md 2.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dsv4_backend.contract import Tolerance, compute, operator

_MAX_STREAMS = 1024  # V4 has 4


@operator(
    "embed_streams(Tensor input_ids, Tensor weight, int hc_mult) -> Tensor",
    rows=(1,),
    arguments={
        "input_ids": "int [T] in [0, V)",
        "weight": "float [V, d]",
        "hc_mult": f"1 to {_MAX_STREAMS}",
    },
    tolerance=Tolerance(reason="rows are copied, so every bit must agree"),
)
def embed_streams(input_ids: torch.Tensor, weight: torch.Tensor, hc_mult: int) -> torch.Tensor:
    """Embedding of every token, copied into each of the `hc_mult` residual streams.

    input_ids: [T] int, each in [0, V), checked where values can be read; weight: [V, d] float;
    hc_mult: 1 to 1024. Returns [T, hc_mult, d] in weight's dtype, the streams equal bit for
    bit. T = 0 gives an empty result. Source: spec/v4.md 2.1 step 1 [OFF-M].
    """
    return F.embedding(input_ids, weight).unsqueeze(1).repeat(1, hc_mult, 1)


@operator(
    "lm_head(Tensor x, Tensor weight) -> Tensor",
    rows=(22,),
    arguments={"x": "float [T, d]", "weight": "float [V, d]"},
    tolerance=Tolerance(
        reason="fp32 sums of d "
        "<= 4096 products in any order differ by about 4e-7 of the sum of their magnitudes; "
        "products of bf16 values are exact in fp32",
        ideal=(2e-5, 2e-5),
        official=(2e-5, 2e-5),
    ),
)
def lm_head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`logits[t, v] = sum_c x[t, c] * weight[v, c]`, the product of both arguments upcast to fp32.

    x: [T, d] float, after the final norm; weight: [V, d] float, bf16 in the checkpoint. Returns
    fp32 [T, V] whatever the input dtypes, never rounded to bf16. T = 0 gives an empty result.
    Source: spec/v4.md 2.1 step 3 and section 10 [OFF-M].
    """
    wide = compute(x)
    return F.linear(wide, weight.to(wide.dtype))
