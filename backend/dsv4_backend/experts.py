"""Rows sorted by expert: expert e owns rows offsets[e] ..
offsets[e+1]-1 of int32 offsets [E+1] (spec/v4.md 5.3).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from dsv4_backend.contract import Operator

Product = Callable[[int, slice], torch.Tensor]


def by_expert(expert_offsets: torch.Tensor, rows: torch.Tensor, product: Product) -> torch.Tensor:
    """The results [n, ...] of product(e, rows of e),
    one after the other: [T, ...] for `rows` [T, ...].
    """
    if not _has_values(expert_offsets):
        return _traced(expert_offsets, rows, product)
    bounds = expert_offsets.tolist()
    # Experts without rows are passed over. Without any row one is not: the result has its width and
    # its gradient.
    active = [e for e, (low, high) in enumerate(pairwise(bounds)) if low < high] or [0]
    return torch.cat([product(e, slice(bounds[e], bounds[e + 1])) for e in active])


def _traced(expert_offsets: torch.Tensor, rows: torch.Tensor, product: Product) -> torch.Tensor:
    """`by_expert` where offsets have no values: every row with every expert,
    and its own result kept.
    """
    everything = slice(None)
    row = torch.arange(rows.shape[0], device=rows.device, dtype=torch.int32)
    owner = torch.searchsorted(expert_offsets[1:], row, right=True)
    result = product(0, everything)
    for e in range(1, expert_offsets.shape[0] - 1):
        result = torch.where((owner == e).unsqueeze(-1), product(e, everything), result)
    return result


def _has_values(tensor: torch.Tensor) -> bool:
    return type(tensor) is torch.Tensor and tensor.device.type != "meta"


def check_by_expert(
    op: Operator,
    stack: str,
    rows: str,
    also: Callable[..., None] | None = None,
    values: Callable[..., None] | None = None,
) -> None:
    """Have `op` checked: an expert in the argument `stack` [E, ...],
    offsets that cover the argument `rows` [T, ...].

    also: further relations between the shapes of all arguments. values: what else their values are.
    """
    names = list(inspect.signature(op.reference).parameters)
    experts, tokens, bounds = map(names.index, (stack, rows, "expert_offsets"))

    @op.shapes
    def _(*arguments: Any) -> None:
        if arguments[experts].shape[0] < 1:
            raise op.reject(stack, f"shape {tuple(arguments[experts].shape)}", "at least 1 expert")
        if also is not None:
            also(*arguments)

    @op.contents
    def _(*arguments: Any) -> None:
        offsets, count = arguments[bounds].tolist(), arguments[tokens].shape[0]
        if offsets[0] != 0 or offsets[-1] != count or offsets != sorted(offsets):
            expected = f"offsets from 0 to the number of rows {count}, never falling"
            raise op.reject("expert_offsets", offsets, expected)
        if values is not None:
            values(*arguments)
