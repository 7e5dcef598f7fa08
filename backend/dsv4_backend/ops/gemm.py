"""Block-scaled FP8 and FP4 matrix products, dense and grouped by expert (spec/v4.md 6.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from dsv4_backend.contract import Operator, Tolerance, compute, operator
from dsv4_backend.experts import by_expert
from dsv4_backend.ops.formats import e4m3_values, scale_values
from dsv4_backend.ops.quant import dequantize_fp4, dequantize_fp8
from dsv4_backend.relations import covered, given_if, require

TOLERANCE = Tolerance(
    reason="fp32 sums of up to 1024 products, sums and terms up to size 8, in any order stay "
    "within 5e-6; the one cast to bf16 may then land on the other neighbour (2^-8)",
    ideal=(5e-6, 5e-6),
    official=(5e-6, 2**-7),
)
_ACTIVATIONS = {"x": "e4m3|f32 [T, K]", "x_scale": "e8m0 [T, K^128]"}
_OFFSETS = {"expert_offsets": "i32 [E+1]"}
_SCALE_OF_CODES = given_if(
    "x_scale",
    "is_e4m3(x)",
    "a scale exactly if x is float8_e4m3fn",
    found=("a scale with x {dtype(x)}", "None with x {dtype(x)}"),
)


def dequantize_rows(x: torch.Tensor, x_scale: torch.Tensor | None) -> torch.Tensor:
    """fp32 values of e4m3 rows [T, K] with one E8M0 scale per 128 channels;
    without a scale, x as it is.
    """
    if x_scale is None:
        return x
    return e4m3_values(x) * scale_values(x_scale).repeat_interleave(128, -1)[:, : x.shape[-1]]


def _output_dtype(x: torch.Tensor, x_scale: torch.Tensor | None) -> torch.dtype:
    return x.dtype if x_scale is None else torch.bfloat16


@operator(
    "fp8_gemm(Tensor x, Tensor? x_scale, Tensor weight, Tensor weight_scale) -> Tensor",
    rows=(9,),
    arguments={**_ACTIVATIONS, "weight": "e4m3 [N, K]", "weight_scale": "e8m0 [N^128, K^128]"},
    relations=_SCALE_OF_CODES,
    tolerance=TOLERANCE,
)
def fp8_gemm(
    x: torch.Tensor, x_scale: torch.Tensor | None, weight: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor:
    """`x W^T` with an FP8 weight of 128x128 tiles.

    x: float8_e4m3fn [T, K] with x_scale float8_e8m0fnu [T, ceil(K/128)] (`act_quant`): bf16 [T, N]
    out of fp32 sums, cast once; or fp32 [T, K] without x_scale: fp32 [T, N], no quantisation of
    activations.
    weight: float8_e4m3fn [N, K]; weight_scale: float8_e8m0fnu [ceil(N/128), ceil(K/128)]. Zero
    tokens give [0, N]. Differentiable in fp32 x. Source: spec/v4.md 6.3 [OFF-K].
    """
    rows = dequantize_rows(x, x_scale)
    return (rows @ dequantize_fp8(weight, weight_scale).to(rows.dtype).T).to(
        _output_dtype(x, x_scale)
    )


class Stored(NamedTuple):
    """How the weights of experts are stored: the lines of their codes and scales,
    and one expert's fp32 values.

    channels: what K is a multiple of. note: what else a caller must know.
    """

    weight: str
    scale: str
    note: str
    channels: int
    dequantise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


STORED = {
    "fp8": Stored(
        "e4m3 [E, N, K]", "e8m0 [E, N^128, K^128]", "Tiles of 128x128", 1, dequantize_fp8
    ),
    "fp4": Stored(
        "i8 [E, N, K/2]",
        "e8m0 [E, N, K/32]",
        "E2m1 codes, low nibble = even k, K % 32 = 0",
        32,
        dequantize_fp4,
    ),
}

_GROUPED_DOC = """`x W^T` of every row with the {name} weight of its expert.

    x, x_scale: as for `fp8_gemm`, rows sorted by expert; weight: {form.weight},
    weight_scale: {form.scale}, experts may lie apart in memory. {form.note}.
    expert_offsets: int32 [E+1], from 0 to T, never falling:
    rows expert_offsets[e] .. expert_offsets[e+1]-1 are e's.
    Returns [T, N], bf16 or fp32 as `fp8_gemm`. Differentiable in fp32 x.
    Source: spec/v4.md 5.2, 6.3.
    """


def _declare(
    name: str, form: Stored
) -> Operator[
    [torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor
]:
    def reference(
        x: torch.Tensor,
        x_scale: torch.Tensor | None,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        expert_offsets: torch.Tensor,
    ) -> torch.Tensor:
        return quantised_product(form, x, x_scale, weight, weight_scale, expert_offsets)

    reference.__doc__ = _GROUPED_DOC.format(name=name.upper(), form=form)
    return operator(
        f"{name}_grouped_gemm(Tensor x, Tensor? x_scale, Tensor weight, Tensor weight_scale, "
        "Tensor expert_offsets) -> Tensor",
        rows=(10,),
        arguments={**_ACTIVATIONS, "weight": form.weight, "weight_scale": form.scale, **_OFFSETS},
        relations=(
            *covered("weight", "T"),
            *_SCALE_OF_CODES,
            require(
                "x",
                f"K % {form.channels} == 0",
                "{K} channels",
                f"a multiple of {form.channels}, one scale for each",
            ),
        ),
        tolerance=TOLERANCE,
    )(reference)


def quantised_product(
    form: Stored,
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    expert_offsets: torch.Tensor,
) -> torch.Tensor:
    """Reference of both grouped products of quantised weights."""
    rows = dequantize_rows(x, x_scale)

    def product(e: int, part: slice) -> torch.Tensor:
        return rows[part] @ form.dequantise(weight[e], weight_scale[e]).to(rows.dtype).T

    return by_expert(expert_offsets, rows, product).to(_output_dtype(x, x_scale))


fp8_grouped_gemm, fp4_grouped_gemm = (_declare(name, form) for name, form in STORED.items())


@operator(
    "grouped_gemm(Tensor x, Tensor weight, Tensor expert_offsets) -> Tensor",
    rows=(10,),
    arguments={"x": "float [T, K]", "weight": "float [E, N, K]", **_OFFSETS},
    relations=covered("weight", "T"),
    tolerance=TOLERANCE,
)
def grouped_gemm(
    x: torch.Tensor, weight: torch.Tensor, expert_offsets: torch.Tensor
) -> torch.Tensor:
    """`x W^T` of every row with the float weight of its expert.

    x: [T, K] float, rows sorted by expert; weight: [E, N, K] float, experts may lie apart in
    memory; expert_offsets: int32 [E+1], from 0 to T, never falling. Returns [T, N] in x's dtype:
    fp32 sums, one cast. Differentiable; an expert without rows gets a zero gradient. Source:
    spec/v4.md 5.2, 6.3.
    """
    rows = compute(x)
    # One view per expert in one step: the gradient of a single view is as large as all experts.
    experts = weight.unbind() if weight.requires_grad else weight

    def product(e: int, part: slice) -> torch.Tensor:
        return rows[part] @ experts[e].to(rows.dtype).T

    return by_expert(expert_offsets, rows, product).to(x.dtype)
