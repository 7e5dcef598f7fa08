"""Paged cache writes of whole rows (spec/v4.md 4.4, 6.5); byte formats are in `cache_bytes`."""

from __future__ import annotations

import torch

from dsv4_backend.contract import Operator, Tolerance, operator


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


def check_slots(contract: Operator, slots: torch.Tensor, capacity: int, unique: bool) -> None:
    """ArgumentError unless every slot is -1 or in [0, capacity) and,
    if `unique`, no slot stands twice.
    """
    outside = ((slots < -1) | (slots >= capacity)).nonzero()
    if len(outside):
        i = int(outside[0])
        raise contract.reject(
            "slots", f"{slots[i].item()} at {i}", f"-1 or a slot in [0, {capacity})"
        )
    ordered = slots[slots >= 0].sort().values
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if unique and len(repeated):
        raise contract.reject("slots", f"{repeated[0].item()} more than once", "every slot once")


@operator(
    "write_cache(Tensor(a!) cache, Tensor rows, Tensor slots) -> ()",
    rows=(21,),
    arguments={
        "cache": "float [num_blocks, block_size, D]",
        "rows": "float like cache [M, D]",
        "slots": "i64 [M]",
    },
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


@write_cache.shapes
def _(cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> None:
    if cache.shape[0] * cache.shape[1] < 1:
        raise write_cache.reject("cache", f"shape {tuple(cache.shape)}", "at least one row")


@write_cache.contents
def _(cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> None:
    check_slots(write_cache, slots, cache.shape[0] * cache.shape[1], unique=True)
