"""Proof of expert dispatch and combination (spec/v4.md 5.3): cases, oracles, named faults."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from dsv4_backend.contract import Case, Draw, compute
from dsv4_backend.mutants import add_output_faults
from dsv4_backend.ops.moe import moe_combine, moe_dispatch, sum_choices
from dsv4_backend.proofs.numerics import Array, wide


@moe_dispatch.oracle
def _(x: Array, ids: Array, num_experts: int) -> tuple[Array, Array, Array]:
    choices = ids.reshape(-1).tolist()
    order = [i for e in range(num_experts) for i, chosen in enumerate(choices) if chosen == e]
    offsets = [sum(chosen < e for chosen in choices) for e in range(num_experts + 1)]
    rows = x[np.array(order, np.int64) // ids.shape[1]]
    return rows, np.array(offsets, np.int32), np.array(order, np.int32)


@moe_combine.oracle
def _(y: Array, order: Array, k: int) -> Array:
    """fp32 additions, one choice after the other."""
    total = np.zeros((len(order) // k, y.shape[1]), np.float32)
    row_of = {choice: row for row, choice in enumerate(order.tolist())}
    for choice in sorted(row_of):
        total[choice // k] += y[row_of[choice]].astype(np.float32)
    return wide(total)


def _draw_ids(draw: Draw, tokens: int, k: int, experts: int) -> torch.Tensor:
    """Distinct experts per token, the first experts more often than the last."""
    favoured = draw.uniform(tokens, experts) * torch.linspace(1.5, 1.0, experts)
    return favoured.argsort(dim=1, descending=True)[:, :k].int()


_ROUTINGS = ((0, 5, 2, 4), (1, 1, 1, 1), (3, 7, 3, 5), (13, 16, 6, 32), (33, 24, 2, 256), (40, 9, 6, 6))
"""(T, d, k, E)."""


@moe_dispatch.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in (("ideal", torch.float32), ("official", torch.bfloat16)):
        for tokens, d, k, experts in _ROUTINGS:
            x, ids = draw.normal(tokens, d, dtype=dtype), _draw_ids(draw, tokens, k, experts)
            yield Case(f"{tokens}x{d}, {k} of {experts}", profile, (x, ids, experts))
        middle = torch.full((6, 2), 3, dtype=torch.int64)
        yield Case("one expert takes all", profile, (draw.normal(6, 8, dtype=dtype), middle, 7))
        strided = draw.normal(12, 10, dtype=dtype)[::2, ::2], _draw_ids(draw, 6, 4, 8).t().contiguous().t()
        yield Case("strided", profile, (*strided, 8))
    ids = _draw_ids(draw, 9, 3, 8)
    yield Case("e4m3 rows", "official", (draw.normal(9, 16, dtype=torch.float8_e4m3fn), ids, 8))
    scales = draw.integers(9, 2, low=100, high=150).to(torch.uint8).view(torch.float8_e8m0fnu)
    yield Case("E8M0 scales", "official", (scales, ids, 8))
    yield Case("stack of streams", "official", (draw.normal(9, 4, 6, dtype=torch.bfloat16), ids, 8))


Dispatched = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@moe_dispatch.fault("later tokens first within an expert")
def _(x: torch.Tensor, ids: torch.Tensor, num_experts: int) -> Dispatched:
    rows, offsets, order = moe_dispatch.reference(x.flip(0), ids.flip(0, 1), num_experts)
    return rows, offsets, ids.numel() - 1 - order


@moe_dispatch.fault("choice before token within an expert")
def _(x: torch.Tensor, ids: torch.Tensor, num_experts: int) -> Dispatched:
    tokens, k = ids.shape
    order = ids.t().flatten().argsort(stable=True)
    token, choice = order % max(tokens, 1), order // max(tokens, 1)
    return x[token], moe_dispatch.reference(x, ids, num_experts)[1], (token * k + choice).int()


@moe_dispatch.fault("counts instead of offsets")
def _(x: torch.Tensor, ids: torch.Tensor, num_experts: int) -> Dispatched:
    rows, offsets, order = moe_dispatch.reference(x, ids, num_experts)
    return rows, offsets.diff(prepend=offsets[:1]), order


@moe_dispatch.fault("offsets of the expert after")
def _(x: torch.Tensor, ids: torch.Tensor, num_experts: int) -> Dispatched:
    rows, offsets, order = moe_dispatch.reference(x, ids, num_experts)
    return rows, torch.cat([offsets[1:], offsets[-1:]]), order


@moe_dispatch.fault("inverse order")
def _(x: torch.Tensor, ids: torch.Tensor, num_experts: int) -> Dispatched:
    rows, offsets, order = moe_dispatch.reference(x, ids, num_experts)
    return rows, offsets, order.argsort().int()


@moe_dispatch.fault("order counts tokens")
def _(x: torch.Tensor, ids: torch.Tensor, num_experts: int) -> Dispatched:
    rows, offsets, order = moe_dispatch.reference(x, ids, num_experts)
    return rows, offsets, order // ids.shape[1]


@moe_dispatch.fault("rows left in token order")
def _(x: torch.Tensor, ids: torch.Tensor, num_experts: int) -> Dispatched:
    _, offsets, order = moe_dispatch.reference(x, ids, num_experts)
    return x.repeat_interleave(ids.shape[1], dim=0), offsets, order


@moe_dispatch.fault("last expert forgotten")
def _(x: torch.Tensor, ids: torch.Tensor, num_experts: int) -> Dispatched:
    rows, offsets, order = moe_dispatch.reference(x, ids, num_experts)
    return rows, torch.cat([offsets[:-1], offsets[-2:-1]]), order


@moe_dispatch.fault("flat index modulo tokens")
def _(x: torch.Tensor, ids: torch.Tensor, num_experts: int) -> Dispatched:
    _, offsets, order = moe_dispatch.reference(x, ids, num_experts)
    return x[order % max(ids.shape[0], 1)], offsets, order


add_output_faults(moe_dispatch, "last token zero", "tokens shifted by one")


@moe_combine.cases
def _(draw: Draw) -> Iterator[Case]:
    for tokens, d, k in ((0, 5, 2), (1, 1, 1), (3, 7, 3), (13, 256, 6), (9, 24, 8), (40, 9, 6)):
        order = draw.permutation(tokens * k).int()
        name = f"{tokens}x{d}, {k} choices"
        yield Case(name, "ideal", (draw.normal(tokens * k, d), order, k))
        scales = torch.exp2(draw.integers(tokens * k, 1, low=-12, high=13).float())
        rows = (draw.normal(tokens * k, d) * scales).bfloat16()
        yield Case(name, "official", (rows, order, k))
    special = draw.normal(12, 8, dtype=torch.bfloat16)
    special[3, 1], special[5, 2] = math.nan, math.inf
    yield Case("NaN, infinity, strided", "official", (special[::2], draw.permutation(6), 2))


@moe_combine.fault("order applied forwards")
def _(y: torch.Tensor, order: torch.Tensor, k: int) -> torch.Tensor:
    return sum_choices(compute(y)[order].unflatten(0, (-1, k)))


@moe_combine.fault("rows taken in dispatch order")
def _(y: torch.Tensor, order: torch.Tensor, k: int) -> torch.Tensor:
    return sum_choices(compute(y).unflatten(0, (-1, k)))


@moe_combine.fault("summed by expert, not by choice")
def _(y: torch.Tensor, order: torch.Tensor, k: int) -> torch.Tensor:
    return torch.zeros_like(compute(y)[::k]).index_add(0, order // k, compute(y))


@moe_combine.fault("summed last choice first")
def _(y: torch.Tensor, order: torch.Tensor, k: int) -> torch.Tensor:
    return sum_choices(compute(y)[order.argsort()].unflatten(0, (-1, k)).flip(1))


@moe_combine.fault("bf16 accumulator")
def _(y: torch.Tensor, order: torch.Tensor, k: int) -> torch.Tensor:
    return compute(sum_choices(y[order.argsort()].bfloat16().unflatten(0, (-1, k))))


@moe_combine.fault("mean instead of sum")
def _(y: torch.Tensor, order: torch.Tensor, k: int) -> torch.Tensor:
    return moe_combine.reference(y, order, k) / k


@moe_combine.fault("last choice forgotten")
def _(y: torch.Tensor, order: torch.Tensor, k: int) -> torch.Tensor:
    return sum_choices(compute(y)[order.argsort()].unflatten(0, (-1, k))[:, :-1])


@moe_combine.fault("choices of one token spread over all")
def _(y: torch.Tensor, order: torch.Tensor, k: int) -> torch.Tensor:
    return sum_choices(compute(y)[order.argsort()].unflatten(0, (k, -1)).transpose(0, 1))


add_output_faults(moe_combine, "last token zero", "stale tail of channels", "one NaN", "tokens shifted by one")
