"""Paged caches in byte formats: one write and one read operator per row of `cache_formats.FORMATS` (spec/v4.md 6.5)."""

from __future__ import annotations

import torch

from dsv4_backend.contract import Operator, Tolerance, operator
from dsv4_backend.ops.cache import check_slots, write_targets
from dsv4_backend.ops.cache_formats import FORMATS, Format, data_columns, from_bytes, to_bytes

_WRITE_DOC = """Quantise rows and write their bytes into a paged cache in the format {name}.

    cache: uint8 [num_blocks, {page}], any stride between pages, mutated; rows: [M, {channels}] float; slots: int64 [M],
    flat `block * block_size + offset`, or -1 to skip the row; block_size: entries per page.
    Page: {layout}. Padding and all other bytes keep their content; zero rows change nothing.
    Rounding, from fp32 values: {rule}.
    ArgumentError (nothing written) for a slot outside the cache or given twice. No gradient. Source: spec/v4.md 6.5.
    """

_READ_DOC = """Rows of a paged cache in the format {name}, as they were quantised.

    cache: uint8 [num_blocks, {page}]; slots: int64 [M], flat `block * block_size + offset`, in any order and any number
    of times, or -1; block_size: entries per page. Page: {layout}.
    Returns fp32 [M, {channels}]: value times scale, one fp32 product (exact for power-of-two and fp16 scales); rows of
    slot -1 are 0. Zero slots give an empty result. ArgumentError for a slot outside the cache. Source: spec/v4.md 6.5.
    """


def write_bytes(form: Format, cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, block_size: int) -> None:
    """Reference of every write: cache uint8 [num_blocks, page], rows [M, channels] float, slots int64 [M]."""
    target, source = write_targets(slots)
    present = cache[:1].gather(1, data_columns(form, target.new_zeros(1), block_size))
    data = torch.cat([to_bytes(form, rows), present])[source]
    cache.index_put_(((target // block_size).unsqueeze(-1), data_columns(form, target % block_size, block_size)), data)


def read_bytes(form: Format, cache: torch.Tensor, slots: torch.Tensor, block_size: int) -> torch.Tensor:
    """Reference of every read: cache uint8 [num_blocks, page], slots int64 [M] -> fp32 [M, channels]."""
    entry = slots.clamp(min=0)
    data = cache[(entry // block_size).unsqueeze(-1), data_columns(form, entry % block_size, block_size)]
    return torch.where((slots >= 0).unsqueeze(-1), from_bytes(form, data), 0.0)


def _check_page(contract: Operator, form: Format, cache: torch.Tensor, block_size: int) -> None:
    expected = form.page_bytes(block_size)
    if cache.shape[0] < 1 or cache.shape[1] != expected:
        wanted = f"[num_blocks >= 1, {expected}] for {block_size} entries of {form.name} per page"
        raise contract.reject("cache", f"shape {tuple(cache.shape)}", wanted)


def _document(template: str, form: Format) -> str:
    page = f"ceil(block_size*{form.entry_bytes}/{form.page_multiple})*{form.page_multiple}"
    return template.format(
        name=form.name,
        page=page if form.page_multiple > 1 else f"block_size*{form.entry_bytes}",
        channels=form.codec.channels,
        layout=form.describe(),
        rule=form.codec.rule,
    )


def _declare_write(form: Format) -> Operator:
    def reference(cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, block_size: int) -> None:
        write_bytes(form, cache, rows, slots, block_size)

    reference.__doc__ = _document(_WRITE_DOC, form)
    contract = operator(
        f"write_cache_{form.name}(Tensor(a!) cache, Tensor rows, Tensor slots, int block_size) -> ()",
        rows=(21,),
        arguments={
            "cache": "u8 [num_blocks, page]",
            "rows": f"float [M, {form.codec.channels}]",
            "slots": "i64 [M]",
            "block_size": "at least 1",
        },
        tolerance=Tolerance(reason="one rounding rule per format and no sums: every bit of the page is decided"),
    )(reference)

    @contract.shapes
    def _(cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, block_size: int) -> None:
        _check_page(contract, form, cache, block_size)

    @contract.contents
    def _(cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, block_size: int) -> None:
        check_slots(contract, slots, cache.shape[0] * block_size, unique=True)

    return contract


def _declare_read(form: Format) -> Operator:
    def reference(cache: torch.Tensor, slots: torch.Tensor, block_size: int) -> torch.Tensor:
        return read_bytes(form, cache, slots, block_size)

    reference.__doc__ = _document(_READ_DOC, form)
    contract = operator(
        f"read_cache_{form.name}(Tensor cache, Tensor slots, int block_size) -> Tensor",
        rows=(21,),
        arguments={"cache": "u8 [num_blocks, page]", "slots": "i64 [M]", "block_size": "at least 1"},
        tolerance=Tolerance(reason="one fp32 product per element, rounded at most once: bit equality"),
    )(reference)

    @contract.shapes
    def _(cache: torch.Tensor, slots: torch.Tensor, block_size: int) -> None:
        _check_page(contract, form, cache, block_size)

    @contract.contents
    def _(cache: torch.Tensor, slots: torch.Tensor, block_size: int) -> None:
        check_slots(contract, slots, cache.shape[0] * block_size, unique=False)

    return contract


WRITES = {form.name: _declare_write(form) for form in FORMATS}
"""Format name -> operator `write_cache_<name>`."""
READS = {form.name: _declare_read(form) for form in FORMATS}
"""Format name -> operator `read_cache_<name>`."""
