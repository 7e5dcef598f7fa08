"""Proof of expert dispatch and combination (spec/v4.md 5.3): cases, oracles, named faults."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from dsv4_backend.contract import Case, Draw, compute
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


_ROUTINGS = (
    (0, 5, 2, 4),
    (1, 1, 1, 1),
    (3, 7, 3, 5),
    (13, 16, 6, 32),
    (33, 24, 2, 256),
    (40, 9, 6, 6),
)
"""(T, d, k, E)."""


@moe_dispatch.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in (("ideal", torch.float32), ("official", torch.bfloat16)):
        for tokens, d, k, experts in _ROUTINGS:
            x, ids = draw.normal(tokens, d, dtype=dtype), _draw_ids(draw, tokens, k, experts)
            yield Case(f"{tokens}x{d}, {k} of {experts}", profile, (x, ids, experts))
        middle = torch.full((6, 2), 3, dtype=torch.int64)
        yield Case("one expert takes all", profile, (draw.normal(6, 8, dtype=dtype), middle, 7))
        strided = (
            draw.normal(12, 10, dtype=dtype)[::2, ::2],
            _draw_ids(draw, 6, 4, 8).t().contiguous().t(),
        )
        yield Case("strided", profile, (*strided, 8))
    ids = _draw_ids(draw, 9, 3, 8)
    yield Case("e4m3 rows", "official", (draw.normal(9, 16, dtype=torch.float8_e4m3fn), ids, 8))
    scales = draw.integers(9, 2, low=100, high=150).to(torch.uint8).view(torch.float8_e8m0fnu)
    yield Case("E8M0 scales", "official", (scales, ids, 8))
    yield Case("stack of streams", "official", (draw.normal(9, 4, 6, dtype=torch.bfloat16), ids, 8))


def _later_tokens_first(
    x: torch.Tensor, ids: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, ...]:
    rows, offsets, order = moe_dispatch.reference(x.flip(0), ids.flip(0, 1), num_experts)
    return rows, offsets, ids.numel() - 1 - order


def _choice_before_token(
    a: Any, _: torch.Tensor, offsets: torch.Tensor, __: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    tokens, k = a.ids.shape
    order = a.ids.t().flatten().argsort(stable=True)
    token, choice = order % max(tokens, 1), order // max(tokens, 1)
    return a.x[token], offsets, (token * k + choice).int()


moe_dispatch.fault("later tokens first within an expert")(_later_tokens_first)
moe_dispatch.wrong_results(
    {
        "choice before token within an expert": _choice_before_token,
        "counts instead of offsets": {
            "expert_offsets": lambda offsets: offsets.diff(prepend=offsets[:1])
        },
        "offsets of the expert after": {
            "expert_offsets": lambda offsets: torch.cat([offsets[1:], offsets[-1:]])
        },
        "last expert forgotten": {
            "expert_offsets": lambda offsets: torch.cat([offsets[:-1], offsets[-2:-1]])
        },
        "inverse order": {"order": lambda order: order.argsort().int()},
        "order counts tokens": lambda a, rows, offsets, order: (
            rows,
            offsets,
            order // a.ids.shape[1],
        ),
        "rows left in token order": lambda a, rows, *rest: (
            a.x.repeat_interleave(a.ids.shape[1], dim=0),
            *rest,
        ),
        "flat index modulo tokens": lambda a, rows, offsets, order: (
            a.x[order % max(len(a.ids), 1)],
            offsets,
            order,
        ),
    }
)
for _output in ("expert_offsets", "order"):
    moe_dispatch.no_output_fault(f"{_output}: one NaN", "counts and indices are integers")


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


moe_combine.wrong_arguments(
    {
        "order applied forwards": {"order": lambda order: order.argsort()},
        "rows taken in dispatch order": {"order": lambda order: torch.arange(len(order))},
        "choices of one token spread over all": lambda a: a._replace(
            order=(a.order % max(len(a.order) // a.k, 1)) * a.k
            + a.order // max(len(a.order) // a.k, 1)
        ),
    }
)
moe_combine.wrong_step(
    sum_choices,
    {
        "summed last choice first": lambda choices: sum_choices(choices.flip(1)),
        "bf16 accumulator": lambda choices: sum_choices(choices.bfloat16()).to(choices.dtype),
        "last choice forgotten": lambda choices: sum_choices(choices[:, :-1]),
    },
)
moe_combine.wrong_results({"mean instead of sum": lambda a, y: y / a.k})


@moe_combine.fault("summed by expert, not by choice")
def _(y: torch.Tensor, order: torch.Tensor, k: int) -> torch.Tensor:
    return torch.zeros_like(compute(y)[::k]).index_add(0, order // k, compute(y))
