"""Byte formats of cache entries (spec/v4.md 6.5): which bytes, in which order, and where on a page.

A page holds `block_size` entries. Its sections follow one another; a section holds one group of fields of entry 0, then
of entry 1, and so on, so that a format with one section keeps entries whole and one with two keeps scales apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from dsv4_backend.ops import quant

NOPE, ROPE, TILE = 448, 64, 64
INDEXER = 128
MX_TILE = 32

Parts = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Field:
    """`count` elements of one dtype in every entry. A field named "pad" is never read or written."""

    name: str
    dtype: torch.dtype
    count: int

    @property
    def width(self) -> int:
        """Bytes."""
        return self.count * self.dtype.itemsize


@dataclass(frozen=True)
class Codec:
    """Rows fp32 `[M, channels]` to named parts `[M, count]` and back to fp32 rows."""

    channels: int
    encode: Callable[[torch.Tensor], Parts]
    decode: Callable[[Parts], torch.Tensor]


@dataclass(frozen=True)
class Format:
    """A codec and the places of its parts on a page."""

    name: str
    codec: Codec
    sections: tuple[tuple[Field, ...], ...]
    rule: str
    page_multiple: int = 1

    @property
    def fields(self) -> tuple[Field, ...]:
        """The fields that carry data, in page order."""
        return tuple(field for section in self.sections for field in section if field.name != "pad")

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry with its padding, without the padding of the page."""
        return sum(field.width for section in self.sections for field in section)

    def page_bytes(self, block_size: int) -> int:
        """Bytes of a page of `block_size` entries."""
        return -(-block_size * self.entry_bytes // self.page_multiple) * self.page_multiple

    def columns(self, offset: torch.Tensor, block_size: int) -> torch.Tensor:
        """Page byte of every data byte of the entries at int64 `offset` [M]: int64 [M, B], in `fields` order."""
        start, base, stride = 0, [], []
        for section in self.sections:
            width, inside = sum(field.width for field in section), 0
            for field in section:
                if field.name != "pad":
                    base += range(start + inside, start + inside + field.width)
                    stride += [width] * field.width
                inside += field.width
            start += block_size * width
        return torch.tensor(base, device=offset.device) + offset[:, None] * torch.tensor(stride, device=offset.device)

    def to_bytes(self, rows: torch.Tensor) -> torch.Tensor:
        """Data bytes uint8 [M, B] of float rows [M, channels]."""
        parts = self.codec.encode(rows.detach().float())
        return torch.cat([parts[f.name].contiguous().view(torch.uint8) for f in self.fields], dim=1)

    def from_bytes(self, data: torch.Tensor) -> torch.Tensor:
        """Rows fp32 [M, channels] of data bytes uint8 [M, B]."""
        pieces = data.split([field.width for field in self.fields], dim=1)
        # clone, because a view as a wider dtype needs an aligned start
        return self.codec.decode(
            {f.name: p.clone(memory_format=torch.contiguous_format).view(f.dtype) for f, p in zip(self.fields, pieces)}
        )


def _power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """fp32 value of E8M0 bytes (never 0xFF here): the byte is the exponent field of an fp32."""
    return torch.ldexp(torch.ones((), device=scale.device), scale.view(torch.uint8).int() - 127)


def _encode_latent(rows: torch.Tensor) -> Parts:
    values, scale = quant.act_quant.reference(rows[:, :NOPE], TILE)
    return {"nope": values, "scale": scale, "rope": rows[:, NOPE:].bfloat16()}


def _decode_latent(parts: Parts) -> torch.Tensor:
    nope = parts["nope"].float().unflatten(1, (-1, TILE)) * _power_of_two(parts["scale"]).unsqueeze(-1)
    return torch.cat([nope.flatten(1), parts["rope"].float()], dim=1)


def _encode_fp8(rows: torch.Tensor) -> Parts:
    values, scale = quant.act_quant.reference(rows, INDEXER)
    return {"values": values, "scale": _power_of_two(scale)}


def _encode_int8(rows: torch.Tensor) -> Parts:
    largest = torch.finfo(torch.float16).max
    scale = (rows.abs().amax(1, keepdim=True) / 127).clamp(max=largest).half()
    steps = torch.where(scale > 0, rows / scale.float(), 0.0).round().clamp(-127, 127)
    return {"values": steps.to(torch.int8), "scale": scale}


def _decode_scaled(parts: Parts) -> torch.Tensor:
    return parts["values"].float() * parts["scale"].float()


def _encode_mxfp4(rows: torch.Tensor) -> Parts:
    values, scale = quant.fp4_quant.reference(rows, MX_TILE)
    return {"values": values, "scale": scale}


def _decode_mxfp4(parts: Parts) -> torch.Tensor:
    return quant.dequantize_fp4(parts["values"], parts["scale"])


_LATENT = Codec(NOPE + ROPE, _encode_latent, _decode_latent)
_E4M3 = Codec(INDEXER, _encode_fp8, _decode_scaled)
_INT8 = Codec(INDEXER, _encode_int8, _decode_scaled)
_MXFP4 = Codec(INDEXER, _encode_mxfp4, _decode_mxfp4)

_NOPE = Field("nope", torch.float8_e4m3fn, NOPE)
_ROPE = Field("rope", torch.bfloat16, ROPE)
_SCALES = Field("scale", torch.float8_e8m0fnu, NOPE // TILE)

FORMATS = (
    Format(
        "fp8_ds_mla",
        _LATENT,
        ((_NOPE, _ROPE), (_SCALES, Field("pad", torch.uint8, 1))),
        "",
        page_multiple=576,
    ),
    Format(
        "indexer_fp8",
        _E4M3,
        ((Field("values", torch.float8_e4m3fn, INDEXER),), (Field("scale", torch.float32, 1),)),
        "",
    ),
    Format(
        "indexer_mxfp4",
        _MXFP4,
        (
            (Field("values", torch.int8, INDEXER // 2),),
            (Field("scale", torch.float8_e8m0fnu, INDEXER // MX_TILE),),
        ),
        "",
    ),
    Format(
        "indexer_int8",
        _INT8,
        ((Field("values", torch.int8, INDEXER),), (Field("scale", torch.float16, 1),)),
        "",
    ),
    Format(
        "a5",
        _LATENT,
        ((_ROPE, _NOPE, _SCALES, Field("pad", torch.uint8, 57)),),
        "",
    ),
)
