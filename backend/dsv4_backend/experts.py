"""Rows sorted by expert: expert e owns rows offsets[e] ..
offsets[e+1]-1 of int32 offsets [E+1] (spec/v4.md 5.3).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

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
