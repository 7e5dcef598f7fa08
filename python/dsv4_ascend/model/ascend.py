"""Rounding points of Ascend's kernels that no operator has by itself: what the profiles emulate.

spec/deployments.md 8 says what each profile does at each site, 9 what is not emulated.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from dsv4_ascend.model.paged import BytePaged, Lengths, Paged
from dsv4_ascend.weights.linear import Linear
from dsv4_backend.contract import Operator
from dsv4_backend.ops.attention import AttentionCall
from dsv4_backend.ops.attention_fp8 import sparse_attention_fp8
from dsv4_backend.ops.attention_p512 import sparse_attention_p512
from dsv4_backend.ops.hadamard import sylvester
from dsv4_backend.ops.lightning_indexer import lightning_indexer_fp8, lightning_indexer_int8
from dsv4_backend.ops.norm import rms_norm
from dsv4_backend.ops.token_quant import fp8_token_quant, int8_token_quant


def head_norm(q: torch.Tensor, eps: float) -> torch.Tensor:
    """The norm of queries [T, H, D] as aclnnRmsNorm with a weight of ones: fp32 inside,
    one rounding.
    """
    return rms_norm(q, _ones(q.shape[-1], q.device), eps)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Index keys or queries [.., DI] times the +-1 matrix,
    rounded once: a factor would not change what is chosen.
    """
    return (x.float() @ _signs(x.shape[-1], x.device)).to(x.dtype)


@cache
@torch.inference_mode(False)
def _ones(width: int, device: torch.device) -> torch.Tensor:
    return torch.ones(width, device=device)


@cache
@torch.inference_mode(False)
def _signs(width: int, device: torch.device) -> torch.Tensor:
    """The +-1 matrix fp32 [width, width]."""
    return sylvester(torch.empty(1, width)).to(device)


class _IndexCodes(NamedTuple):
    """How index keys of a byte format are met: the queries' codes, the dtype of their scales,
    and what scores and selects.
    """

    quantise: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    scale: torch.dtype
    indexer: Operator[..., torch.Tensor]


INDEX_CODES = {
    "indexer_int8": _IndexCodes(int8_token_quant, torch.float16, lightning_indexer_int8),
    "indexer_token_fp8": _IndexCodes(fp8_token_quant, torch.float32, lightning_indexer_fp8),
}
"""By the byte format of the keys."""


def select(
    q: torch.Tensor, weights: torch.Tensor, keys: Paged, lengths: Lengths, ratio: int, k: int
) -> torch.Tensor:
    """Entries int32 [T, k] chosen by rotated queries [T, HI, DI] in the format of the keys."""
    assert isinstance(keys, BytePaged)
    form = INDEX_CODES[keys.rows.form]
    codes, scale = form.quantise(q)
    of_keys, scales = keys.fields()
    rows = codes, scale.to(form.scale), of_keys, scales.squeeze(-1), weights
    starts, ends, max_seq_len = lengths
    bound = _bound(max_seq_len, keys.table, keys.block_size * ratio)
    return form.indexer(*rows, keys.table, starts, ends, bound, ratio, k)


def _bound(max_seq_len: int | None, table: torch.Tensor, tokens: int) -> int:
    """What seq_lens are at most: if not known, what an absolute table of blocks of so many tokens
    reaches.
    """
    return table.shape[1] * tokens if max_seq_len is None else max_seq_len


def fp32_weights(weights_proj: Linear, x: torch.Tensor, factor: float) -> torch.Tensor:
    """fp32 [T, HI] of bf16 rows and weights, without the factor: it is positive,
    so it chooses nothing.
    """
    return linear(x.float(), weights_proj.stored().values(torch.float32))


def half_weights(weights_proj: Linear, x: torch.Tensor, factor: float) -> torch.Tensor:
    """`fp32_weights` cast to fp16."""
    return fp32_weights(weights_proj, x, factor).half()


def attend(call: AttentionCall, max_seq_len: int | None, rope: int) -> torch.Tensor:
    """Attention in blocks of 512 keys, over absolute tables, to rows of floats or of bytes."""
    bound = _bound(max_seq_len, call.window_block_table, call.window_cache.shape[1])
    if call.window_cache.dtype == torch.uint8:
        return sparse_attention_fp8(*call[:9], bound, *call[9:], rope)
    return sparse_attention_p512(*call[:9], bound, *call[9:])
