"""Rounding points of Ascend's kernels that profiles emulate (spec/ascend-operators.md 4.4, 4.6, 4.8, 4.10).

What both deployment profiles do, by the codes of the launch plan: HF (mixes cut to HF32 while
loading), HN (one rounding in the norm of queries), I8 or MX (activations and weights), NQ (wq_a
and wkv in bf16), W2 (routing weight after w2), K8 or KF (index keys and queries); A2/A3: C0
(latent cache in bf16); A5: WOA and SB (wo_a's input in MX, bf16 scores).

Not emulated, because documents do not decide the bits or no operator of ours has them: attention
in tiles of 512 keys (P512; ours are 64), which of equal scores is chosen (TIE; ours the smaller
index), the order of fp32 sums, the shared expert before the routed ones in their sum (SUM),
whether a norm fused with quantisation rounds to bf16 in between (ours does), the missing floor of
1e-4 in such a norm on A5, and page formats of equal values (608 bytes beside `a5`'s 640).
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from dsv4_ascend.weights.linear import Linear
from dsv4_backend.ops.formats import e4m3_values
from dsv4_backend.ops.hadamard import sylvester
from dsv4_backend.ops.norm import rms_norm
from dsv4_backend.ops.token_quant import fp8_token_quant, int8_token_quant


def head_norm(q: torch.Tensor, eps: float) -> torch.Tensor:
    """The norm of queries [T, H, D] as aclnnRmsNorm with a weight of ones: fp32 inside, one rounding."""
    return rms_norm(q, torch.ones(q.shape[-1], device=q.device), eps)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Index keys or queries [.., DI] times the +-1 matrix, rounded once: a factor would not change what is chosen."""
    wide = x.float()
    return (wide @ sylvester(wide)).to(x.dtype)


def int8_queries(q: torch.Tensor) -> torch.Tensor:
    """Values fp32 of rotated queries [T, HI, DI] in int8, with a scale per head that is cast to fp16."""
    codes, scale = int8_token_quant(rotate(q))
    return codes.float() * scale.half().float().unsqueeze(-1)


def fp8_queries(q: torch.Tensor) -> torch.Tensor:
    """Values fp32 of rotated queries [T, HI, DI] in e4m3, with an fp32 scale per head."""
    codes, scale = fp8_token_quant(rotate(q))
    return e4m3_values(codes) * scale.unsqueeze(-1)


def fp32_weights(weights_proj: Linear, x: torch.Tensor, factor: float) -> torch.Tensor:
    """fp32 [T, HI] of bf16 rows and weights, without the factor: it is positive, so it chooses nothing."""
    return linear(x.float(), weights_proj.stored().values(torch.float32))


def half_weights(weights_proj: Linear, x: torch.Tensor, factor: float) -> torch.Tensor:
    """`fp32_weights` cast to fp16."""
    return fp32_weights(weights_proj, x, factor).half().float()


def bf16_scores(scores: torch.Tensor) -> torch.Tensor:
    """Scores as A5 selects by them."""
    return scores.bfloat16()
