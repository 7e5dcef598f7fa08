"""Sparse attention over FP8 rows as Ascend A5 keeps them (spec/deployments.md 7)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from dsv4_backend import ragged
from dsv4_backend.contract import Tolerance, operator
from dsv4_backend.expressions import Symbol
from dsv4_backend.ops.attention import ARGUMENTS, AttentionCall, attend_by_tokens
from dsv4_backend.ops.attention_p512 import ABSOLUTE_RELATIONS, attend_blocks
from dsv4_backend.ops.cache_formats import FORMATS, Format, from_bytes, sized
from dsv4_backend.relations import Relation, require

FORMAT = next(form for form in FORMATS if form.name == "kv_epilog")
"""The bytes of a row; one section, so that a row is its fields one behind the other."""


class Seen(NamedTuple):
    """Rows of every sequence that a call may look at: first[s] .. after[s] - 1, `rows` at most."""

    first: torch.Tensor
    after: torch.Tensor
    rows: int


def window_rows(call: AttentionCall, max_seq_len: int) -> Seen:
    """Positions of the windows of all tokens of a sequence."""
    new = call.query_start_loc.diff()
    first = (call.seq_lens - new + (1 - call.window)).clamp(min=0)
    after = torch.where(new > 0, call.seq_lens, 0)
    return Seen(first, after, max(1, min(call.window - 1 + len(call.q), max_seq_len)))


def compressed_rows(call: AttentionCall, max_seq_len: int) -> Seen:
    """All closed entries of a sequence."""
    after = ragged.entries_to_read(call.query_start_loc, call.seq_lens, call.ratio)
    return Seen(torch.zeros_like(after), after, max(1, max_seq_len // call.ratio))


def widened(
    form: Format, cache: torch.Tensor, block_table: torch.Tensor, seen: Seen, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """One page of float rows per sequence, and its table, a ring: [R, rows, D], int32 [R, 1]."""
    first, after = seen.first[:, None], seen.after[:, None]
    owners = torch.arange(len(first), device=cache.device)[:, None]
    index = first + (torch.arange(seen.rows, device=cache.device) - first) % seen.rows
    index = index.masked_fill(index >= after, -1)
    data = ragged.gather_rows(cache, ragged.slots(block_table, owners, index, cache.shape[1]))
    rows = from_bytes(form, data.flatten(0, 1)).to(dtype)
    return rows.view(*index.shape, form.codec.channels), owners.int()


def _rows_of(cache: str, size: str) -> Relation:
    """The bytes of a row, by the name that they have, are the format's."""
    channels: Any = Symbol("D")
    rope: Any = Symbol("rope")
    wanted = sized(FORMAT, channels, rope).entry_bytes
    return require(
        cache,
        f"{size} == {wanted}",
        f"rows of {{{size}}} bytes",
        f"{{{wanted}}} bytes for {{D}} channels, {{rope}} of RoPE",
        f"rows of {FORMAT.name}",
    )


@operator(
    "sparse_attention_fp8(Tensor q, Tensor sink, Tensor window_cache, Tensor window_block_table, "
    "Tensor? cmp_cache, Tensor? cmp_block_table, Tensor? cmp_indices, Tensor query_start_loc, "
    "Tensor seq_lens, int max_seq_len, int window, int ratio, int rope=64) -> Tensor",
    rows=(16,),
    arguments={
        **ARGUMENTS,
        "q": "bf16 [T, H, D]",
        "window_cache": "u8 [num_blocks, block_size, bytes]",
        "cmp_cache": "u8 [cmp_blocks, cmp_block_size, cmp_bytes]",
        "max_seq_len": "at least 0",
        "rope": "at least 1",
    },
    relations=(
        *ABSOLUTE_RELATIONS,
        require("rope", "rope < D", "{rope}", "fewer than the {D} channels of q"),
        _rows_of("window_cache", "bytes"),
        _rows_of("cmp_cache", "cmp_bytes"),
    ),
    tolerance=Tolerance(
        reason="rows of FP8 codes and powers of two are exact in bf16; then as "
        "sparse_attention_p512: a probability next to a midpoint may tip, 2^-8 of it, and the "
        "result may land on the other neighbour (2^-7)",
        **{"a5-mx": (2**-9, 2**-7)},
    ),
)
def sparse_attention_fp8(
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
    rope: int = 64,
) -> torch.Tensor:
    """`sparse_attention_p512` over caches of bytes: rows in the format kv_epilog.

    Arguments as in `sparse_attention_p512`, but: q is bf16; caches are uint8 [num_blocks,
    block_size, bytes] with the rows that `write_cache_kv_epilog` writes for D channels, the last
    `rope` of them the RoPE part (608 bytes for 512 and 64). Every row that is looked at is
    `read_cache_kv_epilog` of it, rounded to bf16; the attention is that of `sparse_attention_p512`.
    Returns bf16 [T, H, D]. T = 0 gives an empty result. Bytes of hidden rows do not matter. A scale
    that is no power of two is allowed. ArgumentError for dtypes, offsets, lengths, blocks, indices
    or rows that do not fit. Source: aclnnMixedQuantSparseFlashMla with quantMode 1
    (spec/deployments.md 7), spec/v4.md 4.2, 4.6.
    """
    caches = (window_cache, window_block_table, cmp_cache, cmp_block_table, cmp_indices)
    call = AttentionCall(q, sink, *caches, query_start_loc, seq_lens, window, ratio)
    form = sized(FORMAT, q.shape[2], rope)
    seen = window_rows(call, max_seq_len)
    near, near_table = widened(form, window_cache, window_block_table, seen, q.dtype)
    call = call._replace(window_cache=near, window_block_table=near_table)
    if cmp_cache is not None and cmp_block_table is not None:
        seen = compressed_rows(call, max_seq_len)
        far, far_table = widened(form, cmp_cache, cmp_block_table, seen, q.dtype)
        call = call._replace(cmp_cache=far, cmp_block_table=far_table)
    return attend_by_tokens(call, attend_blocks)
