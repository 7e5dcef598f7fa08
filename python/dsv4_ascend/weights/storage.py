"""In which formats a profile keeps weights, and how a stored weight becomes one of them.

Sources: spec/deployments.md 2 to 5. Official FP8 and FP4 become MX without error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from dsv4_ascend.checkpoint.layout import FP8_TILE
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
from dsv4_backend.ops.int8 import (
    quantize_weight_int8,
)
from dsv4_backend.ops.mx import (
    MX_BLOCK,
    quantize_weight_mxfp8,
)
from dsv4_backend.ops.mx_tiles import pack_mxfp4
from dsv4_backend.ops.quant import quantize_weight_fp4


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

    linears: by the last name of their path, bf16 for others. experts: of every projection.
    folds_gates: whether gates are folded (`fold_gate`), where neither the chip nor a package has
    the gate itself.
    """

    linears: Mapping[str, Convert]
    experts: Callable[[ExpertWeights], ExpertWeights]
    folds_gates: bool = False

    def linear(self, path: str) -> Convert:
        """What a linear at this path becomes."""
        return self.linears.get(path.rpartition(".")[2], to_bf16)


BF16_STORAGE = Storage({}, experts_to_bf16, folds_gates=True)
_QUANTISED = ("wq_b", "wo_b", "w1", "w2", "w3", "e_proj", "h_proj")
INT8_STORAGE = Storage(dict.fromkeys(_QUANTISED, to_int8), experts_to_int8, folds_gates=True)
MX_STORAGE = Storage(dict.fromkeys((*_QUANTISED, "wo_a"), to_mx8), experts_to_mx)
