"""Input of the multi-token-prediction block (spec/v4.md 8.1)."""

from __future__ import annotations

import torch

from dsv4_backend.contract import Tolerance, operator
from dsv4_backend.ops.linear import linear


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
