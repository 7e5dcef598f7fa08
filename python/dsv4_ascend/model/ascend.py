"""Rounding points of Ascend's kernels that no operator has by itself: what the profiles emulate.

spec/deployments.md 8 says what each profile does at each site, 9 what is not emulated.
"""

from __future__ import annotations

from functools import cache

import torch

from dsv4_ascend.model.paged import BytePaged, Lengths, Paged
from dsv4_ascend.model.rows import Ahead, Codes, IndexerParts, Qkv
from dsv4_ascend.weights.linear import Linear
from dsv4_backend.contract import Operator
from dsv4_backend.ops.attention import AttentionCall
from dsv4_backend.ops.attention_fp8 import sparse_attention_fp8
from dsv4_backend.ops.attention_p512 import sparse_attention_p512
from dsv4_backend.ops.indexer_prolog import indexer_prolog_fp8, indexer_prolog_int8
from dsv4_backend.ops.indexer_prolog_bf16 import indexer_prolog
from dsv4_backend.ops.lightning_indexer import (
    lightning_indexer,
    lightning_indexer_fp8,
    lightning_indexer_int8,
)
from dsv4_backend.ops.linear import linear_pair
from dsv4_backend.ops.qkv_norm_rope import qkv_norm_rope


def project(x: torch.Tensor, wq_a: Linear, wkv: Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """Both products of x [T, d] with weights of bf16, in one step."""
    return linear_pair(x, *(w.stored().values(x.dtype) for w in (wq_a, wkv)))


def norm_rope(rows: Qkv) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Norms and rotations in one step; heads are normed as aclnnRmsNorm with a weight of ones
    does it: fp32 inside, one rounding.
    """
    of_entries = rows.entry_turns
    q, kv, entries = qkv_norm_rope(
        rows.q,
        rows.kv,
        rows.entries,
        _ones(rows.q.shape[-1], rows.q.device),
        rows.kv_norm,
        rows.entry_norm,
        rows.eps,
        rows.turns.cos,
        rows.turns.sin,
        None if of_entries is None else of_entries.cos,
        None if of_entries is None else of_entries.sin,
    )
    return q, kv, None if rows.entries is None else entries


PROLOGS = {"indexer_int8": indexer_prolog_int8, "indexer_token_fp8": indexer_prolog_fp8}
"""What makes queries, weights and keys of the indexer, by the byte format of the keys."""


def prolog(parts: IndexerParts, slots: torch.Tensor, keys: Paged) -> tuple[Codes, torch.Tensor]:
    """Queries in the codes of the keys, and weights; writes the new keys. All in one step."""
    assert isinstance(keys, BytePaged)
    qr, qr_scale = parts.qr.of(parts.wq_b)
    assert qr_scale is not None
    wq_b = parts.wq_b.stored()
    codes, scale, weights = PROLOGS[keys.rows.form](
        parts.x,
        qr,
        qr_scale,
        wq_b.weight,
        wq_b.scale,
        parts.weights_proj.stored().values(parts.x.dtype),
        parts.pooled,
        parts.norm.to(parts.x.dtype),
        parts.eps,
        parts.turns.cos,
        parts.turns.sin,
        parts.entry_turns.cos,
        parts.entry_turns.sin,
        keys.tensor,
        slots,
        keys.block_size,
    )
    return (codes, scale), weights


def float_prolog(parts: IndexerParts, wq_b: Linear) -> Ahead:
    """Of keys that are floats, with the product of attention's wq_b, all in one step."""
    dtype = parts.x.dtype
    q, keys, weights, product = indexer_prolog(
        parts.x,
        parts.qr.of(parts.wq_b)[0],
        parts.wq_b.stored().values(dtype),
        wq_b.stored().values(dtype),
        parts.weights_proj.stored().values(dtype),
        parts.pooled,
        parts.norm.to(dtype),
        parts.eps,
        parts.turns.cos,
        parts.turns.sin,
        parts.entry_turns.cos,
        parts.entry_turns.sin,
    )
    return Ahead(product, (q, None), weights, keys)


@cache
@torch.inference_mode(False)
def _ones(width: int, device: torch.device) -> torch.Tensor:
    return torch.ones(width, device=device)


INDEXERS: dict[str, Operator[..., torch.Tensor]] = {
    "indexer_int8": lightning_indexer_int8,
    "indexer_token_fp8": lightning_indexer_fp8,
}
"""What scores and selects, by the byte format of the keys."""


def select(
    q: Codes, weights: torch.Tensor, keys: Paged, lengths: Lengths, ratio: int, k: int
) -> torch.Tensor:
    """Entries int32 [T, k] chosen by queries [T, HI, DI] in the format of the keys."""
    starts, ends, max_seq_len = lengths
    bound = _bound(max_seq_len, keys.table, keys.block_size * ratio)
    rest = keys.table, starts, ends, bound, ratio, k
    if not isinstance(keys, BytePaged):
        return lightning_indexer(q[0], keys.tensor, weights, *rest)
    of_keys, scales = keys.fields()
    return INDEXERS[keys.rows.form](*q, of_keys, scales.squeeze(-1), weights, *rest)


def _bound(max_seq_len: int | None, table: torch.Tensor, tokens: int) -> int:
    """What seq_lens are at most: if not known, what an absolute table of blocks of so many tokens
    reaches.
    """
    return table.shape[1] * tokens if max_seq_len is None else max_seq_len


def attend(call: AttentionCall, max_seq_len: int | None, rope: int) -> torch.Tensor:
    """Attention in blocks of 512 keys, over absolute tables, to rows of floats or of bytes."""
    bound = _bound(max_seq_len, call.window_block_table, call.window_cache.shape[1])
    if call.window_cache.dtype == torch.uint8:
        return sparse_attention_fp8(*call[:9], bound, *call[9:], rope)
    return sparse_attention_p512(*call[:9], bound, *call[9:])
