"""Named wrong cache formats: faults of the operators that write and read cache bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from dsv4_backend.ops import quant, token_quant
from dsv4_backend.ops.cache_formats import FORMATS, Codec, Format, Parts
from dsv4_backend.ops.formats import E4M3_MAX, round_e4m3


def is_latent(form: Format) -> bool:
    """Whether the rows of a format are window keys and entries, not index keys."""
    return form.latent


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
    if merged[-1].name in ("pad", "zeros"):
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


_EXPONENT_STEP = {
    torch.float8_e8m0fnu: 1,
    torch.bfloat16: 1 << 7,
    torch.float16: 1 << 10,
    torch.float32: 1 << 23,
}


def _halved(parts: dict[str, torch.Tensor]) -> Parts:
    """Half of each scale: one less in the exponent."""
    step = _EXPONENT_STEP[parts["scale"].dtype]
    return _scale_bits(parts, lambda bits: bits - step)


def wrong_formats(form: Format) -> Iterator[tuple[str, Format]]:
    """Named wrong writers of a format."""
    yield from _wrong_layouts(form)
    yield (
        "scale one exponent too small",
        _encoding(form, lambda _, parts: _halved(parts)),
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
        if form.name == "kv_epilog":
            yield "filling left as it was", _padded(form)
    elif form.name == "indexer_fp8":
        yield "scale not rounded to a power of two", _encoding(form, _exact_scale)
    elif form.name == "indexer_token_fp8":
        yield (
            "scale rounded to a power of two",
            _encoding(form, lambda rows, _: _encode(_INDEXER_FP8, rows)),
        )
        yield "floor of 1e-4", _encoding(form, lambda rows, _: _token_codes(rows, quant.ACT_FLOOR))
        yield "amax / 448 divided", _encoding(form, _token_quantised)
        yield "a NaN makes the row unknown", _encoding(form, _unknown_rows)
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
        _decoding(form, _halved),
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


def _padded(form: Format) -> Format:
    """The format whose last field is neither read nor written."""
    (section,) = form.sections
    return replace(form, sections=((*section[:-1], replace(section[-1], name="pad")),))


def _token_codes(rows: torch.Tensor, floor: float) -> Parts:
    scale = rows.abs().amax(1, keepdim=True).clamp(min=floor) * (1 / E4M3_MAX)
    return {"values": round_e4m3(rows * scale.reciprocal()), "scale": scale}


def _token_quantised(rows: torch.Tensor, _: dict[str, torch.Tensor]) -> Parts:
    values, scale = token_quant.quantise_e4m3(rows)
    return {"values": values, "scale": scale.unsqueeze(1)}


def _unknown_rows(rows: torch.Tensor, parts: dict[str, torch.Tensor]) -> Parts:
    known = rows.isfinite().all(1, keepdim=True)
    return parts | {"scale": parts["scale"].where(known, torch.nan)}


def _floor_scale(_: torch.Tensor, parts: dict[str, torch.Tensor]) -> Parts:
    scale = parts["scale"]
    return parts | {"scale": scale.float().clamp(min=2.0**-13).to(scale.dtype)}


def _cast_scale(_: torch.Tensor, parts: dict[str, torch.Tensor]) -> Parts:
    """Scales rounded to numbers without an exponent: bytes of E8M0, and of bf16 the lower ones."""
    scale = parts["scale"]
    numbers = scale.float().nan_to_num(0).clamp(max=255).to(torch.uint8)
    integers = {1: torch.uint8, 2: torch.int16}[scale.dtype.itemsize]
    return parts | {"scale": numbers.to(integers).view(scale.dtype)}


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
