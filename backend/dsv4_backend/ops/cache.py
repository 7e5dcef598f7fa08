"""Paged cache writes of whole rows (spec/v4.md 4.4, 6.5); byte formats are in `cache_bytes`."""

from __future__ import annotations

import torch

from dsv4_backend.contract import Tolerance, operator
from dsv4_backend.relations import require, slots_in


def write_targets(slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where to write (int64 [M+1]) and which of M+1 rows to write there,
    row M being what slot 0 holds already.

    A skipped row repeats the write of a row that is not skipped, or else rewrites slot 0: shapes
    stay static.
    """
    padded = torch.cat([slots, slots.new_full((1,), -1)])
    own = torch.arange(padded.shape[0], device=slots.device)
    pivot = padded.argmax(0, keepdim=True)
    source = torch.where(padded >= 0, own, torch.where(padded[pivot] >= 0, pivot, own[-1:]))
    return padded[source].clamp(min=0), source


@operator(
    "write_cache(Tensor(a!) cache, Tensor rows, Tensor slots) -> ()",
    rows=(21,),
    arguments={
        "cache": "float [num_blocks, block_size, D]",
        "rows": "float like cache [M, D]",
        "slots": "i64 [M]",
    },
    relations=(
        require(
            "cache", "num_blocks * block_size >= 1", "shape {sizes(cache)}", "at least one row"
        ),
        *slots_in("num_blocks * block_size", once=True),
    ),
    tolerance=Tolerance(reason="rows are copied, nothing is computed: bit equality"),
)
def write_cache(cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> None:
    """Copy rows into a paged cache: `cache[slot // block_size, slot % block_size] = row`.

    cache: [num_blocks, block_size, D] float of any strides, at least one row, mutated;
    rows: [M, D], same dtype;
    slots: int64 [M], flat `block * block_size + offset`, or -1 to skip the row. Nothing else in the
    cache changes; zero rows change nothing. ArgumentError (nothing written) for a slot outside the
    cache or given twice. Gradients reach rows and the cache's former content. Source: spec/v4.md
    4.4, 6.5 (rows of bf16).
    """
    target, source = write_targets(slots)
    values = torch.cat([rows, cache[0, :1]])[source]
    own = torch.arange(source.shape[0], device=source.device)
    # a repeated write must not carry its row's gradient twice
    values = torch.where((source == own).unsqueeze(-1), values, values.detach())
    cache.index_put_((target // cache.shape[1], target % cache.shape[1]), values)


@operator(
    "write_caches(Tensor(a!) cache, Tensor(b!) other, Tensor rows, Tensor other_rows, "
    "Tensor slots) -> ()",
    rows=(21,),
    arguments={
        "cache": "float [num_blocks, block_size, D]",
        "other": "float like cache [num_blocks, block_size, P]",
        "rows": "float like cache [M, D]",
        "other_rows": "float like cache [M, P]",
        "slots": "i64 [M]",
    },
    relations=(
        require(
            "cache", "num_blocks * block_size >= 1", "shape {sizes(cache)}", "at least one row"
        ),
        *slots_in("num_blocks * block_size", once=True),
    ),
    tolerance=Tolerance(reason="rows are copied, nothing is computed: bit equality"),
)
def write_caches(
    cache: torch.Tensor,
    other: torch.Tensor,
    rows: torch.Tensor,
    other_rows: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """`write_cache` of two caches with the same slots: compressed entries and their index keys.

    cache: [num_blocks, block_size, D] and other: [num_blocks, block_size, P], float of one dtype
    and any strides, at least one row, both mutated; rows: [M, D] and other_rows: [M, P] in that
    dtype; slots: int64 [M], of both, -1 skips a row. ArgumentError (nothing written) for a slot
    outside the caches or given twice. Source: spec/v4.md 4.4, 4.5; aclnnScatterPaKvCache.
    """
    write_cache.reference(cache, rows, slots)
    write_cache.reference(other, other_rows, slots)
