"""Weights as Ascend deployments keep them: a class per format with its products,
and how a stored weight becomes one.

Sources: spec/deployments.md 2 to 5. Official FP8 and FP4 become MX without error.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch

from dsv4_ascend.checkpoint.layout import FP8_TILE
from dsv4_ascend.weights.activations import UNQUANTISED, ActivationFormat, Rows
from dsv4_ascend.weights.formats import (
    Chosen,
    ExpertWeights,
    Float,
    Fp4Experts,
    Fp8,
    Fp8Experts,
    Shared,
    Stored,
    Weight,
    widened,
)
from dsv4_backend.errors import ArgumentError
from dsv4_backend.ops.int8 import (
    dequantize_int8,
    int8_gemm,
    int8_grouped_gemm,
    int8_grouped_sum,
    int8_swiglu_quant,
    quantize_weight_int8,
)
from dsv4_backend.ops.int8_moe import int8_moe
from dsv4_backend.ops.mx import (
    MX_BLOCK,
    dequantize_mx,
    mx_swiglu_quant,
    mxfp4_grouped_gemm,
    mxfp8_gemm,
    mxfp8_grouped_gemm,
    quantize_weight_mxfp8,
)
from dsv4_backend.ops.mx_layer import mx_moe, mx_output_projection, rms_norm_mx
from dsv4_backend.ops.mx_tiles import mxfp4_tiled_grouped_gemm, pack_mxfp4
from dsv4_backend.ops.quant import act_quant, quantize_weight_fp4
from dsv4_backend.ops.token_quant import int8_token_quant, rms_norm_int8

Codes = tuple[torch.Tensor, torch.Tensor]
_W = TypeVar("_W", bound=Stored)


class DeployedExperts(ExpertWeights):
    """Experts whose routing weight multiplies after w2, in fp32 (spec/deployments.md 4)."""

    @abstractmethod
    def run(
        self,
        up: DeployedExperts,
        down: DeployedExperts,
        rows: torch.Tensor,
        offsets: torch.Tensor,
        limit: float,
    ) -> torch.Tensor:
        """`down(SwiGLU(W x, up x))` of rows [M, d] sorted by expert: bf16 [M, d]."""

    def matmul(
        self, rows: Rows, expert_offsets: torch.Tensor, like: ActivationFormat
    ) -> torch.Tensor:
        """See `ExpertWeights`."""
        product: torch.Tensor = self.product(*rows, self.weight, self.scale, expert_offsets)
        return product

    product: Callable[..., torch.Tensor]

    def mlp(
        self,
        up: ExpertWeights,
        down: ExpertWeights,
        rows: torch.Tensor,
        weights: torch.Tensor,
        expert_offsets: torch.Tensor,
        limit: float,
        activations: ActivationFormat,
    ) -> torch.Tensor:
        """See `ExpertWeights`, but fp32 [M, d] with the weight multiplied last."""
        assert isinstance(up, DeployedExperts)
        assert isinstance(down, DeployedExperts)
        return self.run(up, down, rows, expert_offsets, limit).float() * weights.unsqueeze(-1)


class DeployedWeight(Weight):
    """A matrix that makes a shared expert as `experts` makes one of many."""

    experts: type[DeployedExperts]

    def mlp(
        self, up: Weight, down: Weight, x: torch.Tensor, limit: float, activations: ActivationFormat
    ) -> torch.Tensor:
        """See `Weight`."""
        w1, w3, w2 = (self.experts(*_as_stack(w)) for w in (self, up, down))
        return w1.run(w3, w2, x, _all_rows(x.shape[0], x.device), limit)


@cache
@torch.inference_mode(False)
def _all_rows(rows: int, device: torch.device) -> torch.Tensor:
    """Offsets of one expert that has all rows; made once, so that a graph can be captured."""
    return torch.tensor([0, rows], dtype=torch.int32, device=device)


def _as_stack(weight: Stored) -> Codes:
    """A matrix as the only one of a stack."""
    return weight.weight.unsqueeze(0), weight.scale.unsqueeze(0)


def _int8_product(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    expert_offsets: torch.Tensor,
) -> torch.Tensor:
    return int8_grouped_gemm(x, x_scale, weight, scale.float(), expert_offsets)


class Int8Experts(DeployedExperts):
    """int8 [E, N, K] with scales [E, N]: W8A8, an fp32 scale per row too.

    Scales are fp32, those of w2 bf16 after `prepared`.
    """

    product = staticmethod(_int8_product)

    def layer(
        self,
        up: ExpertWeights,
        down: ExpertWeights,
        shared: Shared,
        x: torch.Tensor,
        chosen: Chosen,
        limit: float,
        activations: ActivationFormat,
    ) -> torch.Tensor:
        """See `ExpertWeights`; one operator."""
        own = zip(_as_stack(shared.w1), _as_stack(shared.w3), strict=True)
        shared13, shared13_scale = (joined(*pair).squeeze(0) for pair in own)
        return int8_moe(
            x,
            *chosen,
            joined(self.weight, up.weight),
            joined(self.scale, up.scale),
            down.weight,
            down.scale.bfloat16(),
            shared13,
            shared13_scale,
            shared.w2.weight,
            shared.w2.scale,
            limit,
        )

    def run(
        self,
        up: DeployedExperts,
        down: DeployedExperts,
        rows: torch.Tensor,
        offsets: torch.Tensor,
        limit: float,
    ) -> torch.Tensor:
        """See `DeployedExperts`; from w1 and w3 to the input of w2 nothing is rounded to bf16."""
        x, scale = int8_token_quant(rows)
        sums = int8_grouped_sum(x, joined(self.weight, up.weight), offsets)
        channels = joined(self.scale, up.scale)
        hidden = int8_swiglu_quant(sums, channels, scale, offsets, limit)
        return down.matmul(hidden, offsets, UNQUANTISED)


class Int8(DeployedWeight):
    """int8 [N, K] with an fp32 scale per output channel [N]: W8A8, an fp32 scale per row too."""

    experts = Int8Experts

    def rows(self, x: torch.Tensor, activations: ActivationFormat) -> Rows:
        """See `Weight`."""
        return int8_token_quant(x)

    def normed_rows(
        self, x: torch.Tensor, norm: torch.Tensor, eps: float, activations: ActivationFormat
    ) -> Rows:
        """See `Weight`; in one step."""
        return rms_norm_int8(x, norm.to(x.dtype), eps)

    def product(self, x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """See `Weight`."""
        assert scale is not None
        return int8_gemm(x, scale, self.weight, self.scale)

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """See `Weight`."""
        return dequantize_int8(self.weight, self.scale).to(dtype)


class MxExperts(DeployedExperts):
    """MX weights of experts: rows are e4m3 with a scale per 32 channels,
    whatever the weight's codes are.
    """

    def run(
        self,
        up: DeployedExperts,
        down: DeployedExperts,
        rows: torch.Tensor,
        offsets: torch.Tensor,
        limit: float,
    ) -> torch.Tensor:
        """See `DeployedExperts`; the input of w2 is quantised straight from fp32."""
        x = act_quant(rows, MX_BLOCK)
        both = torch.cat([w.matmul(x, offsets, UNQUANTISED) for w in (self, up)], -1)
        return down.matmul(mx_swiglu_quant(both, limit), offsets, UNQUANTISED)


class Mx8Experts(MxExperts):
    """e4m3 [E, N, K] with e8m0 scales [E, N, ceil(K/32)]."""

    product = staticmethod(mxfp8_grouped_gemm)


class Mx4Experts(MxExperts):
    """Packed e2m1 int8 [E, N, K/2] with e8m0 scales [E, N, K/32]: the bytes of official FP4."""

    product = staticmethod(mxfp4_grouped_gemm)


class TiledMx4Experts(MxExperts):
    """The same in tiles, int8 [E, K/32, N/16, 16, 16] (`pack_mxfp4`), which A5 reads."""

    product = staticmethod(mxfp4_tiled_grouped_gemm)

    def layer(
        self,
        up: ExpertWeights,
        down: ExpertWeights,
        shared: Shared,
        x: torch.Tensor,
        chosen: Chosen,
        limit: float,
        activations: ActivationFormat,
    ) -> torch.Tensor:
        """See `ExpertWeights`; one operator."""
        return mx_moe(
            x,
            *chosen,
            joined(self.weight, up.weight, 2),
            joined(self.scale, up.scale),
            down.weight,
            down.scale,
            joined(shared.w1.weight, shared.w3.weight, 0),
            joined(shared.w1.scale, shared.w3.scale, 0),
            shared.w2.weight,
            shared.w2.scale,
            limit,
        )


class Mx8(DeployedWeight):
    """e4m3 [N, K] with e8m0 scales [N, ceil(K/32)],
    times rows of e4m3 with a scale per 32 channels.
    """

    experts = Mx8Experts

    def rows(self, x: torch.Tensor, activations: ActivationFormat) -> Rows:
        """See `Weight`."""
        return act_quant(x, MX_BLOCK)

    def normed_rows(
        self, x: torch.Tensor, norm: torch.Tensor, eps: float, activations: ActivationFormat
    ) -> Rows:
        """See `Weight`; in one step."""
        return rms_norm_mx(x, norm, eps)

    def product(self, x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """See `Weight`."""
        assert scale is not None
        return mxfp8_gemm(x, scale, self.weight, self.scale)

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """See `Weight`."""
        return dequantize_mx(self.weight, self.scale).to(dtype)

    def project(self, o: torch.Tensor, groups: int) -> torch.Tensor:
        """See `Weight`; the heads are quantised too."""
        halves = (t.unflatten(0, (groups, -1)) for t in (self.weight, self.scale))
        return mx_output_projection(o, *halves)


def joined(first: torch.Tensor, second: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """Both behind each other along a dimension: a view where they are halves of one tensor."""
    size, stride = first.shape, first.stride()
    one = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    follows = second.storage_offset() == first.storage_offset() + size[dim] * stride[dim]
    if not (one and follows and second.shape == size and second.stride() == stride):
        return torch.cat([first, second], dim)
    return first.as_strided((*size[:dim], 2 * size[dim], *size[dim + 1 :]), stride)


def prepared(w1: _W, w3: _W, w2: _W) -> tuple[_W, _W, _W]:
    """Experts, or one, as `int8_moe` or `mx_moe` wants them, with the same values: w1 and w3 in one
    tensor; in int8, scales of w2 in bf16 where there are many.
    """
    many = w2.weight.dim() > 2
    rows = 2 if isinstance(w1, TiledMx4Experts) else int(many)
    pairs = (w1.weight, w3.weight, rows), (w1.scale, w3.scale, int(many))
    codes, scales = (_in_one_tensor(*pair) for pair in pairs)
    first, second = (type(w1)(*half) for half in zip(codes, scales, strict=True))
    if many and isinstance(w2, Int8Experts):
        return first, second, type(w2)(w2.weight, w2.scale.bfloat16())
    return first, second, w2


def _in_one_tensor(
    first: torch.Tensor, second: torch.Tensor, dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both, as halves of one tensor along a dimension; of bytes where torch copies no others."""
    of = first.dtype
    bytes_ = (t.view(torch.uint8) if t.element_size() == 1 else t for t in (first, second))
    one, other = torch.cat(list(bytes_), dim).chunk(2, dim)
    return one.view(of), other.view(of)


PREPARED = Int8, Int8Experts, Mx8, TiledMx4Experts
"""Formats whose experts one operator runs."""


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


def _each_expert(weight: ExpertWeights, quantise: Callable[[torch.Tensor], Codes]) -> Codes:
    """The codes and scales of all experts, of which one at a time is widened."""
    codes = scales = None
    for e in range(weight.weight.shape[0]):
        code, scale = quantise(_expert_values(weight, e))
        if codes is None or scales is None:
            codes, scales = (t.new_empty(weight.weight.shape[0], *t.shape) for t in (code, scale))
        codes[e], scales[e] = code, scale
    if codes is None or scales is None:
        raise ArgumentError("experts: found none, expected at least one")
    return codes, scales


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
    folds_gates: whether gates are folded (`fold_gate`), where a chip lacks the gate itself.
    """

    linears: Mapping[str, Convert]
    experts: Callable[[ExpertWeights], ExpertWeights]
    folds_gates: bool = False

    def linear(self, path: str) -> Convert:
        """What a linear at this path becomes."""
        return self.linears.get(path.rpartition(".")[2], to_bf16)


_QUANTISED = ("wq_b", "wo_b", "w1", "w2", "w3", "e_proj", "h_proj")
INT8_STORAGE = Storage(dict.fromkeys(_QUANTISED, to_int8), experts_to_int8, folds_gates=True)
MX_STORAGE = Storage(dict.fromkeys((*_QUANTISED, "wo_a"), to_mx8), experts_to_mx)
