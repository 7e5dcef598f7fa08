"""Sparse attention as Ascend's kernels round it: in blocks of 512 keys (spec/deployments.md 7)."""

from __future__ import annotations

import torch

from dsv4_backend.contract import DEPLOYMENTS, Tolerance, compute, operator
from dsv4_backend.ops.attention import (
    ARGUMENTS,
    RELATIONS,
    AttentionCall,
    Keys,
    attend_by_tokens,
    round_probabilities,
    score_keys,
)
from dsv4_backend.relations import absolute, bound, finite, trailing
from dsv4_backend.tiles import spans

ABSOLUTE_RELATIONS = (
    *RELATIONS,
    absolute("window_block_table", "max_seq_len"),
    absolute("cmp_block_table", "max_seq_len // ratio", "cmp_block_size cmp_columns"),
    bound("max_seq_len"),
    finite("sink", "{value} of head {index}"),
    trailing("cmp_indices"),
)
"""What attention over absolute tables asks of its arguments together."""
BLOCK = 512
"""Keys whose probabilities are rounded against one maximum."""


def attend_blocks(
    q: torch.Tensor, sink: torch.Tensor, parts: list[Keys], block: int = BLOCK
) -> torch.Tensor:
    """An online softmax that starts with the sink and takes each part in blocks:
    [T, H, D] in q's dtype.
    """
    wide = compute(q)
    top = sink.to(wide.dtype)[:, None].expand(len(q), -1, 1)
    total, mixed = torch.ones_like(top), torch.zeros_like(wide)
    for keys in parts:
        for span in spans(keys.valid.shape[1], block):
            some = Keys(keys.rows[:, span], keys.valid[:, span], keys.hidden_rows)
            if some.valid.shape[1] == 0:
                continue
            scores = score_keys(wide, some)
            raised = torch.maximum(top, scores.amax(-1, keepdim=True))
            p, kept = (scores - raised).exp(), (top - raised).exp()
            total = total * kept + p.sum(-1, keepdim=True)
            mixed = mixed * kept + torch.bmm(round_probabilities(p, q.dtype), some.values())
            top = raised
    return (mixed / total).to(q.dtype)


@operator(
    "sparse_attention_p512(Tensor q, Tensor sink, Tensor window_cache, Tensor window_block_table, "
    "Tensor? cmp_cache, Tensor? cmp_block_table, Tensor? cmp_indices, Tensor query_start_loc, "
    "Tensor seq_lens, int max_seq_len, int window, int ratio) -> Tensor",
    rows=(16,),
    arguments={
        **ARGUMENTS,
        "q": "bf16|f16 [T, H, D]",
        "window_cache": "bf16|f16 like q [num_blocks, block_size, D]",
        "cmp_cache": "bf16|f16 like q [cmp_blocks, cmp_block_size, D]",
        "max_seq_len": "at least 0",
    },
    relations=ABSOLUTE_RELATIONS,
    tolerance=Tolerance(
        reason="as sparse_attention: a probability next to a midpoint may tip, 2^-8 of it, and "
        "the result may land on the other neighbour (2^-7)",
        **dict.fromkeys(DEPLOYMENTS, (2**-9, 2**-7)),
    ),
)
def sparse_attention_p512(
    q: torch.Tensor,
    sink: torch.Tensor,
    window_cache: torch.Tensor,
    window_block_table: torch.Tensor,
    cmp_cache: torch.Tensor | None,
    cmp_block_table: torch.Tensor | None,
    cmp_indices: torch.Tensor | None,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    max_seq_len: int,
    window: int,
    ratio: int,
) -> torch.Tensor:
    """`sparse_attention` of bf16 or fp16 with the roundings of Ascend's kernels.

    Arguments as in `sparse_attention`, but: tables are absolute (column j holds indices j *
    block_size and following) and reach max_seq_len, which is at least every seq_lens; sink is
    finite; in a row of cmp_indices -1 stands behind all entries. An online softmax starts from the
    sink, maximum sink and sum 1, and takes first the window's keys, then the compressed entries,
    each in blocks of 512: a = (q . k) * D^-0.5 in fp32; m = max(m, a); p = exp(a - m); p is cast
    to q's dtype for the product with the values only; earlier sums are multiplied by exp(old m -
    m). One cast of the quotient. Returns [T, H, D] in q's dtype. T = 0 gives an empty result. NaN
    in hidden rows does not matter. ArgumentError for dtypes, offsets, lengths, blocks, or indices
    that do not fit. Source: aclnnSparseFlashMla (spec/deployments.md 7), spec/v4.md 4.2, 4.6.
    """
    caches = (window_cache, window_block_table, cmp_cache, cmp_block_table, cmp_indices)
    call = AttentionCall(q, sink, *caches, query_start_loc, seq_lens, window, ratio)
    return attend_by_tokens(call, attend_blocks)
