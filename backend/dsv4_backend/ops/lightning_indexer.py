"""Scores and selection of the lightning indexer in one step, as Ascend's kernels do it
(spec/deployments.md 6).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import pad

from dsv4_backend import ragged
from dsv4_backend.contract import Operator, Tolerance, operator
from dsv4_backend.ops.attention import visible_entries
from dsv4_backend.ops.indexer import ENTRIES, SORT_BYTES, IndexerCall, best, key_rows
from dsv4_backend.relations import ONE_MORE_OFFSET, absolute, batch, bound, entries, paged
from dsv4_backend.tiles import by_tokens, spans

_REASON = (
    "compared are the scores of the chosen entries in order, so that which of two equal entries is "
    "chosen is open; fp32 sums of 64 heads in any order"
)
MOST_CHOSEN = 1 << 20
"""As many as a context of V4 has tokens: a larger number is a mistake, and would only waste memory,
because all k columns are returned.
"""
_LENGTHS = {
    "block_table": "i32 [R, columns]",
    "query_start_loc": "i32 [S]",
    "seq_lens": "i32 [R]",
    "max_seq_len": "at least 0",
    "ratio": "at least 1",
    "k": f"1 to {MOST_CHOSEN}",
}
_RELATIONS = (
    paged("k_cache"),
    ONE_MORE_OFFSET,
    absolute("block_table", "max_seq_len // ratio"),
    batch(),
    bound("max_seq_len"),
    entries("block_table", "k_cache"),
)
_TAIL = (
    "Tensor block_table, Tensor query_start_loc, Tensor seq_lens, int max_seq_len, int ratio, "
    "int k) -> Tensor"
)


class Selection(NamedTuple):
    """What is scored, and how many entries are chosen.

    q_scale: [T, HI] and k_scale: [num_blocks, block_size] of codes, None for values.
    """

    indexer: IndexerCall
    q_scale: torch.Tensor | None
    k_scale: torch.Tensor | None
    k: int


def _keys(call: IndexerCall, owners: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Keys or their codes in fp32: [T, n, DI]."""
    if call.k_cache.dtype != torch.float8_e4m3fn:
        return key_rows(call, owners, index)
    # torch neither masks nor gathers FP8: as bytes, which fp32 holds.
    codes = key_rows(call._replace(k_cache=call.k_cache.view(torch.int8)), owners, index)
    return codes.to(torch.int8).view(torch.float8_e4m3fn).float()


def weighted(dots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`sum_h relu(dot[t, h, i]) * weight[t, h]` in fp32: [T, n]."""
    return (dots.relu() * weights.float()[:, :, None]).sum(1)


def scaled(
    dots: torch.Tensor, q_scale: torch.Tensor | None, k_scale: torch.Tensor | None
) -> torch.Tensor:
    """Dots [T, HI, n] of codes times the scales of their rows, [T, HI] and [T, n]."""
    if q_scale is None or k_scale is None:
        return dots
    return dots * q_scale.float()[:, :, None] * k_scale.float()[:, None]


def selectable(scores: torch.Tensor, codes: torch.dtype) -> torch.Tensor:
    """Scores as the selection sees them: of e4m3 rows in bf16."""
    return scores.bfloat16().float() if codes == torch.float8_e4m3fn else scores


def _scores(
    call: Selection, owners: torch.Tensor, part: slice, index: torch.Tensor
) -> torch.Tensor:
    """Scores of the entries `index` [n] for some tokens: [T, n]."""
    indexer, scale = call.indexer, None
    if call.k_scale is not None:
        of_keys = indexer._replace(k_cache=call.k_scale.unsqueeze(-1))
        scale = key_rows(of_keys, owners[part], index).squeeze(-1)
    keys = _keys(indexer, owners[part], index)
    dots = torch.bmm(indexer.q[part].float(), keys.transpose(1, 2))
    q_scale = None if call.q_scale is None else call.q_scale[part]
    return weighted(scaled(dots, q_scale, scale), indexer.weights[part])


def select(call: Selection) -> torch.Tensor:
    """The entries that each token chooses: int32 [T, k]."""
    indexer, tokens = call.indexer, call.indexer.q.shape[0]
    owners = ragged.token_sequences(indexer.query_start_loc, tokens)
    positions = ragged.token_positions(indexer.query_start_loc, indexer.seq_lens, tokens)
    visible = visible_entries(positions, indexer.ratio)
    entries = indexer.block_table.shape[1] * indexer.k_cache.shape[1]
    index = torch.arange(entries, device=indexer.q.device)

    def choose(part: slice) -> torch.Tensor:
        found = [_scores(call, owners, part, index[span]) for span in spans(entries, ENTRIES)]
        scores = selectable(torch.cat(found, 1), indexer.q.dtype)
        chosen = best(scores, visible[part], call.k)
        return pad(chosen, (0, call.k - chosen.shape[1]), value=-1)

    _, heads, width = indexer.q.shape
    of_token = min(entries, ENTRIES) * 4 * (3 * heads + 2 * width) + SORT_BYTES * entries
    return by_tokens(choose, tokens, of_token)


@operator(
    f"lightning_indexer(Tensor q, Tensor k_cache, Tensor weights, {_TAIL}",
    rows=(14, 15),
    arguments={
        "q": "float [T, HI, DI]",
        "k_cache": "float like q [num_blocks, block_size, DI]",
        "weights": "f32 [T, HI]",
        **_LENGTHS,
    },
    relations=_RELATIONS,
    tolerance=Tolerance(reason=_REASON, ideal=(2e-5, 2e-5), official=(2e-5, 2e-5)),
)
def lightning_indexer(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    weights: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    max_seq_len: int,
    ratio: int,
    k: int,
) -> torch.Tensor:
    """The k visible entries of each token with the largest
    `sum_h relu(q[t, h] . key[i]) * weights[t, h]`: int32 [T, k], in any order, then -1.

    q: [T, HI, DI]; k_cache: paged [num_blocks, block_size, DI] in q's dtype, with this call's
    entries in it; weights: fp32 [T, HI], any sign. Scores are fp32. Entries i < (position + 1) //
    ratio are visible; where there are fewer than k all are chosen. Which of equal scores at the end
    is open (the reference: the smaller index). The table is absolute and reaches max_seq_len //
    ratio entries; max_seq_len is at least every seq_lens. T = 0 gives an empty result.
    ArgumentError for dtypes, offsets, lengths or blocks that do not fit. Source:
    aclnnLightningIndexerV2 (spec/deployments.md 6), spec/v4.md 4.5.
    """
    call = IndexerCall(q, k_cache, weights, block_table, query_start_loc, seq_lens, ratio)
    return select(Selection(call, None, None, k))


_QUANTISED = """`lightning_indexer` over rows of codes: int32 [T, k], in any order, then -1.

    q: {codes} [T, HI, DI] with q_scale [T, HI]; k_cache: {codes}, paged [num_blocks, block_size,
    DI], with k_scale [num_blocks, block_size]; weights [T, HI]; scales and weights {scale}. The
    score of entry i is `sum_h relu(q[t, h] . key[i] * q_scale[t, h] * k_scale[i]) * weights[t, h]`
    in fp32{rounded}. The rest as in `lightning_indexer`. Caches may have any stride between blocks.
    Source: aclnnQuantLightningIndexerV2 with quantMode {mode} (spec/deployments.md 6), spec/v4.md
    4.5.
    """


def _quantised(name: str, codes: str, scale: str, rounded: str, mode: int) -> Operator:
    """The operator over rows of codes with a scale each."""

    def reference(
        q: torch.Tensor,
        q_scale: torch.Tensor,
        k_cache: torch.Tensor,
        k_scale: torch.Tensor,
        weights: torch.Tensor,
        block_table: torch.Tensor,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        max_seq_len: int,
        ratio: int,
        k: int,
    ) -> torch.Tensor:
        call = IndexerCall(q, k_cache, weights, block_table, query_start_loc, seq_lens, ratio)
        return select(Selection(call, q_scale, k_scale, k))

    reference.__doc__ = _QUANTISED.format(codes=codes, scale=scale, rounded=rounded, mode=mode)
    return operator(
        f"{name}(Tensor q, Tensor q_scale, Tensor k_cache, Tensor k_scale, Tensor weights, {_TAIL}",
        rows=(14, 15),
        arguments={
            "q": f"{codes} [T, HI, DI]",
            "q_scale": f"{scale} [T, HI]",
            "k_cache": f"{codes} [num_blocks, block_size, DI]",
            "k_scale": f"{scale} [num_blocks, block_size]",
            "weights": f"{scale} [T, HI]",
            **_LENGTHS,
        },
        relations=_RELATIONS,
        tolerance=Tolerance(
            reason=f"{_REASON}; of e4m3 rows they are rounded to bf16 before the selection",
            **{"a2a3-int8": (2e-5, 2e-5), "a5-mx": (2e-5, 2**-7)},
        ),
    )(reference)


lightning_indexer_int8 = _quantised("lightning_indexer_int8", "i8", "f16", "", 2)
lightning_indexer_fp8 = _quantised(
    "lightning_indexer_fp8", "e4m3", "f32", ", rounded to bf16 before the selection", 1
)
LIGHTNING = (lightning_indexer, lightning_indexer_int8, lightning_indexer_fp8)
