"""Rounding points of Ascend's kernels that no operator has by itself: what the profiles emulate.

spec/deployments.md 8 says what each profile does at each site, 9 what is not emulated.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from dsv4_ascend.model.paged import BytePaged, Lengths, Paged
from dsv4_ascend.weights.linear import Linear
from dsv4_backend.contract import Operator
from dsv4_backend.ops.attention import AttentionCall
from dsv4_backend.ops.attention_p512 import sparse_attention_p512
from dsv4_backend.ops.hadamard import sylvester
from dsv4_backend.ops.lightning_indexer import lightning_indexer_fp8, lightning_indexer_int8
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


def select_int8(
    q: torch.Tensor,
    weights: torch.Tensor,
    keys: Paged,
    lengths: Lengths,
    ratio: int,
    k: int,
) -> torch.Tensor:
    """Entries chosen by int8 queries with an fp16 scale per head, and int8 keys."""
    codes, scale = int8_token_quant(q)
    return _select(lightning_indexer_int8, codes, scale.half(), weights, keys, lengths, ratio, k)


def select_fp8(
    q: torch.Tensor,
    weights: torch.Tensor,
    keys: Paged,
    lengths: Lengths,
    ratio: int,
    k: int,
) -> torch.Tensor:
    """Entries chosen by e4m3 queries with an fp32 scale per head, and e4m3 keys."""
    codes, scale = fp8_token_quant(q)
    return _select(lightning_indexer_fp8, codes, scale, weights, keys, lengths, ratio, k)


def _select(
    indexer: Operator[..., torch.Tensor],
    codes: torch.Tensor,
    scale: torch.Tensor,
    weights: torch.Tensor,
    keys: Paged,
    lengths: Lengths,
    ratio: int,
    k: int,
) -> torch.Tensor:
    assert isinstance(keys, BytePaged)
    of_keys, scales = keys.fields()
    reach = keys.table.shape[1] * keys.block_size * ratio
    bound = reach if lengths.max_seq_len is None else lengths.max_seq_len
    starts, ends, _ = lengths
    rows = codes, scale, of_keys, scales.squeeze(-1), weights
    return indexer(*rows, keys.table, starts, ends, bound, ratio, k)


def fp32_weights(weights_proj: Linear, x: torch.Tensor, factor: float) -> torch.Tensor:
    """fp32 [T, HI] of bf16 rows and weights, without the factor: it is positive,
    so it chooses nothing.
    """
    return linear(x.float(), weights_proj.stored().values(torch.float32))


def half_weights(weights_proj: Linear, x: torch.Tensor, factor: float) -> torch.Tensor:
    """`fp32_weights` cast to fp16."""
    return fp32_weights(weights_proj, x, factor).half()


def attend(call: AttentionCall, max_seq_len: int | None) -> torch.Tensor:
    """Attention in blocks of 512 keys, over absolute tables; without max_seq_len they reach what
    the window's table does.
    """
    reach = call.window_block_table.shape[1] * call.window_cache.shape[1]
    bound = reach if max_seq_len is None else max_seq_len
    return sparse_attention_p512(*call[:9], bound, *call[9:])
