"""In which formats a profile keeps weights, and how a stored weight becomes one of them.

Sources: spec/deployments.md 2 to 5. Official FP8 and FP4 become MX without error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from dsv4_ascend.checkpoint.kinds import MXFP4, MXFP8, W4A8, W8A8, Kind
from dsv4_ascend.checkpoint.layout import FP4_BLOCK, FP8_TILE
from dsv4_ascend.weights.deployed import (
    Bf16Experts,
    Int8,
    Int8Experts,
    Mx4Experts,
    Mx8,
    Mx8Experts,
    TiledMx4Experts,
)
from dsv4_ascend.weights.formats import (
    ExpertWeights,
    Float,
    Fp4Experts,
    Fp8,
    Fp8Experts,
    Weight,
    widened,
)
from dsv4_backend.errors import ArgumentError
from dsv4_backend.ops.formats import pack_e2m1, unpack_e2m1
from dsv4_backend.ops.int8 import quantize_weight_int4, quantize_weight_int8, unpack_int4
from dsv4_backend.ops.mx import MX_BLOCK, quantize_weight_mxfp8
from dsv4_backend.ops.mx_tiles import pack_mxfp4
from dsv4_backend.ops.quant import dequantize_fp4, quantize_weight_fp4, quantize_weight_fp8


def to_bf16(weight: Weight) -> Weight:
    """The values in bf16, which holds every e4m3 value times a power of two."""
    return Float(weight.values(torch.bfloat16), None)


def to_int8(weight: Weight) -> Weight:
    """int8 with a scale per output channel."""
    return Int8(*quantize_weight_int8(weight.values(torch.float32)))


def to_mx8(weight: Weight) -> Weight:
    """MX-FP8: the codes of an official FP8 weight with its tiles' scales repeated,
    else quantised.
    """
    if isinstance(weight, Fp8):
        return Mx8(weight.weight, _repeated(weight.scale, *weight.weight.shape))
    return Mx8(*quantize_weight_mxfp8(weight.values(torch.float32)))


def _repeated(scale: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """E8m0 scales [..., ceil(n/128), ceil(k/128)] of tiles for every row and block of 32:
    [..., n, ceil(k/32)].
    """
    rows = scale.view(torch.uint8).repeat_interleave(FP8_TILE, -2)[..., :n, :]
    blocks = rows.repeat_interleave(FP8_TILE // MX_BLOCK, -1)[..., : -(-k // MX_BLOCK)]
    return blocks.contiguous().view(scale.dtype)


def experts_to_bf16(weight: ExpertWeights) -> ExpertWeights:
    """The values in bf16, rounded once."""
    if weight.scale is None:
        return Bf16Experts(weight.weight.bfloat16(), None)
    (values,) = _each_expert(weight, lambda wide: (wide.bfloat16(),))
    return Bf16Experts(values, None)


def experts_to_int8(weight: ExpertWeights) -> ExpertWeights:
    """int8 with a scale per output channel, expert by expert."""
    return Int8Experts(*_each_expert(weight, quantize_weight_int8))


def experts_to_int4(weight: ExpertWeights) -> ExpertWeights:
    """int8 with codes of 4 bits and a scale per output channel, expert by expert: the products of
    W4A8 are those of W8A8 with such codes.
    """
    return Int8Experts(*_each_expert(weight, quantize_weight_int4))


def to_official(weight: Weight) -> Weight:
    """Official FP8 as it is, else quantised in tiles."""
    if isinstance(weight, Fp8):
        return weight
    return Fp8(*quantize_weight_fp8(weight.values(torch.float32)))


def experts_to_official(weight: ExpertWeights) -> ExpertWeights:
    """Official FP4 and FP8 as they are, FP8 with other scales in tiles; else FP4, or FP8 where
    inputs do not fill blocks of 32.
    """
    if isinstance(weight, Fp4Experts | Fp8Experts):
        return weight
    by_tile = weight.weight.dtype == torch.float8_e4m3fn
    if by_tile or _expert_values(weight, 0).shape[1] % FP4_BLOCK:
        return Fp8Experts(*_each_expert(weight, quantize_weight_fp8))
    return Fp4Experts(*_each_expert(weight, _fp4_again))


def _fp4_again(wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_weight_fp4`, but for blocks that were FP4 before and are exact in twice the scale.

    A block whose largest value was rounded down to 3 s gets s / 2 from the rule. One that had s / 2
    has codes of 0.5 or 1.5 nearly always, which s does not have.
    """
    codes, scale = quantize_weight_fp4(wide)
    halves = codes.view(torch.uint8)
    each = torch.stack([halves & 15, halves >> 4], -1).flatten(-2).unflatten(-1, (-1, FP4_BLOCK))
    size = each & 7
    exact = (dequantize_fp4(codes, scale) == wide).unflatten(-1, (-1, FP4_BLOCK)).all(-1)
    twice = exact & (size.amax(-1) == 7) & ((size != 1) & (size != 3)).all(-1)
    halved = torch.tensor([0, 0, 1, 0, 2, 3, 4, 5], dtype=torch.uint8)[size.int()] | (each & 8)
    other = pack_e2m1(torch.where(twice.unsqueeze(-1), halved, each).flatten(-2))
    return other, (scale.view(torch.uint8) + twice.to(torch.uint8)).view(scale.dtype)


def experts_to_mx(weight: ExpertWeights) -> ExpertWeights:
    """MX: official FP4 as it is, official FP8 with its tiles' scales repeated, else quantised.

    What is quantised becomes FP4, or FP8 where its inputs do not fill blocks of 32. FP4 on a
    device is put into its tiles.
    """
    if isinstance(weight, Fp4Experts):
        return _in_tiles(weight.weight, weight.scale)
    if isinstance(weight, Fp8Experts):
        return Mx8Experts(weight.weight, _repeated(weight.scale, *weight.weight.shape[1:]))
    if _expert_values(weight, 0).shape[1] % MX_BLOCK:
        return Mx8Experts(*_each_expert(weight, quantize_weight_mxfp8))
    return _in_tiles(*_each_expert(weight, quantize_weight_fp4))


_TILED_ROWS, _TILED_BYTES = 32, 32
"""Multiples of rows and of bytes in a row that A5's products of tiles take."""


def _in_tiles(codes: torch.Tensor, scale: torch.Tensor) -> ExpertWeights:
    """FP4 codes [E, N, K/2] in tiles on a device that has them, as they are elsewhere."""
    fits = codes.shape[1] % _TILED_ROWS == 0 and codes.shape[2] % _TILED_BYTES == 0
    if codes.device.type == "cpu" or not fits:
        return Mx4Experts(codes, scale)
    return TiledMx4Experts(pack_mxfp4(codes), scale)


def _each_expert(
    weight: ExpertWeights, convert: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
) -> tuple[torch.Tensor, ...]:
    """What `convert` gives of each expert, stacked; one expert at a time is widened."""
    stacks: tuple[torch.Tensor, ...] = ()
    for e in range(weight.weight.shape[0]):
        parts = convert(_expert_values(weight, e))
        stacks = stacks or tuple(t.new_empty(weight.weight.shape[0], *t.shape) for t in parts)
        for stack, part in zip(stacks, parts, strict=True):
            stack[e] = part
    if not stacks:
        raise ArgumentError("experts: found none, expected at least one")
    return stacks


def _expert_values(weight: ExpertWeights, e: int) -> torch.Tensor:
    """fp32 [N, K] of one expert."""
    if weight.scale is None:
        return weight.weight[e].float()
    return widened(weight.weight[e], weight.scale[e])


Convert = Callable[[Weight], Weight]


@dataclass(frozen=True)
class Storage:
    """In which formats a profile keeps weights.

    linears: by the last name of their path, `other` for the rest. experts: of every projection.
    kinds: how a converted folder stores them, the linears' and the experts'; none where it needs no
    description. folds_gates: whether gates are folded (`fold_gate`), where neither the chip nor a
    package has the gate itself.
    """

    linears: Mapping[str, Convert]
    experts: Callable[[ExpertWeights], ExpertWeights]
    kinds: tuple[Kind, ...] = ()
    folds_gates: bool = False
    other: Convert = to_bf16

    def linear(self, path: str) -> Convert:
        """What a linear at this path becomes."""
        return self.linears.get(path.rpartition(".")[2], self.other)

    def reads(self, kinds: Iterable[Kind]) -> bool:
        """Whether weights of all these kinds are among its own."""
        return set(kinds) <= set(self.kinds)


BF16_STORAGE = Storage({}, experts_to_bf16, folds_gates=True)
_QUANTISED = ("wq_b", "wo_b", "w1", "w2", "w3", "e_proj", "h_proj")
_INT8 = dict.fromkeys(_QUANTISED, to_int8)
INT8_STORAGE = Storage(_INT8, experts_to_int8, (W8A8,), folds_gates=True)
INT4_STORAGE = Storage(_INT8, experts_to_int4, (W8A8, W4A8), folds_gates=True)
MX_STORAGE = Storage(dict.fromkeys((*_QUANTISED, "wo_a"), to_mx8), experts_to_mx, (MXFP8, MXFP4))
OFFICIAL_STORAGE = Storage({}, experts_to_official, other=to_official)
"""What releases store; every linear is quantised."""


def kept(kind: Kind, weight: torch.Tensor, scale: torch.Tensor) -> Weight:
    """A matrix of a converted folder in the class of its kind: the same codes and scales."""
    if kind is MXFP4:  # e4m3 holds every e2m1 value, so the codes alone are others
        return Mx8(unpack_e2m1(weight).to(torch.float8_e4m3fn), scale)
    if kind is MXFP8:
        return Mx8(weight, scale)
    return Int8(unpack_int4(weight) if kind is W4A8 else weight, scale)


def experts_kept(kind: Kind, weight: torch.Tensor, scale: torch.Tensor) -> ExpertWeights:
    """`kept` of experts [E, ...]; FP4 on a device is put into its tiles."""
    if kind is MXFP4:
        return _in_tiles(weight, scale)
    if kind is MXFP8:
        return Mx8Experts(weight, scale)
    return Int8Experts(unpack_int4(weight) if kind is W4A8 else weight, scale)
