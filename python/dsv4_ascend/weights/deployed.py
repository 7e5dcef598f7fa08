"""Weights as Ascend deployments keep them: a class per format with its products,
and how a stored weight becomes one.

Sources: spec/deployments.md 2 to 5. Official FP8 and FP4 become MX without error.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch

from dsv4_ascend.weights.activations import UNQUANTISED, ActivationFormat, Rows
from dsv4_ascend.weights.formats import (
    Chosen,
    ExpertWeights,
    Float,
    FloatExperts,
    Shared,
    Stored,
    Weight,
)
from dsv4_backend.ops.bf16_moe import bf16_moe
from dsv4_backend.ops.int8 import (
    dequantize_int8,
    int8_gemm,
    int8_grouped_gemm,
    int8_grouped_sum,
    int8_swiglu_quant,
)
from dsv4_backend.ops.int8_moe import int8_moe
from dsv4_backend.ops.mx import (
    MX_BLOCK,
    dequantize_mx,
    mx_swiglu_quant,
    mxfp4_grouped_gemm,
    mxfp8_gemm,
    mxfp8_grouped_gemm,
)
from dsv4_backend.ops.mx_moe import mx_moe
from dsv4_backend.ops.mx_norm import rms_norm_mx
from dsv4_backend.ops.mx_projection import mx_output_projection
from dsv4_backend.ops.mx_tiles import mxfp4_tiled_grouped_gemm
from dsv4_backend.ops.quant import act_quant
from dsv4_backend.ops.token_quant import int8_token_quant, rms_norm_int8

Codes = tuple[torch.Tensor, torch.Tensor]
_W = TypeVar("_W", bound=Stored)


class DeployedExperts(ExpertWeights):
    """Experts whose routing weight multiplies after w2, in fp32 (spec/deployments.md 4)."""

    weighs_last = True

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

    def _mlp(
        self,
        up: ExpertWeights,
        down: ExpertWeights,
        rows: torch.Tensor,
        weights: torch.Tensor | None,
        expert_offsets: torch.Tensor,
        limit: float,
        activations: ActivationFormat,
    ) -> torch.Tensor:
        """See `ExpertWeights`."""
        assert isinstance(up, DeployedExperts)
        assert isinstance(down, DeployedExperts)
        return self.run(up, down, rows, expert_offsets, limit)


class DeployedWeight(Weight):
    """A matrix that makes a shared expert as `experts` makes one of many."""

    experts: type[DeployedExperts]
    norm: Callable[[torch.Tensor, torch.Tensor, float], Codes]

    def normed_rows(
        self, x: torch.Tensor, norm: torch.Tensor, eps: float, activations: ActivationFormat
    ) -> Rows:
        """See `Weight`; in one step."""
        return self.norm(x, norm.to(x.dtype), eps)

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
    norm = staticmethod(rms_norm_int8)

    def rows(self, x: torch.Tensor, activations: ActivationFormat) -> Rows:
        """See `Weight`."""
        return int8_token_quant(x)

    def product(self, x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """See `Weight`."""
        assert scale is not None
        return int8_gemm(x, scale, self.weight, self.scale)

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """See `Weight`."""
        return dequantize_int8(self.weight, self.scale).to(dtype)


class Bf16Experts(FloatExperts):
    """bf16 [E, N, K], rows in bf16 too; the routing weight multiplies after w2."""

    weighs_last = True

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
        own13 = joined(shared.w1.weight, shared.w3.weight, 0)
        w13 = joined(self.weight, up.weight)
        return bf16_moe(x, *chosen, w13, down.weight, own13, shared.w2.weight, limit)


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
        """See `ExpertWeights`; one operator where w2 has tiles too."""
        if not isinstance(down, TiledMx4Experts):
            return super().layer(up, down, shared, x, chosen, limit, activations)
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
    norm = staticmethod(rms_norm_mx)

    def rows(self, x: torch.Tensor, activations: ActivationFormat) -> Rows:
        """See `Weight`."""
        return act_quant(x, MX_BLOCK)

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
    """Experts, or one, as `int8_moe`, `mx_moe` or `bf16_moe` wants them, with the same values: w1
    and w3 in one tensor; in int8, scales of w2 in bf16 where there are many.
    """
    many = w2.weight.dim() > 2
    rows = 2 if isinstance(w1, TiledMx4Experts) else int(many)
    codes = _in_one_tensor(w1.weight, w3.weight, rows)
    scales = (None, None) if w1.scale is None else _in_one_tensor(w1.scale, w3.scale, int(many))
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


PREPARED = Int8, Int8Experts, Mx8, TiledMx4Experts, Float, Bf16Experts
"""Formats whose experts one operator runs."""
