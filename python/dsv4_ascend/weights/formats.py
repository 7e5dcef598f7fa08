"""One class per stored format: what a weight is kept as, and its product (spec/v4.md 6.3).

`WEIGHTS` and `EXPERTS` give the class of a format by the dtypes of its codes and scales; a new
format is a class and a row. Tensors are kept as the checkpoint gives them, so a weight may be a
view of a mapped file. A device that wants a layout of its own gets a class that holds it, made by
an operator of its own when the weight is assigned (`pack_mxfp4` in deployed.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

from dsv4_ascend.checkpoint.layout import FP4_BLOCK, FP8_TILE
from dsv4_ascend.weights.activations import UNQUANTISED, ActivationFormat, Rows
from dsv4_backend.contract import compute
from dsv4_backend.errors import ArgumentError
from dsv4_backend.experts import by_expert
from dsv4_backend.ops.formats import e4m3_values, scale_values, unpack_e2m1
from dsv4_backend.ops.gemm import (
    dequantize_rows,
    fp4_grouped_gemm,
    fp8_gemm,
    fp8_grouped_gemm,
    grouped_gemm,
)
from dsv4_backend.ops.linear import linear
from dsv4_backend.ops.moe import moe_combine, moe_dispatch
from dsv4_backend.ops.norm import rms_norm
from dsv4_backend.ops.output_projection import grouped_output_projection
from dsv4_backend.ops.quant import dequantize_fp8
from dsv4_backend.ops.swiglu import swiglu

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Format = tuple[torch.dtype, torch.dtype | None]
"""Dtypes of codes and of scales."""


@dataclass(frozen=True)
class Stored:
    """What a checkpoint stores of a weight: `scale` is a tensor, None for floats."""

    weight: torch.Tensor
    scale: Any


class Weight(Stored, ABC):
    """A matrix W [N, K]."""

    def rows(self, x: torch.Tensor, activations: ActivationFormat) -> Rows:
        """Float x [T, K] as `product` takes it; quantised weights take `activations`."""
        return activations.quantise(x)

    def normed_rows(
        self, x: torch.Tensor, norm: torch.Tensor, eps: float, activations: ActivationFormat
    ) -> Rows:
        """`rms_norm(x, norm, eps)` as `product` takes it."""
        return self.rows(rms_norm(x, norm, eps), activations)

    @abstractmethod
    def product(self, x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """`x Wᵀ` of rows: [T, N] in their dtype, bf16 where they are codes."""

    def matmul(self, x: torch.Tensor, activations: ActivationFormat) -> torch.Tensor:
        """`x Wᵀ` of float x [T, K] -> [T, N] in x's dtype; quantised weights take `activations`."""
        return self.product(*self.rows(x, activations))

    @abstractmethod
    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """W as `dtype` [N, K], rounded once; a temporary of this call unless it is stored so."""

    def mlp(
        self, up: Weight, down: Weight, x: torch.Tensor, limit: float, activations: ActivationFormat
    ) -> torch.Tensor:
        """`down(SwiGLU(W x, up x))` of x [T, d], clamped at `limit`: [T, d] (5.2)."""
        gate = self.matmul(x, activations)
        return down.matmul(swiglu(gate, up.matmul(x, activations), None, limit), activations)

    def project(self, o: torch.Tensor, groups: int) -> torch.Tensor:
        """Heads o [T, H, D],
        a group of them times its rows of W [G*R, H*D/G] each: [T, G*R] (4.7).
        """
        return grouped_output_projection(o, self.values(o.dtype).unflatten(0, (groups, -1)))


class ExpertWeights(Stored, ABC):
    """The matrices [E, N, K] of one projection of all experts; they may lie apart in memory."""

    weighs_last = False
    """Whether the routing weight multiplies what w2 gives, in fp32, not its input."""

    def accepts(self, activations: ActivationFormat) -> ActivationFormat:
        """The format that rows must have: a profile's `activations`, but for float weights."""
        return activations

    @abstractmethod
    def matmul(
        self, rows: Rows, expert_offsets: torch.Tensor, like: ActivationFormat
    ) -> torch.Tensor:
        """Rows [M, K], sorted by expert, in the format `like`, times their experts' Wᵀ: [M, N]."""

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
        """`down(weight * SwiGLU(W x, up x))` of rows [M, d] sorted by expert: [M, d] (5.2).

        weights: fp32 [M]. The routing weight multiplies before w2 and before its input
        is quantised; where `weighs_last`, it multiplies the rows of w2, which are fp32 then.
        """
        before = None if self.weighs_last else weights
        y = self._mlp(up, down, rows, before, expert_offsets, limit, activations)
        return y.float() * weights.unsqueeze(-1) if self.weighs_last else y

    def of_no_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """What `mlp` gives for rows [0, d]."""
        return rows.float() if self.weighs_last else rows

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
        """`mlp`; no weights are all ones."""
        like = self.accepts(activations)
        x = like.quantise(rows)
        gate, right = self.matmul(x, expert_offsets, like), up.matmul(x, expert_offsets, like)
        return down.matmul(like.swiglu(gate, right, weights, limit), expert_offsets, like)

    def routed(
        self,
        up: ExpertWeights,
        down: ExpertWeights,
        x: torch.Tensor,
        chosen: Chosen,
        limit: float,
        activations: ActivationFormat,
    ) -> torch.Tensor:
        """The chosen experts of x [T, d], summed by token: fp32 [T, d] (5.2)."""
        weights, ids = chosen
        rows, expert_offsets, order = moe_dispatch(x, ids, self.weight.shape[0])
        own = weights.flatten().index_select(0, order)
        y = self.mlp(up, down, rows, own, expert_offsets, limit, activations)
        summed: torch.Tensor = moe_combine(y, order, ids.shape[1])
        return summed

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
        """Routed experts and the shared one of x [T, d], summed in fp32: as x (5)."""
        routed = self.routed(up, down, x, chosen, limit, activations)
        w1, w3, w2 = shared
        return (routed + w1.mlp(w3, w2, x, limit, activations)).to(x.dtype)


class Shared(NamedTuple):
    """Matrices of the shared expert."""

    w1: Weight
    w3: Weight
    w2: Weight


class Chosen(NamedTuple):
    """What the router gives: weights fp32 [T, k], ids int32 [T, k] of experts in the stacks."""

    weights: torch.Tensor
    ids: torch.Tensor


class Float(Weight):
    """Floats, which take x's dtype for the product."""

    def rows(self, x: torch.Tensor, activations: ActivationFormat) -> Rows:
        """See `Weight`; x is not quantised."""
        return x, None

    def product(self, x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """See `Weight`."""
        return linear(x, narrower(self.weight, x.dtype))

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """See `Weight`."""
        return self.weight.to(dtype)


class Fp8(Weight):
    """e4m3 [N, K] with an e8m0 scale per tile of 128x128."""

    def project(self, o: torch.Tensor, groups: int) -> torch.Tensor:
        """See `Weight`; on a CPU the codes are read as they are, where groups end with tiles."""
        rank, (t, heads, width) = self.weight.shape[0] // groups, o.shape
        if o.device.type != "cpu" or rank % FP8_TILE:
            return super().project(o, groups)
        rows = o.reshape(t, groups, heads // groups * width).transpose(0, 1).flatten(0, 1)
        codes, scale = (w.unflatten(0, (groups, -1)) for w in (self.weight, self.scale))
        ends = torch.arange(groups + 1, dtype=torch.int32) * t
        each = fp8_grouped_gemm(compute(rows), None, codes, scale, ends)
        joined: torch.Tensor = each.unflatten(0, (groups, t)).transpose(0, 1).flatten(1)
        return joined.to(o.dtype)

    def product(self, x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """See `Weight`."""
        return fp8_gemm(x, scale, self.weight, self.scale)

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """See `Weight`."""
        return dequantize_fp8(self.weight, self.scale).to(dtype)


class FloatScaled(Weight):
    """FP8 codes with fp32 scales, which no operator takes: widened for each product."""

    def product(self, x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """See `Weight`."""
        rows = dequantize_rows(x, scale)
        wide = linear(rows, self.values(rows.dtype))
        return wide.to(x.dtype if scale is None else torch.bfloat16)

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """See `Weight`."""
        return widened(self.weight, self.scale).to(dtype)


class FloatExperts(ExpertWeights):
    """Experts of floats."""

    def accepts(self, activations: ActivationFormat) -> ActivationFormat:
        """Rows as they are."""
        return UNQUANTISED

    def matmul(
        self, rows: Rows, expert_offsets: torch.Tensor, like: ActivationFormat
    ) -> torch.Tensor:
        """See `ExpertWeights`."""
        x = rows[0]
        return grouped_gemm(x, narrower(self.weight, x.dtype), expert_offsets)


class Fp8Experts(ExpertWeights):
    """e4m3 [E, N, K] with e8m0 scales [E, ceil(N/128), ceil(K/128)]."""

    def matmul(
        self, rows: Rows, expert_offsets: torch.Tensor, like: ActivationFormat
    ) -> torch.Tensor:
        """See `ExpertWeights`."""
        return fp8_grouped_gemm(*rows, self.weight, self.scale, expert_offsets)


class Fp4Experts(ExpertWeights):
    """Packed e2m1 int8 [E, N, K/2] with e8m0 scales [E, N, K/32]."""

    def matmul(
        self, rows: Rows, expert_offsets: torch.Tensor, like: ActivationFormat
    ) -> torch.Tensor:
        """See `ExpertWeights`."""
        return fp4_grouped_gemm(*rows, self.weight, self.scale, expert_offsets)


class FloatScaledExperts(ExpertWeights):
    """FP8 or FP4 codes with fp32 scales: experts that have rows are widened one at a time."""

    def matmul(
        self, rows: Rows, expert_offsets: torch.Tensor, like: ActivationFormat
    ) -> torch.Tensor:
        """See `ExpertWeights`."""
        x = like.values(*rows)

        def product(e: int, part: slice) -> torch.Tensor:
            return linear(x[part], widened(self.weight[e], self.scale[e]))

        return by_expert(expert_offsets, x, product).to(
            rows[0].dtype if rows[1] is None else torch.bfloat16
        )


_E4M3, _E2M1, _E8M0, _F32 = torch.float8_e4m3fn, torch.int8, torch.float8_e8m0fnu, torch.float32
WEIGHTS: dict[Format, type[Weight]] = {
    **{(dtype, None): Float for dtype in FLOATS},
    (_E4M3, _E8M0): Fp8,
    (_E4M3, _F32): FloatScaled,
}
EXPERTS: dict[Format, type[ExpertWeights]] = {
    **{(dtype, None): FloatExperts for dtype in FLOATS},
    (_E4M3, _E8M0): Fp8Experts,
    (_E2M1, _E8M0): Fp4Experts,
    (_E4M3, _F32): FloatScaledExperts,
    (_E2M1, _F32): FloatScaledExperts,
}
_S = TypeVar("_S", bound=Stored)


def as_stored(
    classes: Mapping[Format, type[_S]], weight: torch.Tensor, scale: torch.Tensor | None
) -> _S:
    """The weight in the class of its format; ArgumentError names dtypes that no class takes."""
    found = weight.dtype, None if scale is None else scale.dtype
    if found not in classes:
        known = ", ".join(f"{codes} with {scales} scales" for codes, scales in classes)
        raise ArgumentError(
            f"weight: found {found[0]} with {found[1]} scales, expected one of: {known}"
        )
    return classes[found](weight, scale)


def narrower(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A float weight rounded to `dtype`; one that is no wider as it is, for operators to widen."""
    return weight if weight.dtype.itemsize <= dtype.itemsize else weight.to(dtype)


def widened(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """fp32 [N, K] of e4m3 [N, K] with tiles of 128x128, or packed e2m1 [N, K/2] with blocks of 32.

    scale: e8m0 or fp32; a value times a scale that is no power of two rounds once.
    """
    wide = scale if scale.dtype == torch.float32 else scale_values(scale)
    if weight.dtype != torch.float8_e4m3fn:
        return unpack_e2m1(weight) * wide.repeat_interleave(FP4_BLOCK, 1)
    rows = wide.repeat_interleave(FP8_TILE, 0)[: weight.shape[0]]
    return e4m3_values(weight) * rows.repeat_interleave(FP8_TILE, 1)[:, : weight.shape[1]]
