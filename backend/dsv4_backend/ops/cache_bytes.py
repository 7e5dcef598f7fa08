"""Paged caches in byte formats: one write and one read operator per row
of `cache_formats.FORMATS` (spec/v4.md 6.5).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dsv4_backend.contract import Operator, Tolerance, operator
from dsv4_backend.ops.cache import check_slots, write_targets
from dsv4_backend.ops.cache_formats import (
    FORMATS,
    INDEXER,
    LATENT_CHANNELS,
    ROPE,
    Format,
    data_columns,
    from_bytes,
    sized,
    to_bytes,
)

_WRITE_DOC = """Quantise rows and write their bytes into a paged cache in the format {name}.

    cache: uint8 [num_blocks, page bytes], any stride between pages, mutated;
    rows: [M, {channels}] float; slots: int64 [M], flat `block * block_size + offset`,
    or -1 to skip the row; block_size: entries per page.{widths}
    Page of {channels} channels: {layout}.
    Padding and all other bytes keep their content; zero rows change nothing.
    Rounding, from fp32 values: {rule}.
    ArgumentError (nothing written) for a slot outside the cache or given twice. No gradient.
    Source: spec/v4.md 6.5.
    """

_READ_DOC = """Rows of a paged cache in the format {name}, as they were quantised.

    cache: uint8 [num_blocks, page bytes]; slots: int64 [M], flat `block * block_size + offset`,
    in any order and any number of times, or -1; block_size: entries per page;
    channels: of a row.{widths}
    Page of {channels} channels: {layout}.
    Returns fp32 [M, channels]: value times scale, one fp32 product (exact for power-of-two and fp16
    scales); rows of slot -1 are 0. Zero slots give an empty result.
    ArgumentError for a slot outside the cache. Source: spec/v4.md 6.5.
    """

_LATENT_WIDTHS = " rope: how many of the last channels are the RoPE part, fewer than all."
_LATENT_PADDING = {
    "fp8_ds_mla": " Of other widths: a scale per 64 channels before RoPE, "
    "scales padded to a multiple of 8.",
    "a5": " Of other widths: a scale per 64 channels before RoPE, "
    "entries padded to a multiple of 128 bytes.",
    "kv_epilog": " Of other widths: a scale per 64 channels before RoPE, "
    "entries filled up with zeros to a multiple of 32 bytes.",
}


def write_bytes(
    form: Format, cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, block_size: int
) -> None:
    """Reference of every write: cache uint8 [num_blocks, page],
    rows [M, channels] float, slots int64 [M].
    """
    target, source = write_targets(slots)
    present = cache[:1].gather(1, data_columns(form, target.new_zeros(1), block_size))
    data = torch.cat([to_bytes(form, rows), present])[source]
    cache.index_put_(
        ((target // block_size).unsqueeze(-1), data_columns(form, target % block_size, block_size)),
        data,
    )


def read_bytes(
    form: Format, cache: torch.Tensor, slots: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Reference of every read: cache uint8 [num_blocks, page],
    slots int64 [M] -> fp32 [M, channels].
    """
    entry = slots.clamp(min=0)
    page = (entry // block_size).unsqueeze(-1)
    data = cache[page, data_columns(form, entry % block_size, block_size)]
    return torch.where((slots >= 0).unsqueeze(-1), from_bytes(form, data), 0.0)


def _check_page(contract: Operator, form: Format, cache: torch.Tensor, block_size: int) -> None:
    expected = form.page_bytes(block_size)
    if cache.shape[0] < 1 or cache.shape[1] != expected:
        wanted = f"[num_blocks >= 1, {expected}] for {block_size} entries of {form.name} per page"
        raise contract.reject("cache", f"shape {tuple(cache.shape)}", wanted)


def _check_widths(
    contract: Operator, form: Format, argument: str, channels: int, rope: int
) -> None:
    least = 2 if form.name == "indexer_mxfp4" else 1
    if channels % least or channels - rope < 1:
        even = "an even number of channels" if least > 1 else "at least one channel before RoPE"
        raise contract.reject(argument, f"{channels} channels, {rope} of RoPE", even)


def _document(template: str, form: Format) -> str:
    widths = _LATENT_WIDTHS + _LATENT_PADDING[form.name] if form.latent else ""
    return template.format(
        name=form.name,
        channels=form.codec.channels,
        layout=form.describe(),
        rule=form.codec.rule,
        widths=widths,
    )


def _latent_write(form: Format) -> Callable[..., None]:
    def write_latents(
        cache: torch.Tensor,
        rows: torch.Tensor,
        slots: torch.Tensor,
        block_size: int,
        rope: int = ROPE,
    ) -> None:
        write_bytes(sized(form, rows.shape[1], rope), cache, rows, slots, block_size)

    return write_latents


def _key_write(form: Format) -> Callable[..., None]:
    def write_keys(
        cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, block_size: int
    ) -> None:
        write_bytes(sized(form, rows.shape[1], 0), cache, rows, slots, block_size)

    return write_keys


def _latent_read(form: Format) -> Callable[..., torch.Tensor]:
    def read_latents(
        cache: torch.Tensor,
        slots: torch.Tensor,
        block_size: int,
        channels: int = LATENT_CHANNELS,
        rope: int = ROPE,
    ) -> torch.Tensor:
        return read_bytes(sized(form, channels, rope), cache, slots, block_size)

    return read_latents


def _key_read(form: Format) -> Callable[..., torch.Tensor]:
    def read_keys(
        cache: torch.Tensor, slots: torch.Tensor, block_size: int, channels: int = INDEXER
    ) -> torch.Tensor:
        return read_bytes(sized(form, channels, 0), cache, slots, block_size)

    return read_keys


def _declare(
    form: Format, schema: str, reference: Callable[..., Any], lines: dict[str, str], why: str
) -> Operator:
    """The contract of a write or a read; `lines` are of its own arguments."""
    reference.__doc__ = _document(_WRITE_DOC if "rows" in lines else _READ_DOC, form)
    rope = {"rope": "at least 1"} if form.latent else {}
    arguments = {
        "cache": "u8 [num_blocks, page]",
        "slots": "i64 [M]",
        "block_size": "at least 1",
        **lines,
        **rope,
    }
    return operator(schema, rows=(21,), arguments=arguments, tolerance=Tolerance(reason=why))(
        reference
    )


def _declare_write(form: Format) -> Operator:
    latent = form.latent
    contract = _declare(
        form,
        f"write_cache_{form.name}(Tensor(a!) cache, Tensor rows, Tensor slots, int block_size"
        f"{f', int rope={ROPE}' if latent else ''}) -> ()",
        _latent_write(form) if latent else _key_write(form),
        {"rows": "float [M, D]"},
        "one rounding rule per format and no sums: every bit of the page is decided",
    )

    @contract.shapes
    def _(
        cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, block_size: int, rope: int = 0
    ) -> None:
        _check_widths(contract, form, "rows", rows.shape[1], rope)
        _check_page(contract, sized(form, rows.shape[1], rope), cache, block_size)

    @contract.contents
    def _(
        cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, block_size: int, rope: int = 0
    ) -> None:
        check_slots(contract, slots, cache.shape[0] * block_size, unique=True)

    return contract


def _declare_read(form: Format) -> Operator:
    latent = form.latent
    contract = _declare(
        form,
        f"read_cache_{form.name}(Tensor cache, Tensor slots, int block_size, "
        f"int channels={form.codec.channels}{f', int rope={ROPE}' if latent else ''}) -> Tensor",
        _latent_read(form) if latent else _key_read(form),
        {"channels": "at least 1"},
        "one fp32 product per element, rounded at most once: bit equality",
    )

    @contract.shapes
    def _(
        cache: torch.Tensor, slots: torch.Tensor, block_size: int, channels: int, rope: int = 0
    ) -> None:
        _check_widths(contract, form, "channels", channels, rope)
        _check_page(contract, sized(form, channels, rope), cache, block_size)

    @contract.contents
    def _(
        cache: torch.Tensor, slots: torch.Tensor, block_size: int, channels: int, rope: int = 0
    ) -> None:
        check_slots(contract, slots, cache.shape[0] * block_size, unique=False)

    return contract


WRITES = {form.name: _declare_write(form) for form in FORMATS}
"""Format name -> operator `write_cache_<name>`."""
READS = {form.name: _declare_read(form) for form in FORMATS}
"""Format name -> operator `read_cache_<name>`."""
