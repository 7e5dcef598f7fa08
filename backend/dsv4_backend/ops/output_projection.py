"""Grouped output projection (spec/v4.md 4.7)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from dsv4_backend.contract import Case, Draw, Tolerance, compute, operator
from dsv4_backend.mutants import add_output_faults
from dsv4_backend.ops.linear import linear
from dsv4_backend.ops.quant import act_qdq, dequantize_fp8, quantize_weight_fp8

_DTYPES = {"ideal": torch.float32, "official": torch.bfloat16}
_BLOCK = 128
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


def _weight(draw: Draw, n: int, k: int) -> torch.Tensor:
    """[n, k] that keeps the size of what it is multiplied with, its tiles of columns at different scales."""
    return draw.normal(n, k, scale=k**-0.5) * torch.where(torch.arange(k) // _BLOCK % 2 == 0, 1.0, 0.2)


def _call(
    draw: Draw, dtype: torch.dtype, tokens: int, heads: int, dim: int, groups: int, rank: int, d: int, fp8: str = ""
) -> _Call:
    """Results near 1; `fp8` names the weights (a, b) that are quantised."""
    wo_a = _weight(draw, groups * rank, heads * dim // groups).to(dtype)
    wo_b = _weight(draw, d, groups * rank).to(dtype)
    a, a_scale = quantize_weight_fp8(wo_a) if "a" in fp8 else (wo_a, None)
    b, b_scale = quantize_weight_fp8(wo_b) if "b" in fp8 else (wo_b, None)
    return _Call(draw.normal(tokens, heads, dim, dtype=dtype), a, a_scale, b, b_scale, groups)


@grouped_output_projection.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in _DTYPES.items():
        for sizes in ((0, 4, 8, 2, 3, 5), (1, 1, 1, 1, 1, 1), (3, 6, 5, 3, 4, 7), (5, 16, 24, 4, 6, 33)):
            yield Case("x".join(map(str, sizes)), profile, _call(draw, dtype, *sizes))
        for sizes in ((0, 2, 64, 1, 64, 128), (3, 4, 64, 2, 64, 130), (5, 8, 80, 2, 136, 260)):
            for fp8 in ("a", "b", "ab"):
                yield Case(f"FP8 {fp8} {'x'.join(map(str, sizes))}", profile, _call(draw, dtype, *sizes, fp8=fp8))
        call = _call(draw, dtype, 4, 4, 12, 2, 5, 9)
        yield Case("strided", profile, call._replace(o=draw.normal(4, 12, 8, dtype=dtype)[..., ::2].transpose(1, 2)))
        call = _call(draw, dtype, 4, 4, 12, 2, 5, 9)
        call.o[0, 1, 3], call.o[1, 3, 0], call.o[2] = torch.nan, torch.inf, 0.0
        yield Case("NaN, infinity, zero token", profile, call)


add_output_faults(
    grouped_output_projection, "last token zero", "stale tail of channels", "one NaN", "tokens shifted by one"
)


def _fault(name: str, **steps: Step) -> None:
    grouped_output_projection.fault(name)(lambda *arguments: _project(_Call(*arguments), **steps))


def _heads_interleaved(o: torch.Tensor, groups: int) -> torch.Tensor:
    return _flatten_groups(o.unflatten(1, (-1, groups)).transpose(1, 2).flatten(1, 2), groups)


def _fault_arguments(name: str, edit: Callable[[_Call], _Call]) -> None:
    grouped_output_projection.fault(name)(lambda *arguments: _project(edit(_Call(*arguments))))


def _rolled(scale: torch.Tensor | None) -> torch.Tensor | None:
    """Every tile of columns gets the scale of the one before."""
    return None if scale is None else scale.view(torch.uint8).roll(1, 1).view(scale.dtype)


def _ones(scale: torch.Tensor | None) -> torch.Tensor | None:
    return None if scale is None else torch.full_like(scale.view(torch.uint8), 127).view(scale.dtype)


def _rows_interleaved(call: _Call) -> torch.Tensor:
    weight = _group_weights(call)
    return weight.reshape(-1, call.groups, weight.shape[2]).transpose(0, 1)


def _join_sum(call: _Call, z: torch.Tensor) -> torch.Tensor:
    grouped = z.unflatten(1, (call.groups, -1))
    return _join(call, grouped.sum(1, True).expand_as(grouped).flatten(1))


def _join_unquantised(call: _Call, z: torch.Tensor) -> torch.Tensor:
    weight = call.wo_b if call.wo_b_scale is None else dequantize_fp8(call.wo_b, call.wo_b_scale)
    return _join(call._replace(wo_b=weight, wo_b_scale=None), z)


def _quantised_first(o: torch.Tensor, groups: int) -> torch.Tensor:
    flat = _flatten_groups(o, groups)
    return act_qdq.reference(flat, _BLOCK, flat.shape[-1])


_fault("heads dealt round-robin", flatten=_heads_interleaved)
_fault("heads in reverse order", flatten=lambda o, groups: _flatten_groups(o.flip(1), groups))
_fault("channels before heads", flatten=lambda o, groups: o.transpose(1, 2).reshape(_flatten_groups(o, groups).shape))
_fault("o quantised before wo_a", flatten=_quantised_first)
_fault("first group's weight for all", weights=lambda call: _group_weights(call)[:1].expand(call.groups, -1, -1))
_fault("rows of wo_a dealt round-robin", weights=_rows_interleaved)
_fault("wo_a rounded to bf16 for fp32 o", weights=lambda call: _group_weights(call).bfloat16())
_fault("wo_b input not quantised", join=_join_unquantised)
_fault("group outputs rounded to bf16 for fp32 o", join=lambda call, z: _join(call, z.bfloat16().to(z.dtype)))
_fault("groups summed, not joined", join=_join_sum)
_fault_arguments("scales of wo_a left out", lambda call: call._replace(wo_a_scale=_ones(call.wo_a_scale)))
_fault_arguments("scales of wo_b left out", lambda call: call._replace(wo_b_scale=_ones(call.wo_b_scale)))
_fault_arguments("wo_a scaled as the tile before", lambda call: call._replace(wo_a_scale=_rolled(call.wo_a_scale)))
_fault_arguments("wo_b scaled as the tile before", lambda call: call._replace(wo_b_scale=_rolled(call.wo_b_scale)))
