"""Sparse shared-KV attention with sink, and the grouped output projection (spec/v4.md 4.6, 4.7)."""

from __future__ import annotations

import torch

from dsv4_backend import ragged
from dsv4_backend.contract import Tolerance, compute, operator
from dsv4_backend.ops import gemm, quant

Keys = tuple[torch.Tensor, torch.Tensor]
"""(rows, valid): [T, n, D] per token or [n, D] for all tokens, in the accumulation dtype; bool [T, n]."""


def _chosen(cache: torch.Tensor, table: torch.Tensor, sequence: torch.Tensor, index: torch.Tensor) -> Keys:
    """The rows `index` [T, n] of each token's sequence; negative indices are no keys."""
    flat = ragged.slots(table, sequence[:, None], index, cache.shape[1])
    valid = flat >= 0
    return compute(ragged.gather_rows(cache, flat)).masked_fill(~valid[..., None], 0), valid


def _visible(
    cache: torch.Tensor,
    table: torch.Tensor,
    sequence: torch.Tensor,
    seq_lens: torch.Tensor,
    positions: torch.Tensor,
    ratio: int,
) -> Keys:
    """All compressed entries i < (position + 1) // ratio of each token's sequence."""
    rows = compute(ragged.table_rows(cache, table, seq_lens // ratio))
    entry = torch.arange(rows.shape[1], device=rows.device)
    valid = entry < ((positions + 1) // ratio)[:, None]
    return (rows[0] if rows.shape[0] == 1 else rows[sequence]), valid


def _scores(q: torch.Tensor, keys: Keys) -> torch.Tensor:
    """Scaled dot products [T, H, n], -inf where there is no key."""
    rows, valid = keys
    dot = q @ rows.transpose(-1, -2)
    return (dot * q.shape[-1] ** -0.5).masked_fill(~valid[:, None], -torch.inf)


def _attend(q: torch.Tensor, sink: torch.Tensor, parts: list[Keys]) -> torch.Tensor:
    """Softmax over all parts and the sink, [T, H, D] in q's dtype."""
    wide = compute(q)
    scores = torch.cat([_scores(wide, keys) for keys in parts], -1)
    peak = scores.amax(-1, keepdim=True).detach()  # cancels, so it needs no gradient
    peak = peak.masked_fill(peak == -torch.inf, 0)  # no key at all
    weights = (scores - peak).exp()
    total = weights.sum(-1, keepdim=True)
    total = total.masked_fill(total == 0, 1)
    rounded = weights.to(q.dtype).to(wide.dtype).split([valid.shape[1] for _, valid in parts], -1)
    # A key is its own value: one that is not finite shows in its score; where it is hidden it must not leak as 0 * NaN.
    mixed = sum(w @ rows.nan_to_num(0, 0, 0) for w, (rows, _) in zip(rounded, parts, strict=True))
    share = torch.sigmoid(peak + total.log() - sink.to(wide.dtype)[:, None])  # total / (total + exp(sink - peak))
    return (mixed / total * share).to(q.dtype)


@operator(
    "sparse_attention(Tensor q, Tensor sink, Tensor window_cache, Tensor window_block_table, Tensor? cmp_cache, "
    "Tensor? cmp_block_table, Tensor? cmp_indices, Tensor query_start_loc, Tensor seq_lens, int window, int ratio) "
    "-> Tensor",
    rows=(16,),
    arguments={
        "q": "float [T, H, D]",
        "sink": "f32 [H]",
        "window_cache": "float [num_blocks, block_size, D]",
        "window_block_table": "i32 [R, columns]",
        "cmp_cache": "float [cmp_blocks, cmp_block_size, D]",
        "cmp_block_table": "i32 [R, cmp_columns]",
        "cmp_indices": "i32 [T, N]",
        "query_start_loc": "i32 [S]",
        "seq_lens": "i32 [R]",
    },
    tolerance=Tolerance(
        reason="fp32 sums in any order; bf16 probabilities are rounded relative to a running maximum that depends on "
        "the tiling (2^-9 of each), and the result once (2^-9)",
        ideal=(2e-6, 2e-5),
        official=(2**-7, 2**-7),
    ),
)
def sparse_attention(
    q: torch.Tensor,
    sink: torch.Tensor,
    window_cache: torch.Tensor,
    window_block_table: torch.Tensor,
    cmp_cache: torch.Tensor | None,
    cmp_block_table: torch.Tensor | None,
    cmp_indices: torch.Tensor | None,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    window: int,
    ratio: int,
) -> torch.Tensor:
    """Multi-query attention over window keys and compressed entries, one softmax together with a sink per head.

    q: [T, H, D]; sink: fp32 [H], -inf for none; caches: paged [num_blocks, block_size, D] in q's dtype with this
    call's rows already in them; a row is key and value of all heads. The token at position t sees window keys
    t - window + 1 .. t (the window's table may be a ring) and, if ratio > 0, compressed entries: those named by
    cmp_indices (int32 [T, N], each < (t + 1) // ratio, -1 = none, a repeated one counts twice), or all
    i < (t + 1) // ratio when cmp_indices is None. ratio 0: the three cmp_ arguments are None. window 0 means no window
    keys and needs ratio > 0.
    Returns [T, H, D] in q's dtype: a = (q . k) * D^-0.5 in fp32; p = exp(a - max a), the sink outside the max; p is
    cast to q's dtype for the product with the values only; o = sum p k / (sum p + exp(sink - max a)), fp32, one cast.
    A row with no key is 0. T = 0 gives an empty result. NaN in hidden rows does not matter. ArgumentError for offsets,
    lengths, blocks, or indices that do not fit. Source: spec/v4.md 4.2, 4.6 [OFF-K sparse_attn].
    """
    tokens = q.shape[0]
    sequence = ragged.token_sequences(query_start_loc, tokens)
    positions = ragged.token_positions(query_start_loc, seq_lens, tokens)
    near = positions[:, None] + torch.arange(1 - window, 1, device=q.device)
    parts = [_chosen(window_cache, window_block_table, sequence, near)]
    if cmp_cache is not None and cmp_block_table is not None:
        if cmp_indices is None:
            parts.append(_visible(cmp_cache, cmp_block_table, sequence, seq_lens, positions, ratio))
        else:
            parts.append(_chosen(cmp_cache, cmp_block_table, sequence, cmp_indices.long()))
    return _attend(q, sink, parts)


def _linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """X [T, K] times a float weight, or an FP8 one with its scales, as official linear layers do (6.3)."""
    if scale is None:
        wide = compute(x)
        return (wide @ weight.to(wide.dtype).T).to(x.dtype)
    if x.dtype != torch.bfloat16:
        return gemm.fp8_gemm.reference(x, None, weight, scale)
    return gemm.fp8_gemm.reference(*quant.act_quant.reference(x, 128), weight, scale)


@operator(
    "grouped_output_projection(Tensor o, Tensor wo_a, Tensor? wo_a_scale, Tensor wo_b, Tensor? wo_b_scale, int groups) "
    "-> Tensor",
    rows=(17,),
    arguments={
        "o": "float [T, H, D]",
        "wo_a": "float|e4m3 [GR, K]",
        "wo_a_scale": "e8m0 [GR^128, K^128]",
        "wo_b": "float|e4m3 [d, GR]",
        "wo_b_scale": "e8m0 [d^128, GR^128]",
    },
    tolerance=Tolerance(
        reason="fp32 sums in any order; bf16 between the two products and at the end",
        ideal=(2e-6, 2e-5),
        official=(2**-6, 2**-6),
    ),
)
def grouped_output_projection(
    o: torch.Tensor,
    wo_a: torch.Tensor,
    wo_a_scale: torch.Tensor | None,
    wo_b: torch.Tensor,
    wo_b_scale: torch.Tensor | None,
    groups: int,
) -> torch.Tensor:
    """Project each group of heads to R channels, then all groups together to the hidden size.

    o: [T, H, D]; wo_a: [G*R, H*D/G], rows g*R .. g*R+R-1 belong to heads g*H/G .. (g+1)*H/G-1 flattened in order; wo_b:
    [d, G*R]; scales: None for float weights, else E8M0 of 128x128 tiles of an e4m3 weight. Returns [T, d] in o's dtype.
    bf16 o: wo_a (dequantised to bf16) times o in fp32 sums, one cast; an FP8 wo_b is multiplied as any FP8 linear
    (act_quant in blocks of 128, fp8_gemm). fp32 o: fp32 products with the dequantised weights, nothing is quantised.
    T = 0 gives an empty result. Source: spec/v4.md 4.7, 6.4 [OFF-M, OFF-CONV].
    """
    wide = compute(o)
    grouped = wide.flatten(1).unflatten(1, (groups, -1))  # [T, G, H*D/G]
    first = wo_a if wo_a_scale is None else quant.dequantize_fp8(wo_a, wo_a_scale).to(o.dtype)
    weight = first.to(wide.dtype).unflatten(0, (groups, -1))  # [G, R, H*D/G]
    z = torch.einsum("tgk,grk->tgr", grouped, weight).flatten(1).to(o.dtype)
    return _linear(z, wo_b, wo_b_scale)
