"""Grouped output projection (spec/v4.md 4.7)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from dsv4_backend.contract import Tolerance, compute, operator
from dsv4_backend.ops.linear import linear
from dsv4_backend.ops.quant import dequantize_fp8

Step = Callable[..., torch.Tensor]


class _Call(NamedTuple):
    """The arguments of `grouped_output_projection`."""

    o: torch.Tensor
    wo_a: torch.Tensor
    wo_a_scale: torch.Tensor | None
    wo_b: torch.Tensor
    wo_b_scale: torch.Tensor | None
    groups: int


def _flatten_groups(o: torch.Tensor, groups: int) -> torch.Tensor:
    """[T, H, D] -> [T, G, H*D/G], heads in order."""
    channels = o.shape[1] * o.shape[2]
    width = channels // groups
    return o.reshape(o.shape[0], channels // width, width)


def _group_weights(call: _Call) -> torch.Tensor:
    """wo_a as [G, R, H*D/G] in o's dtype."""
    weight = call.wo_a if call.wo_a_scale is None else dequantize_fp8(call.wo_a, call.wo_a_scale)
    return weight.to(call.o.dtype).reshape(-1, weight.shape[0] // call.groups, weight.shape[1])


def _join(call: _Call, z: torch.Tensor) -> torch.Tensor:
    """wo_b z for z [T, G*R]; an FP8 weight as in every FP8 linear (6.3)."""
    return linear(z, call.wo_b, call.wo_b_scale)


def _project(
    call: _Call, flatten: Step = _flatten_groups, weights: Step = _group_weights, join: Step = _join
) -> torch.Tensor:
    """`grouped_output_projection` with steps that faults replace."""
    grouped, weight = compute(flatten(call.o, call.groups)), compute(weights(call))
    z = (grouped.transpose(0, 1) @ weight.transpose(1, 2)).transpose(0, 1)  # [T, G, R]
    return join(call, z.flatten(1).to(call.o.dtype))


@operator(
    "grouped_output_projection(Tensor o, Tensor wo_a, Tensor? wo_a_scale, Tensor wo_b, Tensor? wo_b_scale, int groups) "
    "-> Tensor",
    rows=(17,),
    arguments={
        "o": "f32|bf16 [T, H, D]",
        "wo_a": "float|e4m3 [GR, K]",
        "wo_a_scale": "e8m0 [GR^128, K^128]",
        "wo_b": "float|e4m3 [d, GR]",
        "wo_b_scale": "e8m0 [d^128, GR^128]",
    },
    tolerance=Tolerance(
        reason="fp32 sums in any order; a bf16 channel between the products may land on the other neighbour, and "
        "after act_quant on the other e4m3 value: 2^-3 of one of G*R terms, whose sum is near 1 in the cases",
        ideal=(4e-6, 4e-6),
        official=(2**-6, 2**-7),
    ),
)
def grouped_output_projection(
    o: torch.Tensor,
    wo_a: torch.Tensor,
    wo_a_scale: torch.Tensor | None,
    wo_b: torch.Tensor,
    wo_b_scale: torch.Tensor | None,
    groups: int,
) -> torch.Tensor:
    """Project each group of heads to R channels, then all groups together to the hidden size.

    o: [T, H, D]; wo_a: [G*R, H*D/G], rows g*R .. g*R+R-1 belong to heads g*H/G .. (g+1)*H/G-1 flattened in order; wo_b:
    [d, G*R]; scales: None for float weights, else E8M0 of 128x128 tiles of an e4m3 weight. Returns [T, d] in o's dtype.
    bf16 o: wo_a (dequantised to bf16) times o in fp32 sums, one cast; an FP8 wo_b is multiplied as any FP8 linear
    (act_quant in blocks of 128, fp8_gemm). fp32 o: fp32 products with the dequantised weights, nothing is quantised.
    T = 0 gives an empty result. Source: spec/v4.md 4.7, 6.4 [OFF-M, OFF-CONV].
    """
    return _project(_Call(o, wo_a, wo_a_scale, wo_b, wo_b_scale, groups))


@grouped_output_projection.shapes
def _(*arguments: Any) -> None:
    call = _Call(*arguments)
    _, heads, channels = call.o.shape
    rows, width = call.wo_a.shape
    if 0 in (heads, channels, rows):
        raise grouped_output_projection.reject(
            "o", f"{heads} heads of {channels}, {rows} rows of wo_a", "none of them 0"
        )
    if call.groups < 1 or heads % call.groups or rows % call.groups:
        expected = f"a divisor of {heads} heads and {rows} rows of wo_a"
        raise grouped_output_projection.reject("groups", call.groups, expected)
    if width != heads * channels // call.groups:
        expected = f"{heads * channels // call.groups} columns, the channels of a group"
        raise grouped_output_projection.reject("wo_a", f"shape {tuple(call.wo_a.shape)}", expected)
    for name, weight, scale in (("wo_a", call.wo_a, call.wo_a_scale), ("wo_b", call.wo_b, call.wo_b_scale)):
        if (weight.dtype == torch.float8_e4m3fn) != (scale is not None):
            found = f"{weight.dtype} {'without' if scale is None else 'with'} {name}_scale"
            raise grouped_output_projection.reject(name, found, "a float weight without scale, or e4m3 with its scale")
