"""Proof of the grouped output projection (spec/v4.md 4.7): cases, oracles, named faults."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from dsv4_backend.contract import Case, Draw
from dsv4_backend.ops.output_projection import (
    _flatten_groups,
    _round_weight,
    grouped_output_projection,
)
from dsv4_backend.ops.quant import act_qdq
from dsv4_backend.proofs.numerics import Array, cast, round_to, wide
from dsv4_backend.proofs.rounding_rows import WHOLE, alternating_rows, fp32_weight, whole

_DTYPES = {"ideal": torch.float32, "official": torch.bfloat16}


@grouped_output_projection.oracle
def _(o: Array, wo_a: Array) -> Array:
    tokens, heads, _channels = o.shape
    groups, rank, width = wo_a.shape
    z = np.empty((tokens, groups * rank))
    for g in range(groups):
        own = slice(g * heads // groups, (g + 1) * heads // groups)
        flat = wide(o[:, own]).reshape(tokens, width)
        z[:, g * rank : (g + 1) * rank] = flat @ round_to(o.dtype, wo_a[g]).T
    return cast(o.dtype, z)


Call = tuple[torch.Tensor, torch.Tensor]


def _call(
    draw: Draw, dtype: torch.dtype, tokens: int, heads: int, dim: int, groups: int, rank: int
) -> Call:
    """Results near 1."""
    width = heads * dim // groups
    wo_a = draw.normal(groups * rank, width, dtype=dtype, scale=width**-0.5)
    return draw.normal(tokens, heads, dim, dtype=dtype), wo_a.unflatten(0, (groups, rank))


_SIZES = (
    (0, 4, 8, 2, 3),
    (1, 1, 1, 1, 1),
    (3, 6, 5, 3, 4),
    (5, 16, 24, 4, 6),
    (3, 4, 64, 2, 64),
    (5, 8, 80, 2, 136),
    (2, 4, 512, 2, 33),
)


@grouped_output_projection.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in _DTYPES.items():
        for sizes in _SIZES:
            yield Case("x".join(map(str, sizes)), profile, _call(draw, dtype, *sizes))
        _, wo_a = _call(draw, dtype, 4, 4, 12, 2, 5)
        heads = draw.normal(4, 12, 8, dtype=dtype)[..., ::2].transpose(1, 2)
        yield Case("strided", profile, (heads, wo_a.transpose(1, 2).contiguous().transpose(1, 2)))
        o, wo_a = _call(draw, dtype, 4, 4, 12, 2, 5)
        o[0, 1, 3], o[1, 3, 0], o[2], wo_a[1, 2, 3] = torch.nan, torch.inf, 0.0, torch.nan
        yield Case("NaN, infinity, zero token", profile, (o, wo_a))
    rows = alternating_rows(draw, 4, 64).unsqueeze(1)
    yield Case("bf16 heads, fp32 wo_a", "official", (rows, fp32_weight(draw, 64, 64).unsqueeze(0)))
    o, wo_a = _call(draw, torch.float32, 3, 4, 12, 2, 5)
    yield Case("fp64 heads", "ideal", (o.double(), wo_a))
    yield Case(WHOLE, "official", (whole(draw, 3, 4, 64), whole(draw, 2, 24, 128)), decided=True)


def _heads_interleaved(o: torch.Tensor, wo_a: torch.Tensor) -> torch.Tensor:
    return _flatten_groups(o.unflatten(1, (-1, wo_a.shape[0])).transpose(1, 2).flatten(1, 2), wo_a)


def _channels_first(o: torch.Tensor, wo_a: torch.Tensor) -> torch.Tensor:
    return o.transpose(1, 2).reshape(_flatten_groups(o, wo_a).shape)


def _quantised_first(o: torch.Tensor, wo_a: torch.Tensor) -> torch.Tensor:
    flat = _flatten_groups(o, wo_a)
    return act_qdq.reference(flat, 128, flat.shape[-1])


def _rows_interleaved(o: torch.Tensor, wo_a: torch.Tensor) -> torch.Tensor:
    groups, rank, width = wo_a.shape
    return _round_weight(o, wo_a).reshape(rank, groups, width).transpose(0, 1)


def _grouped(y: torch.Tensor, wo_a: torch.Tensor) -> torch.Tensor:
    z: torch.Tensor = y.unflatten(1, wo_a.shape[:2])
    return z


def _summed(z: torch.Tensor) -> torch.Tensor:
    return z.sum(1, True).expand_as(z).flatten(1)


grouped_output_projection.wrong_step(
    _flatten_groups,
    {
        "heads dealt round-robin": _heads_interleaved,
        "heads in reverse order": lambda o, wo_a: _flatten_groups(o.flip(1), wo_a),
        "channels before heads": _channels_first,
        "o quantised before wo_a": _quantised_first,
    },
)
grouped_output_projection.wrong_step(
    _round_weight,
    {
        "first group's weight for all": lambda o, wo_a: _round_weight(o, wo_a[:1].expand_as(wo_a)),
        "groups of wo_a in reverse order": lambda o, wo_a: _round_weight(o, wo_a.flip(0)),
        "rows of wo_a dealt round-robin": _rows_interleaved,
        "wo_a rounded to bf16 for fp32 o": lambda o, wo_a: _round_weight(o, wo_a.bfloat16()),
        "fp32 wo_a not rounded for bf16 o": lambda o, wo_a: wo_a,
    },
)
grouped_output_projection.wrong_results(
    {
        "rank before group": lambda a, y: _grouped(y, a.wo_a).transpose(1, 2).flatten(1),
        "groups summed, not joined": lambda a, y: _summed(_grouped(y, a.wo_a)),
        "result rounded to bf16 for fp32 o": lambda a, y: y.bfloat16().to(y.dtype),
    }
)


for _name in (
    "compute: x.float() -> x",
    "compute: x.dtype == torch.float64 -> x.dtype != torch.float64",
):
    grouped_output_projection.equivalent(
        _name, "torch's product of bf16 matrices has fp32 sums and one cast"
    )
