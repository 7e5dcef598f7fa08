"""Block-scaled FP8 and FP4 matrix products, dense and grouped by expert (spec/v4.md 6.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from dsv4_backend.contract import Operator, Tolerance, compute, operator
from dsv4_backend.ops.formats import e4m3_values, scale_values
from dsv4_backend.ops.quant import dequantize_fp4, dequantize_fp8

_TOLERANCE = Tolerance(
    reason="fp32 sums of up to 1024 products, sums and terms up to size 8, in any order stay within 5e-6; "
    "the one cast to bf16 may then land on the other neighbour (2^-8)",
    ideal=(5e-6, 5e-6),
    official=(5e-6, 2**-7),
)
_ACTIVATIONS = {"x": "e4m3|f32 [T, K]", "x_scale": "e8m0 [T, K^128]"}
Weights = Sequence[torch.Tensor]


def dequantize_rows(x: torch.Tensor, x_scale: torch.Tensor | None) -> torch.Tensor:
    """fp32 values of e4m3 rows [T, K] with one E8M0 scale per 128 channels; without a scale, x as it is."""
    if x_scale is None:
        return x
    return e4m3_values(x) * scale_values(x_scale).repeat_interleave(128, -1)[:, : x.shape[-1]]


def _output_dtype(x: torch.Tensor, x_scale: torch.Tensor | None) -> torch.dtype:
    return x.dtype if x_scale is None else torch.bfloat16


@operator(
    "fp8_gemm(Tensor x, Tensor? x_scale, Tensor weight, Tensor weight_scale) -> Tensor",
    rows=(9,),
    arguments={**_ACTIVATIONS, "weight": "e4m3 [N, K]", "weight_scale": "e8m0 [N^128, K^128]"},
    tolerance=_TOLERANCE,
)
def fp8_gemm(
    x: torch.Tensor, x_scale: torch.Tensor | None, weight: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor:
    """`x W^T` with an FP8 weight of 128x128 tiles.

    x: float8_e4m3fn [T, K] with x_scale float8_e8m0fnu [T, ceil(K/128)] (`act_quant`): bf16 [T, N] out of fp32 sums,
    cast once; or fp32 [T, K] without x_scale: fp32 [T, N], no quantisation of activations.
    weight: float8_e4m3fn [N, K]; weight_scale: float8_e8m0fnu [ceil(N/128), ceil(K/128)]. Zero tokens give [0, N].
    Differentiable in fp32 x. Source: spec/v4.md 6.3 [OFF-K].
    """
    rows = dequantize_rows(x, x_scale)
    return (rows @ dequantize_fp8(weight, weight_scale).to(rows.dtype).T).to(_output_dtype(x, x_scale))


@operator(
    "fp8_grouped_gemm(Tensor x, Tensor? x_scale, Tensor[] weight, Tensor[] weight_scale, Tensor expert_offsets)"
    " -> Tensor",
    rows=(10,),
    arguments={
        **_ACTIVATIONS,
        "weight": "list(E) e4m3 [N, K]",
        "weight_scale": "list(E) e8m0 [N^128, K^128]",
        "expert_offsets": "i32 [O]",
    },
    tolerance=_TOLERANCE,
)
def fp8_grouped_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: Weights,
    weight_scale: Weights,
    expert_offsets: torch.Tensor,
) -> torch.Tensor:
    """`fp8_gemm` of every row with the weight of its expert: rows expert_offsets[e] .. expert_offsets[e+1]-1 are e's.

    x, x_scale: as for `fp8_gemm`, rows sorted by expert; weight, weight_scale: one pair per expert;
    expert_offsets: int32 [E+1], from 0 to T, never falling. Returns [T, N], bf16 or fp32 as `fp8_gemm`.
    Source: spec/v4.md 5.2, 6.3.
    """
    rows = dequantize_rows(x, x_scale)
    product = grouped_product(
        rows, weight, expert_offsets, lambda e: dequantize_fp8(weight[e], weight_scale[e]).to(rows.dtype)
    )
    return product.to(_output_dtype(x, x_scale))


@operator(
    "fp4_grouped_gemm(Tensor x, Tensor? x_scale, Tensor[] weight, Tensor[] weight_scale, Tensor expert_offsets)"
    " -> Tensor",
    rows=(10,),
    arguments={
        **_ACTIVATIONS,
        "weight": "list(E) i8 [N, K/2]",
        "weight_scale": "list(E) e8m0 [N, K/32]",
        "expert_offsets": "i32 [O]",
    },
    tolerance=_TOLERANCE,
)
def fp4_grouped_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: Weights,
    weight_scale: Weights,
    expert_offsets: torch.Tensor,
) -> torch.Tensor:
    """`x W^T` of every row with the FP4 weight of its expert.

    x, x_scale, expert_offsets: as for `fp8_grouped_gemm`, K a multiple of 32; weight: per expert int8 [N, K/2],
    e2m1 codes, low nibble = even k; weight_scale: per expert float8_e8m0fnu [N, K/32].
    Returns [T, N], bf16 or fp32 as `fp8_gemm`. Source: spec/v4.md 6.3.
    """
    rows = dequantize_rows(x, x_scale)
    product = grouped_product(
        rows, weight, expert_offsets, lambda e: dequantize_fp4(weight[e], weight_scale[e]).to(rows.dtype)
    )
    return product.to(_output_dtype(x, x_scale))


@operator(
    "grouped_gemm(Tensor x, Tensor[] weight, Tensor expert_offsets) -> Tensor",
    rows=(10,),
    arguments={"x": "float [T, K]", "weight": "list(E) float [N, K]", "expert_offsets": "i32 [O]"},
    tolerance=_TOLERANCE,
)
def grouped_gemm(x: torch.Tensor, weight: Weights, expert_offsets: torch.Tensor) -> torch.Tensor:
    """`x W^T` of every row with the float weight of its expert.

    x: [T, K] float, rows sorted by expert; weight: one [N, K] float per expert; expert_offsets: int32 [E+1], from 0 to
    T, never falling. Returns [T, N] in x's dtype: fp32 sums, one cast. Differentiable; an expert without rows gets a
    zero gradient. Source: spec/v4.md 5.2, 6.3.
    """
    rows = compute(x)
    return grouped_product(rows, weight, expert_offsets, lambda e: weight[e].to(rows.dtype)).to(x.dtype)


def grouped_product(
    rows: torch.Tensor, weight: Weights, expert_offsets: torch.Tensor, matrix: Callable[[int], torch.Tensor]
) -> torch.Tensor:
    """[T, N]: every row times the transposed matrix(e) [N, K] of its expert e; N and E are those of `weight`."""
    n = weight[0].shape[0]
    if _has_values(expert_offsets):
        parts = rows.split(expert_offsets.diff().tolist())
        # An expert without rows is not widened, but a trained one takes part, to get its zero gradient.
        active = [e for e, part in enumerate(parts) if part.shape[0] or weight[e].requires_grad]
        return torch.cat([rows.new_zeros(0, n), *(parts[e] @ matrix(e).T for e in active)])
    expert = torch.searchsorted(
        expert_offsets[1:], torch.arange(rows.shape[0], device=rows.device, dtype=torch.int32), right=True
    )
    product = rows.new_zeros(rows.shape[0], n)
    for e in range(len(weight)):
        product = torch.where((expert == e).unsqueeze(-1), rows @ matrix(e).T, product)
    return product


def _has_values(tensor: torch.Tensor) -> bool:
    return type(tensor) is torch.Tensor and tensor.device.type != "meta"


def _check_activations(op: Operator, x: torch.Tensor, x_scale: torch.Tensor | None) -> None:
    if (x.dtype == torch.float8_e4m3fn) != (x_scale is not None):
        found = "None" if x_scale is None else "a scale"
        raise op.reject("x_scale", f"{found} with x {x.dtype}", "a scale exactly if x is float8_e4m3fn")


def _check_experts(op: Operator, weight: Weights, expert_offsets: torch.Tensor) -> None:
    if not weight:
        raise op.reject("weight", "an empty list", "one weight per expert")
    if expert_offsets.shape[0] != len(weight) + 1:
        raise op.reject("expert_offsets", f"{expert_offsets.shape[0]} offsets", f"{len(weight) + 1} (experts + 1)")


def _check_offsets(op: Operator, expert_offsets: torch.Tensor, rows: int) -> None:
    offsets = expert_offsets.tolist()
    if offsets[0] != 0 or offsets[-1] != rows or offsets != sorted(offsets):
        raise op.reject("expert_offsets", offsets, f"offsets from 0 to the number of rows {rows}, never falling")


@fp8_gemm.shapes
def _(x: torch.Tensor, x_scale: torch.Tensor | None, weight: torch.Tensor, weight_scale: torch.Tensor) -> None:
    _check_activations(fp8_gemm, x, x_scale)


@fp8_grouped_gemm.shapes
def _(
    x: torch.Tensor, x_scale: torch.Tensor | None, weight: Weights, weight_scale: Weights, offsets: torch.Tensor
) -> None:
    _check_activations(fp8_grouped_gemm, x, x_scale)
    _check_experts(fp8_grouped_gemm, weight, offsets)


@fp8_grouped_gemm.contents
def _(
    x: torch.Tensor, x_scale: torch.Tensor | None, weight: Weights, weight_scale: Weights, offsets: torch.Tensor
) -> None:
    _check_offsets(fp8_grouped_gemm, offsets, x.shape[0])


@fp4_grouped_gemm.shapes
def _(
    x: torch.Tensor, x_scale: torch.Tensor | None, weight: Weights, weight_scale: Weights, offsets: torch.Tensor
) -> None:
    _check_activations(fp4_grouped_gemm, x, x_scale)
    _check_experts(fp4_grouped_gemm, weight, offsets)
    if x.shape[1] % 32:
        raise fp4_grouped_gemm.reject("x", f"{x.shape[1]} channels", "a multiple of 32, one weight scale per 32")


@fp4_grouped_gemm.contents
def _(
    x: torch.Tensor, x_scale: torch.Tensor | None, weight: Weights, weight_scale: Weights, offsets: torch.Tensor
) -> None:
    _check_offsets(fp4_grouped_gemm, offsets, x.shape[0])


@grouped_gemm.shapes
def _(x: torch.Tensor, weight: Weights, offsets: torch.Tensor) -> None:
    _check_experts(grouped_gemm, weight, offsets)


@grouped_gemm.contents
def _(x: torch.Tensor, weight: Weights, offsets: torch.Tensor) -> None:
    _check_offsets(grouped_gemm, offsets, x.shape[0])
