"""Faults that are other arguments: each edits one tensor and then computes as the reference does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dsv4_backend.contract import Operator, Reference

Edit = Callable[[torch.Tensor], torch.Tensor]

OFFSET_EDITS: dict[str, Edit] = {
    "boundary rows to the next expert": lambda o: torch.cat([o[:1], (o[1:-1] - 1).clamp(min=0), o[-1:]]),
    "boundary rows to the expert before": lambda o: torch.cat([o[:1], (o[1:-1] + 1).clamp(max=int(o[-1])), o[-1:]]),
    "every row to the first expert": lambda o: torch.cat([o[:1], o[-1:].expand(len(o) - 1)]),
    "experts without rows not counted": lambda o: torch.cat([o.unique(), o[-1:].expand(len(o) - len(o.unique()))]),
    "experts reversed": lambda o: torch.cat([o[:1], o.diff().flip(0).cumsum(0).int()]),
}
"""Wrong int32 offsets [E+1] of rows sorted by expert."""


def edited(op: Operator, argument: int, edit: Edit) -> Reference:
    """Mutant of `op` that edits one tensor argument."""

    def mutant(*args: Any) -> Any:
        return op.reference(*args[:argument], edit(args[argument]), *args[argument + 1 :])

    return mutant
