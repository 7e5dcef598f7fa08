"""Faults that make sense for many operators: each turns a reference into a named mutant of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from dsv4_backend.contract import Operator

Edit = Callable[[torch.Tensor], torch.Tensor]


def _zero_last_token(y: torch.Tensor) -> torch.Tensor:
    y[-1:] = torch.zeros_like(y[-1:])
    return y


def _stale_tail(y: torch.Tensor) -> torch.Tensor:
    tail = max(1, y.shape[-1] // 8)
    y[..., -tail:] = 3 if y.dtype.is_floating_point else 1
    return y


def _one_nan(y: torch.Tensor) -> torch.Tensor:
    if y.numel():
        y.view(-1)[y.numel() // 2] = float("nan")
    return y


def _swap_tokens(y: torch.Tensor) -> torch.Tensor:
    return y.roll(1, dims=0)


EDITS: dict[str, Edit] = {
    "last token zero": _zero_last_token,
    "stale tail of channels": _stale_tail,
    "one NaN": _one_nan,
    "tokens shifted by one": _swap_tokens,
}


def add_output_faults(contract: Operator, *names: str, output: int = 0) -> None:
    """Add the named edits of output number `output` (or of the only one) as faults of `contract`."""
    for name in names:
        contract.fault(name)(_edited(contract, EDITS[name], output))


def _edited(contract: Operator, edit: Edit, output: int) -> Callable[..., Any]:
    def mutant(*args: Any) -> Any:
        result = contract.reference(*args)
        if isinstance(result, torch.Tensor):
            return edit(result.clone())
        outputs = list(result)
        outputs[output] = edit(outputs[output].clone())
        return tuple(outputs)

    return mutant


def explain(contract: Operator, *tables: Mapping[str, str]) -> None:
    """Say which automatic mutants of `contract` are equivalent, by tables of mutant and reason."""
    for table in tables:
        for mutant, why in table.items():
            contract.equivalent(mutant, why)
