"""Byte formats of cache entries (spec/v4.md 6.5): which bytes, in which order, and where on a page.

A format is given for the channels of the released models; `sized` is the same format for others.

A page holds `block_size` entries. Its sections follow one another; a section holds one group of
fields of entry 0, then of entry 1, and so on: a format with one section keeps entries whole, one
with two keeps the scales apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from dsv4_backend.ops import quant, token_quant
from dsv4_backend.ops.formats import (
    E4M3_MAX,
    e4m3_values,
    round_e4m3,
    scale_values,
    unpack_e2m1,
)

LATENT_CHANNELS, ROPE, TILE = 512, 64, 64
"""Channels of a released model's KV row and of its RoPE part at the end,
and channels per scale before that.
"""
INDEXER, MX_TILE = 128, 32
"""Channels of a released model's indexer key, and channels per scale in MXFP4."""
A5_ENTRY_MULTIPLE = 128
"""What entries of a5 are padded to a multiple of: 583 bytes to 640."""
EPILOG_ENTRY_MULTIPLE = 32
"""What entries of kv_epilog are filled up to a multiple of: 590 bytes to 608."""

Parts = Mapping[str, torch.Tensor]

_DTYPE_NAMES = {
    torch.float8_e4m3fn: "e4m3",
    torch.float8_e8m0fnu: "E8M0",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int8: "int8",
    torch.uint8: "byte",
}


@dataclass(frozen=True)
class Field:
    """`count` elements of one dtype in every entry.
    A field named "pad" is neither read nor written, one named "zeros" is written and not read.
    """

    name: str
    dtype: torch.dtype
    count: int

    @property
    def width(self) -> int:
        """Bytes."""
        return self.count * self.dtype.itemsize


Section = tuple[Field, ...]
Sections = tuple[Section, ...]


@dataclass(frozen=True)
class Codec:
    """fp32 rows `[M, channels]` to named parts `[M, count]`, and back to fp32 rows;
    `rule` says how values round.

    rope: how many of the channels, at the end, are the RoPE part; encode takes the rows
    and this number.
    """

    channels: int
    rope: int
    rule: str
    encode: Callable[[torch.Tensor, int], Parts]
    decode: Callable[[Parts], torch.Tensor]


@dataclass(frozen=True)
class Format:
    """A codec and the places of its parts on a page.

    layout: the sections for (channels, rope); `sections` are those of the codec's own.
    """

    name: str
    codec: Codec
    layout: Callable[[int, int], Sections]
    sections: Sections
    page_multiple: int = 1

    @property
    def fields(self) -> Section:
        """The fields that are written, in page order."""
        return tuple(field for section in self.sections for field in section if field.name != "pad")

    @property
    def latent(self) -> bool:
        """Whether rows are window keys and entries, with RoPE channels; index keys have none."""
        return self.codec.rope > 0

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry with its padding, without the padding of the page."""
        return sum(map(section_width, self.sections))

    def page_bytes(self, block_size: int) -> int:
        """Bytes of a page of `block_size` entries."""
        return -(-block_size * self.entry_bytes // self.page_multiple) * self.page_multiple

    def describe(self) -> str:
        """The layout in words, for docstrings."""
        sections = ", then ".join(
            f"block_size x ({_describe_section(section)})" for section in self.sections
        )
        padding = (
            f", padded to a multiple of {self.page_multiple} bytes"
            if self.page_multiple > 1
            else ""
        )
        return f"{sections}{padding}; {self.entry_bytes} bytes per entry"


def sized(form: Format, channels: int, rope: int) -> Format:
    """The same format for rows of `channels`, of which the last `rope` are the RoPE part."""
    codec = replace(form.codec, channels=channels, rope=rope)
    return replace(form, codec=codec, sections=form.layout(channels, rope))


def section_width(section: Section) -> int:
    """Bytes of one entry in a section."""
    return sum(field.width for field in section)


def data_columns(form: Format, offset: torch.Tensor, block_size: int) -> torch.Tensor:
    """Page byte of every data byte of the entries at int64 `offset` [M]: int64 [M, B],
    in `fields` order.
    """
    base: list[int] = []
    stride: list[int] = []
    start = 0
    for section in form.sections:
        width, place = section_width(section), start
        for field in section:
            if field.name != "pad":
                base += range(place, place + field.width)
                stride += [width] * field.width
            place += field.width
        start += block_size * width
    return torch.tensor(base, device=offset.device) + offset[:, None] * torch.tensor(
        stride, device=offset.device
    )


def to_bytes(form: Format, rows: torch.Tensor) -> torch.Tensor:
    """Data bytes uint8 [M, B] of float rows [M, channels]; fp64 rows round to fp32 first."""
    parts = form.codec.encode(rows.detach().float(), form.codec.rope)
    # clone: `contiguous` keeps the strides of empty tensors, which cannot be viewed as bytes
    dense = (
        _written(field, parts, rows).clone(memory_format=torch.contiguous_format)
        for field in form.fields
    )
    return torch.cat([part.view(torch.uint8) for part in dense], dim=1)


def _written(field: Field, parts: Parts, rows: torch.Tensor) -> torch.Tensor:
    if field.name == "zeros":
        return rows.new_zeros(len(rows), field.count, dtype=field.dtype)
    return parts[field.name]


def from_bytes(form: Format, data: torch.Tensor) -> torch.Tensor:
    """Rows fp32 [M, channels] of data bytes uint8 [M, B]."""
    pieces = data.split([field.width for field in form.fields], dim=1)
    # clone: a view as a wider dtype needs an aligned start
    copies = [piece.clone(memory_format=torch.contiguous_format) for piece in pieces]
    fields = zip(form.fields, copies, strict=True)
    return form.codec.decode({field.name: copy.view(field.dtype) for field, copy in fields})


def _describe_section(section: Section) -> str:
    return ", ".join(f"{field.count} {_DTYPE_NAMES[field.dtype]} {field.name}" for field in section)


def _one_nan(x: torch.Tensor) -> torch.Tensor:
    """`x` with one pattern of bits for NaN: torch's casts leave several,
    by sign and by the length of the tensor.
    """
    return x.masked_fill(x.isnan(), torch.nan)


def _encode_latent(rows: torch.Tensor, rope: int) -> Parts:
    nope, rotated = rows.split([rows.shape[1] - rope, rope], 1)
    values, scale = quant.act_quant.reference(nope, TILE)
    return {"nope": values, "scale": scale, "rope": _one_nan(rotated.bfloat16())}


def _decode_latent(parts: Parts) -> torch.Tensor:
    values = parts["nope"].float()
    scale = parts["scale"].float().repeat_interleave(TILE, 1)[:, : values.shape[1]]
    return torch.cat([values * scale, parts["rope"].float()], dim=1)


def _encode_epilog(rows: torch.Tensor, rope: int) -> Parts:
    parts = _encode_latent(rows, rope)
    return {**parts, "scale": _one_nan(parts["scale"].bfloat16())}


def _encode_fp8(rows: torch.Tensor, _: int) -> Parts:
    values, scale = quant.act_quant.reference(rows, rows.shape[1])
    return {"values": values, "scale": _one_nan(scale_values(scale))}


def _encode_token_fp8(rows: torch.Tensor, _: int) -> Parts:
    finite = rows.isfinite()
    scale = rows.abs().where(finite, 0).amax(1, keepdim=True) * (1 / E4M3_MAX)
    scaled = rows * scale.reciprocal()
    # where the reciprocal overflows the row itself is what is rounded, to 0
    values = round_e4m3(torch.where(scaled.isfinite(), scaled, rows).where(finite, torch.nan))
    return {"values": values, "scale": scale}


def _decode_fp8(parts: Parts) -> torch.Tensor:
    return e4m3_values(parts["values"]) * parts["scale"]


def _encode_int8(rows: torch.Tensor, _: int) -> Parts:
    values, scale = token_quant.quantise_int8(rows)
    largest = torch.finfo(torch.float16).max
    return {"values": values, "scale": scale.clamp(max=largest).half().unsqueeze(1)}


def _decode_int8(parts: Parts) -> torch.Tensor:
    return parts["values"].float() * parts["scale"].float()


def _encode_mxfp4(rows: torch.Tensor, _: int) -> Parts:
    values, scale = quant.fp4_quant.reference(rows, MX_TILE)
    return {"values": values, "scale": scale}


def _decode_mxfp4(parts: Parts) -> torch.Tensor:
    values = unpack_e2m1(parts["values"])
    return values * scale_values(parts["scale"]).repeat_interleave(MX_TILE, 1)[:, : values.shape[1]]


LATENT = Codec(
    LATENT_CHANNELS,
    ROPE,
    "act_quant with block 64 on the channels before RoPE "
    "(6.1: power-of-two scales, amax floored at 1e-4), "
    "RoPE channels rounded to bf16, NaN as 0x7FC0",
    _encode_latent,
    _decode_latent,
)
EPILOG = Codec(
    LATENT_CHANNELS,
    ROPE,
    "act_quant with block 64 on the channels before RoPE "
    "(6.1: power-of-two scales, amax floored at 1e-4), its scales stored as bf16, "
    "RoPE channels rounded to bf16, NaN as 0x7FC0; zeros behind the scales. Source: "
    "aclnnKvCompressEpilog with quantMode 0 and roundScale true. UNCONFIRMED: what the chip "
    "writes for a block with NaN or infinity",
    _encode_epilog,
    _decode_latent,
)
FP8 = Codec(
    INDEXER,
    0,
    "act_quant with one block (6.1), its power-of-two scale stored as fp32, NaN as 0x7FC00000. "
    "UNCONFIRMED: 6.5 gives the layout only",
    _encode_fp8,
    _decode_fp8,
)
TOKEN_FP8 = Codec(
    INDEXER,
    0,
    "s = fp32(amax * fp32(1 / 448)) of the finite values, no power of two and no floor, value = "
    "fp32(x * fp32(1 / s)) rounded to nearest even, x itself rounded where that is not finite (a "
    "row of zeros or next to it); NaN and infinity are 0x7F. Source: kernel of "
    "aclnnIndexerQuantCache with quantMode 1 and roundScale false, spec/deployments.md 6. "
    "UNCONFIRMED: whether the chip flushes fp32 subnormals",
    _encode_token_fp8,
    _decode_fp8,
)
MXFP4 = Codec(
    INDEXER,
    0,
    "fp4_quant with block 32 (6.2), low nibble = even channel. UNCONFIRMED: 6.5 gives the sizes, "
    "not that scales stand after all values of the page",
    _encode_mxfp4,
    _decode_mxfp4,
)
INT8 = Codec(
    INDEXER,
    0,
    "int8_token_quant: s = fp32(amax / 127), value = x / s rounded to nearest even and clamped to "
    "+-127, s stored as fp16 (at most 65504); values are 0 where s is 0, as in a row of zeros; NaN "
    "or infinity anywhere in a row: s = NaN (0x7E00), values 0. UNCONFIRMED: 6.5 gives the layout "
    "only, and scales may live in a tensor of their own",
    _encode_int8,
    _decode_int8,
)


def _pad(count: int) -> Field:
    return Field("pad", torch.uint8, count)


def _zeros(count: int) -> Field:
    return Field("zeros", torch.uint8, count)


def _nope(channels: int, rope: int) -> Field:
    return Field("nope", torch.float8_e4m3fn, channels - rope)


def _rope(rope: int) -> Field:
    return Field("rope", torch.bfloat16, rope)


def _tile_scales(channels: int, rope: int) -> Field:
    return Field("scale", torch.float8_e8m0fnu, -(-(channels - rope) // TILE))


def _lay_out_mla(channels: int, rope: int) -> Sections:
    scales = _tile_scales(channels, rope)
    return (_nope(channels, rope), _rope(rope)), (scales, _pad(-scales.count % 8))


def _lay_out_a5(channels: int, rope: int) -> Sections:
    data = (_rope(rope), _nope(channels, rope), _tile_scales(channels, rope))
    return ((*data, _pad(-section_width(data) % A5_ENTRY_MULTIPLE)),)


def _lay_out_epilog(channels: int, rope: int) -> Sections:
    scales = replace(_tile_scales(channels, rope), dtype=torch.bfloat16)
    data = (_rope(rope), _nope(channels, rope), scales)
    return ((*data, _zeros(-section_width(data) % EPILOG_ENTRY_MULTIPLE)),)


def _lay_out_fp8(channels: int, _: int) -> Sections:
    return (Field("values", torch.float8_e4m3fn, channels),), (Field("scale", torch.float32, 1),)


def _lay_out_mxfp4(channels: int, _: int) -> Sections:
    scales = Field("scale", torch.float8_e8m0fnu, -(-channels // MX_TILE))
    return (Field("values", torch.int8, channels // 2),), (scales,)


def _lay_out_int8(channels: int, _: int) -> Sections:
    return (Field("values", torch.int8, channels),), (Field("scale", torch.float16, 1),)


def _format(
    name: str, codec: Codec, layout: Callable[[int, int], Sections], page_multiple: int = 1
) -> Format:
    return Format(name, codec, layout, layout(codec.channels, codec.rope), page_multiple)


FORMATS = (
    _format("fp8_ds_mla", LATENT, _lay_out_mla, 576),
    _format("indexer_fp8", FP8, _lay_out_fp8),
    _format("indexer_token_fp8", TOKEN_FP8, _lay_out_fp8),
    _format("indexer_mxfp4", MXFP4, _lay_out_mxfp4),
    _format("indexer_int8", INT8, _lay_out_int8),
    _format("a5", LATENT, _lay_out_a5),
    _format("kv_epilog", EPILOG, _lay_out_epilog),
)
"""fp8_ds_mla: FlashMLA MODEL1 and vLLM. indexer_fp8: vLLM and SGLang. indexer_token_fp8: Ascend A5.
indexer_mxfp4: vLLM option. indexer_int8: Ascend A2/A3.
a5: vllm-ascend's KV rows of 640 bytes on A5, RoPE first. kv_epilog: CANN's own of 608 bytes.
"""
