"""Named wrong cache formats: faults of the operators that write and read cache bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from dsv4_backend.ops import quant
from dsv4_backend.ops.cache_formats import FORMATS, LATENT, Codec, Format, Parts
from dsv4_backend.ops.formats import E4M3_MAX, round_e4m3, scale_values


def is_latent(form: Format) -> bool:
    """Whether the rows of a format are window keys and entries, not index keys."""
    return form.codec.encode is LATENT.encode


def _encoding(
    form: Format, change: Callable[[torch.Tensor, dict[str, torch.Tensor]], Parts]
) -> Format:
    """`form` whose parts pass through `change(rows, parts)` before they are stored."""
    codec = form.codec
    return replace(
        form,
        codec=replace(
            codec, encode=lambda rows, rope: change(rows, dict(codec.encode(rows, rope)))
        ),
    )


def _encode(form: Format, rows: torch.Tensor) -> Parts:
    return form.codec.encode(rows, form.codec.rope)


def _decoding(form: Format, change: Callable[[dict[str, torch.Tensor]], Parts]) -> Format:
    codec: Codec = form.codec
    return replace(
        form, codec=replace(codec, decode=lambda parts: codec.decode(change(dict(parts))))
    )


def _wrong_layouts(form: Format) -> Iterator[tuple[str, Format]]:
    merged = tuple(field for section in form.sections for field in section)
    yield (
        "fields in reverse order",
        replace(form, sections=tuple(section[::-1] for section in form.sections[::-1])),
    )
    if len(form.sections) > 1:
        yield "scales beside their entry", replace(form, sections=(merged,))
    else:
        data, scales, pad = merged[:-2], merged[-2], merged[-1]
        yield "scales after all entries", replace(form, sections=(data, (scales, pad)))
    if merged[-1].name == "pad":
        yield (
            "no padding after the scales",
            replace(form, sections=(*form.sections[:-1], form.sections[-1][:-1])),
        )


def _scale_bits(
    parts: dict[str, torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor]
) -> Parts:
    scale = parts["scale"]
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[scale.dtype.itemsize]
    return parts | {"scale": change(scale.view(integers)).view(scale.dtype)}


def _halve_step(scale: torch.Tensor) -> torch.Tensor:
    """Bits of half the scale: one less in the exponent."""
    return scale - {torch.uint8: 1, torch.int16: 1 << 10, torch.int32: 1 << 23}[scale.dtype]


def wrong_formats(form: Format) -> Iterator[tuple[str, Format]]:
    """Named wrong writers of a format."""
    yield from _wrong_layouts(form)
    yield (
        "scale one exponent too small",
        _encoding(form, lambda _, parts: _scale_bits(parts, _halve_step)),
    )
    yield (
        "scale of the row before",
        _encoding(form, lambda _, parts: _scale_bits(parts, lambda bits: bits.roll(1, 0))),
    )
    yield (
        "low precision input",
        _encoding(form, lambda rows, _: _encode(form, rows.to(torch.float8_e5m2).float())),
    )
    if is_latent(form):
        yield "scale floored instead of amax", _encoding(form, _floor_scale)
        yield "scales cast as numbers", _encoding(form, _cast_scale)
        yield (
            "RoPE channels taken from the front",
            _encoding(form, lambda rows, _: _encode(form, rows.roll(64, 1))),
        )
    elif form.name == "indexer_fp8":
        yield "scale not rounded to a power of two", _encoding(form, _exact_scale)
    elif form.name == "indexer_token_fp8":
        yield (
            "scale rounded to a power of two",
            _encoding(form, lambda rows, _: _encode(_INDEXER_FP8, rows)),
        )
    elif form.name == "indexer_mxfp4":
        yield (
            "nibbles swapped",
            _encoding(
                form, lambda rows, _: _encode(form, rows.unflatten(1, (-1, 2)).flip(2).flatten(1))
            ),
        )
    else:
        yield "range 128 instead of 127", _encoding(form, _range_128)
        yield "values cut instead of rounded", _encoding(form, _cut_steps)


_INDEXER_FP8 = next(form for form in FORMATS if form.name == "indexer_fp8")


def wrong_readers(form: Format) -> Iterator[tuple[str, Format]]:
    """Named wrong readers of a format."""
    yield from _wrong_layouts(form)
    yield (
        "scale one exponent too small",
        _decoding(form, lambda parts: _scale_bits(parts, _halve_step)),
    )
    yield (
        "scale of the row before",
        _decoding(form, lambda parts: _scale_bits(parts, lambda bits: bits.roll(1, 0))),
    )
    if is_latent(form):
        yield (
            "tile scales in reverse",
            _decoding(form, lambda parts: _scale_bits(parts, lambda bits: bits.flip(1))),
        )


def _floor_scale(_: torch.Tensor, parts: dict[str, torch.Tensor]) -> Parts:
    return _scale_bits(parts, lambda bits: bits.clamp(min=127 - 13))


def _cast_scale(_: torch.Tensor, parts: dict[str, torch.Tensor]) -> Parts:
    numbers = scale_values(parts["scale"]).nan_to_num(0).clamp(max=255).to(torch.uint8)
    return parts | {"scale": numbers.view(torch.float8_e8m0fnu)}


def _exact_scale(rows: torch.Tensor, parts: dict[str, torch.Tensor]) -> Parts:
    scale = rows.abs().amax(1, keepdim=True).clamp(min=quant.ACT_FLOOR) / E4M3_MAX
    return parts | {"values": round_e4m3(rows / scale), "scale": scale}


def _range_128(rows: torch.Tensor, parts: dict[str, torch.Tensor]) -> Parts:
    scale = rows.abs().amax(1, keepdim=True) / 128
    steps = (rows / scale).nan_to_num(0).round().clamp(-128, 127)
    return parts | {"values": steps.to(torch.int8), "scale": scale.half()}


def _cut_steps(rows: torch.Tensor, parts: dict[str, torch.Tensor]) -> Parts:
    steps = (rows / (rows.abs().amax(1, keepdim=True) / 127)).nan_to_num(0).clamp(-127, 127)
    return parts | {"values": steps.trunc().to(torch.int8)}
