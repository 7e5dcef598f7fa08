"""Rows sorted by expert: expert e owns rows offsets[e] .. offsets[e+1]-1 of int32 offsets [E+1] (spec/v4.md 5.3)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

from dsv4_backend.contract import Operator


def by_expert(
    expert_offsets: torch.Tensor,
    rows: int,
    experts: int,
    product: Callable[[int, slice], torch.Tensor],
) -> torch.Tensor:
    """The results [n, ...] of product(e, rows of e), one after the other: [rows, ...]."""
    if type(expert_offsets) is torch.Tensor and expert_offsets.device.type != "meta":
        spans = [slice(*bounds) for bounds in pairwise(expert_offsets.tolist())]
        # Experts without rows are passed over; without any row one is not, for the result's width.
        active = [e for e, span in enumerate(spans) if span.start < span.stop] or [0]
        return torch.cat([product(e, spans[e]) for e in active])
    everything = slice(rows)
    row = torch.arange(rows, device=expert_offsets.device, dtype=torch.int32)
    owner = torch.searchsorted(expert_offsets[1:], row, right=True)
    result = product(0, everything)
    for e in range(1, experts):
        result = torch.where((owner == e).unsqueeze(-1), product(e, everything), result)
    return result


def check_experts(op: Operator, argument: str, experts: int) -> None:
    """ArgumentError unless there is an expert."""
    if experts < 1:
        raise op.reject(argument, "no expert", "at least 1")


def check_offsets(op: Operator, expert_offsets: torch.Tensor, rows: int) -> None:
    """ArgumentError unless offsets go from 0 to the number of rows and never fall."""
    offsets = expert_offsets.tolist()
    if offsets[0] != 0 or offsets[-1] != rows or offsets != sorted(offsets):
        raise op.reject("expert_offsets", offsets, f"offsets from 0 to the number of rows {rows}, never falling")
