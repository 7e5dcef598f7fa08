"""Hyper-connections as Ascend's kernels mix them: in HF32 (spec/deployments.md 5)."""

from __future__ import annotations

import torch

from dsv4_backend.contract import DEPLOYMENTS, Tolerance, operator
from dsv4_backend.ops.hyper import (
    MIX_ARGUMENTS,
    MIX_REASON,
    MIX_RELATIONS,
    hc_head,
    hc_pre,
)

_DROPPED_BITS = 13
_TOLERANCE = Tolerance(reason=MIX_REASON, **dict.fromkeys(DEPLOYMENTS, (1e-5, 2**-7)))
_STREAMS = {"x": "bf16|f16 [T, n, d]"}


def cut_to_hf32(fn: torch.Tensor) -> torch.Tensor:
    """fp32 values without their last 13 mantissa bits; NaN stays NaN."""
    cut = (fn.view(torch.int32) & -(1 << _DROPPED_BITS)).view(torch.float32)
    return torch.where(fn.isnan(), fn, cut)


@operator(
    "hc_pre_hf32(Tensor x, Tensor fn, Tensor base, Tensor scale, int sinkhorn_iters, "
    "float norm_eps, float hc_eps) -> (Tensor y, Tensor post, Tensor comb)",
    rows=(2,),
    arguments={**MIX_ARGUMENTS["hc_pre"], **_STREAMS},
    relations=MIX_RELATIONS,
    tolerance=_TOLERANCE,
)
def hc_pre_hf32(
    x: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    sinkhorn_iters: int,
    norm_eps: float,
    hc_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`hc_pre` with fn cut to HF32, 10 explicit mantissa bits, before the product.

    x: [T, n, d] bf16 or fp16, which HF32 holds exactly; the rest as in `hc_pre`. No gradient.
    Source: aclnnMhcPreSinkhorn, aclnnHcPre; spec/deployments.md 5, spec/v4.md 2.2 to 2.4.
    """
    y, post, comb = hc_pre.reference(
        x, cut_to_hf32(fn.detach()), base, scale, sinkhorn_iters, norm_eps, hc_eps
    )
    return y, post, comb


@operator(
    "hc_head_hf32(Tensor x, Tensor fn, Tensor base, Tensor scale, float norm_eps, float hc_eps)"
    " -> Tensor",
    rows=(4,),
    arguments={**MIX_ARGUMENTS["hc_head"], **_STREAMS},
    relations=MIX_RELATIONS,
    tolerance=_TOLERANCE,
)
def hc_head_hf32(
    x: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
) -> torch.Tensor:
    """`hc_head` with fn cut to HF32, 10 explicit mantissa bits, before the product.

    x: [T, n, d] bf16 or fp16, which HF32 holds exactly; the rest as in `hc_head`. No gradient.
    Source: aclnnMhcPreSinkhorn with fn padded to n*(n+2) rows; spec/deployments.md 5,
    spec/v4.md 2.4.
    """
    return hc_head.reference(x, cut_to_hf32(fn.detach()), base, scale, norm_eps, hc_eps)
