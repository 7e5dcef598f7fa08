"""Byte formats of cache entries (spec/v4.md 6.5): which bytes, in which order, and where on a page.

A page holds `block_size` entries. Its sections follow one another; a section holds one group of fields of entry 0, then
of entry 1, and so on: a format with one section keeps entries whole, one with two keeps the scales apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from dsv4_backend.ops import quant
from dsv4_backend.ops.formats import scale_values

NOPE, ROPE, TILE = 448, 64, 64
"""Channels of a KV row before and of its RoPE part, and channels per scale."""
INDEXER, MX_TILE = 128, 32
"""Channels of an indexer key, and channels per scale in MXFP4."""

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
    """`count` elements of one dtype in every entry. A field named "pad" is neither read nor written."""

    name: str
    dtype: torch.dtype
    count: int

    @property
    def width(self) -> int:
        """Bytes."""
        return self.count * self.dtype.itemsize


Section = tuple[Field, ...]


@dataclass(frozen=True)
class Codec:
    """fp32 rows `[M, channels]` to named parts `[M, count]`, and back to fp32 rows; `rule` says how values round."""

    channels: int
    rule: str
    encode: Callable[[torch.Tensor], Parts]
    decode: Callable[[Parts], torch.Tensor]


@dataclass(frozen=True)
class Format:
    """A codec and the places of its parts on a page."""

    name: str
    codec: Codec
    sections: tuple[Section, ...]
    page_multiple: int = 1

    @property
    def fields(self) -> Section:
        """The fields that carry data, in page order."""
        return tuple(field for section in self.sections for field in section if field.name != "pad")

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry with its padding, without the padding of the page."""
        return sum(map(section_width, self.sections))

    def page_bytes(self, block_size: int) -> int:
        """Bytes of a page of `block_size` entries."""
        return -(-block_size * self.entry_bytes // self.page_multiple) * self.page_multiple

    def describe(self) -> str:
        """The layout in words, for docstrings."""
        sections = ", then ".join(f"block_size x ({_describe_section(section)})" for section in self.sections)
        padding = f", padded to a multiple of {self.page_multiple} bytes" if self.page_multiple > 1 else ""
        return f"{sections}{padding}; {self.entry_bytes} bytes per entry"


def section_width(section: Section) -> int:
    """Bytes of one entry in a section."""
    return sum(field.width for field in section)


def data_columns(form: Format, offset: torch.Tensor, block_size: int) -> torch.Tensor:
    """Page byte of every data byte of the entries at int64 `offset` [M]: int64 [M, B], in `fields` order."""
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
    return torch.tensor(base, device=offset.device) + offset[:, None] * torch.tensor(stride, device=offset.device)


def to_bytes(form: Format, rows: torch.Tensor) -> torch.Tensor:
    """Data bytes uint8 [M, B] of float rows [M, channels]; fp64 rows round to fp32 first."""
    parts = form.codec.encode(rows.detach().float())
    # clone: `contiguous` keeps the strides of empty tensors, which cannot be viewed as bytes
    dense = (parts[field.name].clone(memory_format=torch.contiguous_format) for field in form.fields)
    return torch.cat([part.view(torch.uint8) for part in dense], dim=1)


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
    """`x` with one pattern of bits for NaN: torch's casts leave several, by sign and by the length of the tensor."""
    return x.masked_fill(x.isnan(), torch.nan)


def _encode_latent(rows: torch.Tensor) -> Parts:
    nope, scale = quant.act_quant.reference(rows[:, :NOPE], TILE)
    return {"nope": nope, "scale": scale, "rope": _one_nan(rows[:, NOPE:].bfloat16())}


def _decode_latent(parts: Parts) -> torch.Tensor:
    nope = parts["nope"].float().unflatten(1, (NOPE // TILE, TILE)) * scale_values(parts["scale"]).unsqueeze(-1)
    return torch.cat([nope.flatten(1), parts["rope"].float()], dim=1)


def _encode_fp8(rows: torch.Tensor) -> Parts:
    values, scale = quant.act_quant.reference(rows, INDEXER)
    return {"values": values, "scale": _one_nan(scale_values(scale))}


def _encode_int8(rows: torch.Tensor) -> Parts:
    amax = rows.abs().amax(1, keepdim=True)
    scale = torch.where(amax.isfinite(), amax / 127, torch.nan)
    # a subnormal s is too coarse to keep x / s within 127
    steps = torch.where(scale > 0, rows / scale, 0.0).round().clamp(-127, 127)
    return {"values": steps.to(torch.int8), "scale": scale.clamp(max=torch.finfo(torch.float16).max).half()}


def _decode_scaled(parts: Parts) -> torch.Tensor:
    return parts["values"].float() * parts["scale"].float()


def _encode_mxfp4(rows: torch.Tensor) -> Parts:
    values, scale = quant.fp4_quant.reference(rows, MX_TILE)
    return {"values": values, "scale": scale}


def _decode_mxfp4(parts: Parts) -> torch.Tensor:
    return quant.dequantize_fp4(parts["values"], parts["scale"])


LATENT = Codec(
    NOPE + ROPE,
    "act_quant with block 64 on channels 0..447 (6.1: power-of-two scales, amax floored at 1e-4), channels 448..511 "
    "rounded to bf16, NaN as 0x7FC0",
    _encode_latent,
    _decode_latent,
)
FP8 = Codec(
    INDEXER,
    "act_quant with block 128 (6.1), its power-of-two scale stored as fp32, NaN as 0x7FC00000. UNCONFIRMED: 6.5 gives "
    "the layout only",
    _encode_fp8,
    _decode_scaled,
)
MXFP4 = Codec(
    INDEXER,
    "fp4_quant with block 32 (6.2), low nibble = even channel. UNCONFIRMED: 6.5 gives the sizes, not that scales stand "
    "after all values of the page",
    _encode_mxfp4,
    _decode_mxfp4,
)
INT8 = Codec(
    INDEXER,
    "s = fp32(amax / 127), value = x / s rounded to nearest even and clamped to +-127, s stored as fp16 (at most "
    "65504); values are 0 where s is 0, as in a row of zeros; NaN or infinity anywhere in a row: s = NaN (0x7E00), "
    "values 0. UNCONFIRMED: 6.5 gives the layout only, and scales may live in a tensor of their own",
    _encode_int8,
    _decode_scaled,
)

_NOPE = Field("nope", torch.float8_e4m3fn, NOPE)
_ROPE = Field("rope", torch.bfloat16, ROPE)
_TILE_SCALES = Field("scale", torch.float8_e8m0fnu, NOPE // TILE)

FORMATS = (
    Format("fp8_ds_mla", LATENT, ((_NOPE, _ROPE), (_TILE_SCALES, Field("pad", torch.uint8, 1))), page_multiple=576),
    Format("indexer_fp8", FP8, ((Field("values", torch.float8_e4m3fn, INDEXER),), (Field("scale", torch.float32, 1),))),
    Format(
        "indexer_mxfp4",
        MXFP4,
        (
            (Field("values", torch.int8, INDEXER // 2),),
            (Field("scale", torch.float8_e8m0fnu, INDEXER // MX_TILE),),
        ),
    ),
    Format("indexer_int8", INT8, ((Field("values", torch.int8, INDEXER),), (Field("scale", torch.float16, 1),))),
    Format("a5", LATENT, ((_ROPE, _NOPE, _TILE_SCALES, Field("pad", torch.uint8, 57)),)),
)
"""fp8_ds_mla: FlashMLA MODEL1 and vLLM. indexer_fp8: vLLM, SGLang and Ascend 950. indexer_mxfp4: vLLM option.
indexer_int8: Ascend A2/A3. a5: Ascend 950 KV rows of 640 bytes, RoPE first."""
