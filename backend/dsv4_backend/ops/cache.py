"""Paged cache writes in every row format of spec/v4.md 6.5."""

from __future__ import annotations

import torch

from dsv4_backend.contract import Operator, Tolerance, operator
from dsv4_backend.ops.cache_formats import FORMATS, Format


def _targets(slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where to write (int64 [M+1]) and which of M+1 rows to write there, row M being what slot 0 holds already.

    A skipped row repeats the write of a row that is not skipped, or else rewrites slot 0: shapes stay static.
    """
    padded = torch.cat([slots, slots.new_full((1,), -1)])
    own = torch.arange(padded.shape[0], device=slots.device)
    pivot = padded.argmax()
    source = torch.where(padded >= 0, own, torch.where(padded[pivot] >= 0, pivot, own[-1]))
    return padded[source].clamp(min=0), source


@operator(
    "write_cache(Tensor(a!) cache, Tensor rows, Tensor slots) -> ()",
    rows=(21,),
    arguments={"cache": "float [num_blocks, block_size, D]", "rows": "float [M, D]", "slots": "i64 [M]"},
    tolerance=Tolerance(reason="copies: bit equality"),
)
def write_cache(cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> None:
    """Copy rows into a paged cache: `cache[slot // block_size, slot % block_size] = row`.

    cache: [num_blocks, block_size, D] float, any strides, mutated; rows: [M, D], same dtype; slots: int64 [M], flat
    `block * block_size + offset` in [0, num_blocks * block_size), or -1 to skip the row. A slot given twice is an error.
    Nothing else in the cache changes; zero rows change nothing. Gradients reach rows and the old cache.
    Source: spec/v4.md 4.4, 6.5 (bf16 rows).
    """
    target, source = _targets(slots)
    values = torch.cat([rows, cache[0, :1]])[source]
    # a repeated write must not carry its row's gradient twice
    first = (source == torch.arange(source.shape[0], device=source.device)).unsqueeze(-1)
    values = torch.where(first, values, values.detach())
    cache.index_put_((target // cache.shape[1], target % cache.shape[1]), values)


def _write_bytes(form: Format, cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, block_size: int) -> None:
    target, source = _targets(slots)
    columns = form.columns(target % block_size, block_size)
    present = cache[:1].gather(1, form.columns(target.new_zeros(1), block_size))
    data = torch.cat([form.to_bytes(rows), present])[source]
    cache.index_put_(((target // block_size).unsqueeze(-1), columns), data)


def _read_bytes(form: Format, cache: torch.Tensor, slots: torch.Tensor, block_size: int) -> torch.Tensor:
    flat = slots.clamp(min=0)
    data = cache[(flat // block_size).unsqueeze(-1), form.columns(flat % block_size, block_size)]
    return torch.where((slots >= 0).unsqueeze(-1), form.from_bytes(data), 0.0)


def _check_slots(contract: Operator, slots: torch.Tensor, capacity: int, unique: bool) -> None:
    outside = ((slots < -1) | (slots >= capacity)).nonzero()
    if len(outside):
        i = int(outside[0])
        raise contract.reject("slots", f"{slots[i].item()} at {i}", f"-1 or a slot in [0, {capacity})")
    used = slots[slots >= 0]
    values, counts = used.unique(return_counts=True)
    if unique and len(values) != len(used):
        raise contract.reject("slots", f"{values[counts > 1][0].item()} more than once", "every slot once")


def _check_page(contract: Operator, form: Format, cache: torch.Tensor, block_size: int) -> None:
    if block_size < 1:
        raise contract.reject("block_size", block_size, "at least 1")
    expected = form.page_bytes(block_size)
    if cache.shape[0] < 1 or cache.shape[1] != expected:
        raise contract.reject(
            "cache", f"shape {tuple(cache.shape)}", f"[num_blocks >= 1, {expected}] for {block_size} entries"
        )


def _declare_write(form: Format) -> Operator:
    def reference(cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, block_size: int) -> None:
        _write_bytes(form, cache, rows, slots, block_size)

    contract = operator(
        f"write_cache_{form.name}(Tensor(a!) cache, Tensor rows, Tensor slots, int block_size) -> ()",
        rows=(21,),
        arguments={"cache": "u8 [num_blocks, page]", "rows": f"float [M, {form.codec.channels}]", "slots": "i64 [M]"},
        tolerance=Tolerance(reason="one rounding rule per format, no sums: bit equality of the page"),
    )(reference)
    contract.shapes(lambda cache, rows, slots, block_size: _check_page(contract, form, cache, block_size))
    contract.contents(
        lambda cache, rows, slots, block_size: _check_slots(contract, slots, cache.shape[0] * block_size, unique=True)
    )
    return contract


def _declare_read(form: Format) -> Operator:
    def reference(cache: torch.Tensor, slots: torch.Tensor, block_size: int) -> torch.Tensor:
        return _read_bytes(form, cache, slots, block_size)

    contract = operator(
        f"read_cache_{form.name}(Tensor cache, Tensor slots, int block_size) -> Tensor",
        rows=(21,),
        arguments={"cache": "u8 [num_blocks, page]", "slots": "i64 [M]"},
        tolerance=Tolerance(reason="one exact or once-rounded product per element: bit equality"),
    )(reference)
    contract.shapes(lambda cache, slots, block_size: _check_page(contract, form, cache, block_size))
    contract.contents(
        lambda cache, slots, block_size: _check_slots(contract, slots, cache.shape[0] * block_size, unique=False)
    )
    return contract


WRITES = {form.name: _declare_write(form) for form in FORMATS}
"""Format name -> operator `write_cache_<name>`."""
READS = {form.name: _declare_read(form) for form in FORMATS}
"""Format name -> operator `read_cache_<name>`."""


@write_cache.shapes
def _(cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> None:
    if cache.shape[0] * cache.shape[1] < 1:
        raise write_cache.reject("cache", f"shape {tuple(cache.shape)}", "at least one row")
    if rows.dtype != cache.dtype:
        raise write_cache.reject("rows", str(rows.dtype), f"{cache.dtype} like the cache")


@write_cache.contents
def _(cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> None:
    _check_slots(write_cache, slots, cache.shape[0] * cache.shape[1], unique=True)
