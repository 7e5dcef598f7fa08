"""Proof of paged caches in byte formats: cases, oracles over `byte_entries`, named faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from dsv4_backend.contract import Case, Draw
from dsv4_backend.ops.cache_bytes import READS, WRITES, read_bytes, write_bytes
from dsv4_backend.ops.cache_formats import FORMATS, Format, sized
from dsv4_backend.proofs.bounds import E4M3_RATIOS
from dsv4_backend.proofs.byte_entries import ENTRIES, read_entry, write_entry
from dsv4_backend.proofs.cache import PAGES, draw_slots, slot_faults
from dsv4_backend.proofs.numerics import Array
from dsv4_backend.proofs.rounding_rows import NO_257TH_CODE
from dsv4_backend.proofs.token_quant import SAME_CODES
from dsv4_backend.proofs.wrong_formats import is_latent, wrong_formats, wrong_readers

_WRONG_READ_SLOTS = {
    "skipped rows read slot 0": "skipped rows land in slot 0",
    "skipped rows wrap to the last slot": "skipped rows wrap to the last slot",
    "slots shifted by one": "slots shifted by one",
}
"""Of a read: the name of the same fault of a write."""


def _capacity(a: Any) -> int:
    return int(a.cache.shape[0] * a.block_size)


def _prove_write(form: Format) -> None:
    contract = WRITES[form.name]

    @contract.oracle
    def _(
        cache: Array, rows: Array, slots: Array, block_size: int, rope: int = form.codec.rope
    ) -> None:
        entry = ENTRIES[form.name](rows.shape[1], rope)
        for row, slot in zip(rows, slots.tolist(), strict=True):
            if slot != -1:
                write_entry(entry, cache[slot // block_size], block_size, slot % block_size, row)

    @contract.cases
    def _(draw: Draw) -> Iterator[Case]:
        yield from _write_cases(draw, form)
        yield from _other_writes(draw, form)

    contract.wrong_arguments(
        {
            **slot_faults(_capacity),
            "page cleared first": {"cache": lambda cache: cache.zero_()},
        }
    )
    for name in dict(wrong_formats(form)):
        contract.fault(name)(_write_as(form, name))


def _prove_read(form: Format) -> None:
    contract = READS[form.name]

    @contract.oracle
    def _(
        cache: Array,
        slots: Array,
        block_size: int,
        channels: int = form.codec.channels,
        rope: int = form.codec.rope,
    ) -> Array:
        entry = ENTRIES[form.name](channels, rope)
        rows = np.zeros((len(slots), channels))
        for row, slot in zip(rows, slots.tolist(), strict=True):
            if slot != -1:
                row[:] = read_entry(entry, cache[slot // block_size], block_size, slot % block_size)
        return rows

    @contract.cases
    def _(draw: Draw) -> Iterator[Case]:
        yield from _read_cases(draw, form)
        yield from _other_reads(draw, form)

    slots = slot_faults(_capacity)
    contract.wrong_arguments(
        {name: slots[of_write] for name, of_write in _WRONG_READ_SLOTS.items()}
    )
    for name in dict(wrong_readers(form)):
        contract.fault(name)(_read_as(form, name))


LATENT_WIDTHS = (
    *((128, 64), (96, 32), (70, 6), (203, 10)),
    *((65, 64), (190, 64), (94, 64), (576, 64)),
)
"""(channels, of which RoPE): the shipped model's,
fewer than a tile, odd bytes, entries that just fit.
"""
KEY_WIDTHS = (64, 2, 30, 32, 130)


def _widths(form: Format) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """(channels, what calls take for them) of rows that no released model has."""
    if is_latent(form):
        return tuple((channels, (rope,)) for channels, rope in LATENT_WIDTHS)
    return tuple((channels, ()) for channels in KEY_WIDTHS)


def _other_writes(draw: Draw, form: Format) -> Iterator[Case]:
    for channels, rope in _widths(form):
        other = sized(form, channels, *(rope or (0,)))
        rows = torch.cat([draw.spread(5, channels), _edge_rows(draw, other, torch.float32)])
        slots = draw_slots(draw, len(rows), 14, 2)
        name = f"{channels} channels{''.join(f', {n} of RoPE' for n in rope)}"
        yield Case(
            name, "official", (draw.bytes(2, other.page_bytes(7)), rows.bfloat16(), slots, 7, *rope)
        )


def _other_reads(draw: Draw, form: Format) -> Iterator[Case]:
    for channels, rope in _widths(form):
        other = sized(form, channels, *(rope or (0,)))
        cache = _filled(draw, other, draw.spread(14, channels), 7)
        name = f"{channels} channels{''.join(f', {n} of RoPE' for n in rope)}"
        yield Case(name, "official", (cache, draw_slots(draw, 11, 14, 2), 7, channels, *rope))


def _draw_rows(draw: Draw, count: int, form: Format, dtype: torch.dtype) -> torch.Tensor:
    return draw.spread(count, form.codec.channels, dtype=dtype)


def _edge_rows(draw: Draw, form: Format, dtype: torch.dtype) -> torch.Tensor:
    """Rows at the edges of rounding: zero, below the floors,
    ties, block maxima at and above a power of two.
    """
    rows = draw.normal(8, form.codec.channels, dtype=dtype)
    rows[0] = 0.0
    rows[1] *= 1e-6
    rows[2] = (draw.integers(form.codec.channels, low=-12, high=13) * 0.25).to(dtype)
    rows[3] = draw.integers(form.codec.channels, low=-28, high=29).to(dtype)
    rows[3, ::32] = 448.0
    rows[4, ::32] = 450.0
    rows[5] = (draw.integers(form.codec.channels, low=-127, high=128) * 0.5).to(dtype)
    rows[5, ::32] = 63.5
    rows[6, 5 % form.codec.channels] = float("nan")
    rows[7, 7 % form.codec.channels] = float("inf")
    return rows


def _write_cases(draw: Draw, form: Format) -> Iterator[Case]:
    for profile, dtype in (("ideal", torch.float32), ("official", torch.bfloat16)):
        for blocks, size, count, skipped in PAGES:
            slots = draw_slots(draw, count, blocks * size, skipped)
            cache = draw.bytes(blocks, form.page_bytes(size))
            name = f"{count} rows to {blocks}x{size}, {skipped} skipped"
            yield Case(name, profile, (cache, _draw_rows(draw, count, form, dtype), slots, size))
        edges, slots = _edge_rows(draw, form, dtype), draw_slots(draw, 8, 12, 0)
        yield Case(
            "edges of rounding", profile, (draw.bytes(2, form.page_bytes(6)), edges, slots, 6)
        )
        pages = draw.bytes(2, form.page_bytes(64) + 100)[:, 50:-50]
        strided = _draw_rows(draw, 40, form, dtype)[::2]
        yield Case("block 64, strided", profile, (pages, strided, draw_slots(draw, 20, 128, 3), 64))
    more = {
        "fp64 rows round to fp32 first": _ties(draw, form) * (1 + 1e-12),
        "fp16 rows": draw.normal(4, form.codec.channels, dtype=torch.float16),
        "ties in bf16": _ties(draw, form).bfloat16(),
        "subnormal rows": _subnormal(draw, form),
        "large rows": _large(draw, form),
        "small rows beside no numbers": _small_beside_no_numbers(draw, form),
        "maxima beside a power of two": _beside_powers(draw, form),
    }
    for name, rows in more.items():
        cache, slots = draw.bytes(2, form.page_bytes(3)), draw_slots(draw, len(rows), 6, 0)
        yield Case(name, "official", (cache, rows, slots, 3))


def _ties(draw: Draw, form: Format) -> torch.Tensor:
    """fp64 rows of values half way between two neighbours in every format,
    whatever it scales by.
    """
    rows = draw.integers(4, form.codec.channels, low=-508, high=509, dtype=torch.float64) * 0.25
    rows[:, ::2] = (
        draw.integers(4, form.codec.channels // 2, low=-15, high=16, dtype=torch.float64) * 8
    )
    rows[:, ::32] = 127.0
    return rows


def _subnormal(draw: Draw, form: Format) -> torch.Tensor:
    """fp32 rows of a few smallest subnormals each: scales round to one of them, or to 0."""
    largest = torch.tensor([[7.0], [100.0], [190.0], [2000.0]])
    rows = (draw.uniform(4, form.codec.channels, low=-1.0) * largest).round()
    rows[:, :2] = torch.cat((largest, -largest), 1)
    return rows * 2.0**-149


def _small_beside_no_numbers(draw: Draw, form: Format) -> torch.Tensor:
    """bf16 rows far below 1, with NaN or infinity here and there, or everywhere."""
    rows = draw.normal(4, form.codec.channels, scale=1e-3, dtype=torch.bfloat16)
    rows[0, 3], rows[1, -1], rows[2, ::5], rows[3] = torch.nan, -torch.inf, torch.inf, torch.nan
    return rows


def _large(draw: Draw, form: Format) -> torch.Tensor:
    """fp32 rows up to the largest number, with special values where RoPE channels are."""
    rows = draw.uniform(4, form.codec.channels, low=-1.0) * torch.tensor(
        [[1e6], [2e7], [1e20], [3.4e38]]
    )
    if is_latent(form):
        rows[0, -4:] = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0])
    return rows


def _beside_powers(draw: Draw, form: Format) -> torch.Tensor:
    """fp32 rows whose largest value is one step above
    or below what a power of two scales to the largest code.
    """
    rows = draw.normal(4, form.codec.channels)
    largest = torch.tensor([448.0, 448.0, 6.0, 6.0])
    rows[:, ::32] = torch.nextafter(largest, torch.tensor([500.0, 0.0, 500.0, 0.0]))[:, None]
    return rows


def _read_cases(draw: Draw, form: Format) -> Iterator[Case]:
    for blocks, size, count, skipped in PAGES:
        cache = _filled(draw, form, _draw_rows(draw, blocks * size, form, torch.float32), size)
        slots = draw_slots(draw, count, blocks * size, skipped)
        yield Case(
            f"{count} rows of {blocks}x{size}, {skipped} skipped", "official", (cache, slots, size)
        )
    edges = _filled(draw, form, _edge_rows(draw, form, torch.bfloat16), 4)
    yield Case(
        "edges of rounding, repeated",
        "official",
        (edges, torch.tensor([7, 0, 1, 2, 3, 4, 5, 6, 6, -1, 2]), 4),
    )
    pages = _filled(draw, form, _draw_rows(draw, 128, form, torch.bfloat16), 64)
    yield Case("block 64, strided slots", "official", (pages, draw.permutation(128)[::3], 64))
    one_row_blocks = _filled(draw, form, _draw_rows(draw, 9, form, torch.bfloat16), 1)
    yield Case(
        "blocks of one row, all in reverse",
        "official",
        (one_row_blocks, torch.arange(8, -1, -1), 1),
    )
    yield Case("nothing but skips", "official", (pages, torch.full((5,), -1), 64))
    yield Case("any bytes", "official", (draw.bytes(5, form.page_bytes(7)), torch.arange(35), 7))


def _filled(draw: Draw, form: Format, rows: torch.Tensor, block_size: int) -> torch.Tensor:
    cache = draw.bytes(rows.shape[0] // block_size, form.page_bytes(block_size))
    write_bytes(form, cache, rows, torch.arange(rows.shape[0]), block_size)
    return cache


def _write_as(form: Format, wrong: str) -> Callable[..., None]:
    own = form.codec

    def mutant(
        cache: torch.Tensor,
        rows: torch.Tensor,
        slots: torch.Tensor,
        block_size: int,
        rope: int = own.rope,
    ) -> None:
        formats = dict(wrong_formats(sized(form, rows.shape[1], rope)))
        write_bytes(formats[wrong], cache, rows, slots, block_size)

    return mutant


def _read_as(form: Format, wrong: str) -> Callable[..., torch.Tensor]:
    own = form.codec

    def mutant(
        cache: torch.Tensor,
        slots: torch.Tensor,
        block_size: int,
        channels: int = own.channels,
        rope: int = own.rope,
    ) -> torch.Tensor:
        return read_bytes(
            dict(wrong_readers(sized(form, channels, rope)))[wrong], cache, slots, block_size
        )

    return mutant


_EQUIVALENT_WRITES = {
    "write_targets: 1 -> 2 (2)": "every negative slot is a skipped one",
    "write_targets: True -> False": "a pivot without its dimension broadcasts the same",
    "write_bytes: 1 -> 2 (3)": "only the first page is gathered from",
}
_EQUIVALENT_READS = {
    "read_bytes: slots.clamp(min=0) -> slots": "rows of skipped slots are 0 whatever was read",
    "from_bytes: True -> False": "the lengths agree anyway",
}
_ROUNDS = "to_bytes: rows.detach().float() -> rows.detach()"
_ONE_SECTION = {
    f"data_columns: block_size * width -> {after}": "no section follows the only one"
    for after in ("block_size", "block_size / width")
}
_NO_ROPE = "keys have no RoPE part"
_ROPE = {"_decode_latent: parts['rope'].float() -> parts['rope']": "cat widens bf16 beside fp32"}
_BY_FP32 = {_ROUNDS: "act_quant and the cast to bf16 take fp64 by way of fp32 themselves"}
_EQUIVALENT = {
    "write_cache_fp8_ds_mla": _BY_FP32,
    "write_cache_a5": _BY_FP32 | _ONE_SECTION,
    "write_cache_kv_epilog": _BY_FP32 | _ONE_SECTION,
    "write_cache_indexer_fp8": _BY_FP32,
    "write_cache_indexer_int8": SAME_CODES,
    "read_cache_fp8_ds_mla": _ROPE,
    "read_cache_a5": _ROPE | _ONE_SECTION,
    "read_cache_kv_epilog": _ROPE
    | _ONE_SECTION
    | {"_decode_latent: parts['scale'].float() -> parts['scale']": "bf16 times fp32 is fp32"},
    "write_cache_indexer_token_fp8": {
        "round_e4m3: x.float() -> x": "ratios are fp32 already",
        "round_e4m3: x.float().clamp(-E4M3_MAX, E4M3_MAX) -> x.float()": "the cast to e4m3 "
        "saturates too",
    }
    | E4M3_RATIOS,
    "read_cache_indexer_fp8": dict([NO_257TH_CODE]),
    "read_cache_indexer_token_fp8": dict([NO_257TH_CODE]),
    "read_cache_indexer_int8": {
        "_decode_int8: parts['scale'].float() -> parts['scale']": (
            "a product with an fp32 factor is fp32 without the cast too"
        ),
        "_decode_int8: parts['values'].float() -> parts['values']": "int8 times fp32 is fp32",
    },
}
"""What only some formats have, beside `_EQUIVALENT_WRITES` and `_EQUIVALENT_READS`."""


for _form in FORMATS:
    _prove_write(_form)
    _prove_read(_form)
    for _contract, _shared, _step in (
        (WRITES[_form.name], _EQUIVALENT_WRITES, "write_keys"),
        (READS[_form.name], _EQUIVALENT_READS, "read_keys"),
    ):
        _contract.explain(_shared, _EQUIVALENT.get(_contract.name, {}))
        if not is_latent(_form):
            _contract.explain({f"{_step}: 0 -> 1": _NO_ROPE})
