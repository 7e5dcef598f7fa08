"""Proof of the grouped output projection (spec/v4.md 4.7): cases, oracles, named faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from dsv4_backend.contract import Case, Draw
from dsv4_backend.mutants import add_output_faults
from dsv4_backend.ops.output_projection import (
    Step,
    _Call,
    _flatten_groups,
    _group_weights,
    _join,
    _project,
    grouped_output_projection,
)
from dsv4_backend.ops.quant import act_qdq, dequantize_fp8, quantize_weight_fp8
from dsv4_backend.proofs.numerics import Array, cast, fp8_quantised, round_to, tile_values, wide
from dsv4_backend.proofs.rounding_rows import (
    alternating_rows,
    broken_rows,
    explain_quantisation,
    fp32_weight,
    rows_with_outliers,
    tiny_rows,
    weight_of_small_channels,
)

_DTYPES = {"ideal": torch.float32, "official": torch.bfloat16}
_BLOCK = 128


def _float_weight(weight: Array, scale: Array | None) -> Array:
    return wide(weight) if scale is None else tile_values(weight, scale, (_BLOCK, _BLOCK))


@grouped_output_projection.oracle
def _(
    o: Array,
    wo_a: Array,
    wo_a_scale: Array | None,
    wo_b: Array,
    wo_b_scale: Array | None,
    groups: int,
) -> Array:
    tokens, heads, _channels = o.shape
    per_group, rank = heads // groups, len(wo_a) // groups
    first = round_to(o.dtype, _float_weight(wo_a, wo_a_scale))
    z = np.empty((tokens, len(wo_a)))
    for g in range(groups):
        rows, own = slice(g * rank, (g + 1) * rank), slice(g * per_group, (g + 1) * per_group)
        flat = wide(o[:, own]).reshape(tokens, first.shape[1])
        z[:, rows] = round_to(o.dtype, flat @ first[rows].T)
    if wo_b_scale is not None and o.dtype != np.float64:
        z = fp8_quantised(z, _BLOCK)
    return cast(o.dtype, z @ _float_weight(wo_b, wo_b_scale).T)


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
    for name, rows, exponent in (
        ("activation scales decide", rows_with_outliers, 2),
        ("activations below the floor", tiny_rows, 26),
        ("FP8 NaN, infinity", broken_rows, -4),
    ):
        same = torch.eye(256, dtype=torch.bfloat16)
        wo_b = weight_of_small_channels(draw, 130, 256, exponent)
        yield Case(name, "official", _Call(rows(draw, 4, 256).unsqueeze(1), same, None, *wo_b, 1))
    o, same = alternating_rows(draw, 4, 64).unsqueeze(1), torch.eye(64)
    fp32 = _Call(o, same, None, fp32_weight(draw, 9, 64), None, 1)
    yield Case("bf16 heads, fp32 wo_b", "official", fp32)
    wo_a = fp32_weight(draw, 64, 64)
    yield Case("bf16 heads, fp32 wo_a", "official", fp32._replace(wo_a=wo_a, wo_b=same))
    for fp8 in ("", "ab"):
        fp32 = _call(draw, torch.float32, 3, 4, 12, 2, 5, 9, fp8=fp8)
        yield Case(f"fp64 heads{', FP8' if fp8 else ''}", "ideal", fp32._replace(o=fp32.o.double()))


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


explain_quantisation(grouped_output_projection)
