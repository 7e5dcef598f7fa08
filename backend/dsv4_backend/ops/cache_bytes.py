"""Paged caches in byte formats: one write and one read operator per row
of `cache_formats.FORMATS` (spec/v4.md 6.5).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dsv4_backend.contract import Operator, Tolerance, operator
from dsv4_backend.expressions import Symbol
from dsv4_backend.ops.cache import write_targets
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
from dsv4_backend.relations import Relation, require, slots_in

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


def _relations(form: Format, writes: bool) -> tuple[Relation, ...]:
    """Widths of a row that the format has, pages of its bytes, and slots on them."""
    argument, channels = ("rows", "D") if writes else ("channels", "channels")
    rope = "rope" if form.latent else "0"
    pairs = form.name == "indexer_mxfp4"
    page = _page_bytes(form, channels, rope)
    return (
        require(
            argument,
            f"{channels} - {rope} >= 1" + (f" and {channels} % 2 == 0" if pairs else ""),
            f"{{{channels}}} channels, {{{rope}}} of RoPE",
            "an even number of channels" if pairs else "at least one channel before RoPE",
        ),
        require(
            "cache",
            f"num_blocks >= 1 and page == {page}",
            "shape {sizes(cache)}",
            f"[num_blocks >= 1, {{{page}}}] for {{block_size}} entries of {form.name} per page",
            f"[num_blocks >= 1, bytes of block_size entries of {form.name}]",
        ),
        *slots_in("num_blocks * block_size", once=writes),
    )


def _page_bytes(form: Format, channels: str, rope: str) -> str:
    """The bytes of a page as a term of names of the channels and of block_size."""
    widths: tuple[Any, Any] = Symbol(channels), Symbol(rope) if rope.isidentifier() else int(rope)
    block_size: Any = Symbol("block_size")
    return str(sized(form, *widths).page_bytes(block_size))


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
    return operator(
        schema,
        rows=(21,),
        arguments=arguments,
        relations=_relations(form, "rows" in lines),
        tolerance=Tolerance(reason=why),
    )(reference)


def _declare_write(form: Format) -> Operator:
    latent = form.latent
    return _declare(
        form,
        f"write_cache_{form.name}(Tensor(a!) cache, Tensor rows, Tensor slots, int block_size"
        f"{f', int rope={ROPE}' if latent else ''}) -> ()",
        _latent_write(form) if latent else _key_write(form),
        {"rows": "float [M, D]"},
        "one rounding rule per format and no sums: every bit of the page is decided",
    )


def _declare_read(form: Format) -> Operator:
    latent = form.latent
    return _declare(
        form,
        f"read_cache_{form.name}(Tensor cache, Tensor slots, int block_size, "
        f"int channels={form.codec.channels}{f', int rope={ROPE}' if latent else ''}) -> Tensor",
        _latent_read(form) if latent else _key_read(form),
        {"channels": "at least 1"},
        "one fp32 product per element, rounded at most once: bit equality",
    )


WRITES = {form.name: _declare_write(form) for form in FORMATS}
"""Format name -> operator `write_cache_<name>`."""
READS = {form.name: _declare_read(form) for form in FORMATS}
"""Format name -> operator `read_cache_<name>`."""
