"""Rounding points of Ascend's kernels that no operator has by itself: what the profiles emulate.

spec/deployments.md 8 says what each profile does at each site, 9 what is not emulated.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from dsv4_ascend.weights.linear import Linear
from dsv4_backend.ops.attention import AttentionCall
from dsv4_backend.ops.attention_p512 import sparse_attention_p512
from dsv4_backend.ops.formats import e4m3_values
from dsv4_backend.ops.hadamard import sylvester
from dsv4_backend.ops.norm import rms_norm
from dsv4_backend.ops.token_quant import fp8_token_quant, int8_token_quant


def head_norm(q: torch.Tensor, eps: float) -> torch.Tensor:
    """The norm of queries [T, H, D] as aclnnRmsNorm with a weight of ones: fp32 inside,
    one rounding.
    """
    return rms_norm(q, torch.ones(q.shape[-1], device=q.device), eps)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Index keys or queries [.., DI] times the +-1 matrix,
    rounded once: a factor would not change what is chosen.
    """
    wide = x.float()
    return (wide @ sylvester(wide)).to(x.dtype)


def int8_queries(q: torch.Tensor) -> torch.Tensor:
    """Values fp32 of rotated queries [T, HI, DI] in int8,
    with a scale per head that is cast to fp16.
    """
    codes, scale = int8_token_quant(rotate(q))
    return codes.float() * scale.half().float().unsqueeze(-1)


def fp8_queries(q: torch.Tensor) -> torch.Tensor:
    """Values fp32 of rotated queries [T, HI, DI] in e4m3, with an fp32 scale per head."""
    codes, scale = fp8_token_quant(rotate(q))
    return e4m3_values(codes) * scale.unsqueeze(-1)


def fp32_weights(weights_proj: Linear, x: torch.Tensor, factor: float) -> torch.Tensor:
    """fp32 [T, HI] of bf16 rows and weights, without the factor: it is positive,
    so it chooses nothing.
    """
    return linear(x.float(), weights_proj.stored().values(torch.float32))


def half_weights(weights_proj: Linear, x: torch.Tensor, factor: float) -> torch.Tensor:
    """`fp32_weights` cast to fp16."""
    return fp32_weights(weights_proj, x, factor).half().float()


def bf16_scores(scores: torch.Tensor) -> torch.Tensor:
    """Scores as A5 selects by them."""
    return scores.bfloat16()


def attend(call: AttentionCall, max_seq_len: int | None) -> torch.Tensor:
    """Attention in blocks of 512 keys, over absolute tables; without max_seq_len they reach what
    the window's table does.
    """
    reach = call.window_block_table.shape[1] * call.window_cache.shape[1]
    bound = reach if max_seq_len is None else max_seq_len
    return sparse_attention_p512(*call[:9], bound, *call[9:])
