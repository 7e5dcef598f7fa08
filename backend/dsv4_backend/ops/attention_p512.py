"""Sparse attention as Ascend's kernels round it: in blocks of 512 keys (spec/deployments.md 7)."""

from __future__ import annotations

from typing import Any

import torch

from dsv4_backend import ragged
from dsv4_backend.contract import DEPLOYMENTS, Operator, Tolerance, compute, operator
from dsv4_backend.ops.attention import (
    ARGUMENTS,
    AttentionCall,
    Keys,
    attend_by_tokens,
    check_contents,
    check_shapes,
    round_probabilities,
    score_keys,
)
from dsv4_backend.tiles import spans

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


def _call(*arguments: Any) -> tuple[AttentionCall, int]:
    """The call, and max_seq_len."""
    return AttentionCall(*arguments[:9], *arguments[10:]), arguments[9]


def check_absolute_shapes(contract: Operator, call: AttentionCall, max_seq_len: int) -> None:
    """ArgumentError of `contract` for shapes that do not fit, or tables that do not reach."""
    check_shapes(contract, call)
    name, table = contract.name, call.window_block_table
    ragged.check_absolute(name, "window_block_table", table, call.window_cache, max_seq_len)
    if call.cmp_cache is not None and call.cmp_block_table is not None:
        rows, table = max_seq_len // call.ratio, call.cmp_block_table
        ragged.check_absolute(name, "cmp_block_table", table, call.cmp_cache, rows)


def check_absolute_contents(contract: Operator, call: AttentionCall, max_seq_len: int) -> None:
    """ArgumentError of `contract` for lengths, sinks, blocks or indices that do not fit."""
    check_contents(contract, call)
    ragged.check_bound(contract.name, max_seq_len, call.seq_lens)
    if not call.sink.isfinite().all():
        head = int((~call.sink.isfinite()).nonzero()[0])
        raise contract.reject("sink", f"{float(call.sink[head])} of head {head}", "finite values")
    if call.cmp_indices is not None and call.cmp_indices.shape[1]:
        absent = call.cmp_indices < 0
        behind = (absent[:, :-1] & ~absent[:, 1:]).nonzero()
        if len(behind):
            t, j = behind[0].tolist()
            raise contract.reject(
                "cmp_indices", f"-1 at [{t}, {j}] before an entry", "-1 behind all entries of a row"
            )


@sparse_attention_p512.shapes
def _(*arguments: Any) -> None:
    check_absolute_shapes(sparse_attention_p512, *_call(*arguments))


@sparse_attention_p512.contents
def _(*arguments: Any) -> None:
    check_absolute_contents(sparse_attention_p512, *_call(*arguments))
