"""What proofs of operators on rows sorted by expert share: offsets,
the oracle's loop, wrong offsets, equivalents.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from dsv4_backend.contract import Operator
from dsv4_backend.faults import Edits, Steps
from dsv4_backend.ops.int8_moe import add_choices
from dsv4_backend.proofs.numerics import Array


def offsets_of(*rows: int) -> torch.Tensor:
    """int32 [E + 1] of experts with so many rows each."""
    return torch.tensor([0, *rows]).cumsum(0).int()


def joined(offsets: Array, expert: Callable[[int, slice], Array]) -> Array:
    """The results of expert(e, rows of e), one after the other; offsets cover every row."""
    bounds = offsets.tolist()
    return np.concatenate([expert(e, slice(*bounds[e : e + 2])) for e in range(len(bounds) - 1)])


_EDITS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "boundary rows to the next expert": lambda o: torch.cat(
        [o[:1], (o[1:-1] - 1).clamp(min=0), o[-1:]]
    ),
    "boundary rows to the expert before": lambda o: torch.cat(
        [o[:1], (o[1:-1] + 1).clamp(max=int(o[-1])), o[-1:]]
    ),
    "every row to the first expert": lambda o: torch.cat([o[:1], o[-1:].expand(len(o) - 1)]),
    "experts without rows not counted": lambda o: torch.cat(
        [o.unique(), o[-1:].expand(len(o) - len(o.unique()))]
    ),
    "experts reversed": lambda o: torch.cat([o[:1], o.diff().flip(0).cumsum(0).int()]),
}
WRONG_OFFSETS: dict[str, Edits] = {name: {"expert_offsets": edit} for name, edit in _EDITS.items()}
"""Wrong arguments of every such operator."""

WRONG_SUMS: dict[str, Steps] = {
    "shared expert weighed too": {
        add_choices: lambda shared, choices, weights: add_choices(
            shared * weights[:, :1], choices, weights
        )
    },
    "last choice left out": {
        add_choices: lambda shared, choices, weights: add_choices(shared, choices[:, :-1], weights)
    },
}
"""Wrong steps of every operator that sums experts."""

TRACED_ONLY = "_traced: *"
"""Mutants of the branch of `by_expert` for tracing, where offsets have no values;
no case reaches it.
"""


def explain_experts(op: Operator) -> None:
    """Say why mutants of `by_expert` compute what the reference of `op` computes."""
    op.equivalent(
        TRACED_ONLY, "only tracing runs it; tests/backend/test_traced_experts.py kills them"
    )
    op.equivalent("by_expert: low < high -> low <= high", "an expert without rows adds none")
    for name in (
        "_has_values: tensor.device.type != 'meta' -> tensor.device.type == 'meta'",
        "_has_values: type(tensor) is torch.Tensor and tensor.device.type != 'meta' -> "
        "type(tensor) is torch.Tensor or tensor.device.type != 'meta'",
        "by_expert: not _has_values(expert_offsets) -> _has_values(expert_offsets)",
    ):
        op.equivalent(
            name, "the branch for tracing, on real offsets: the same results by another way"
        )
