"""Suite `host`: what a call costs before its kernel works,
on the smallest arguments that there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dsv4_ascend.bench.sections import Section
from dsv4_ascend.bench.small_moe import beside_operators, small_moe
from dsv4_ascend.bench.timing import Timing, interleaved
from dsv4_ascend.bench.work import REFERENCE, ran
from dsv4_ascend.parity.runner import map_tensors, samples
from dsv4_backend import OPERATORS
from dsv4_backend.contract import Operator

BASELINE = "aten.add"
"""torch.add of two tensors of one element: what torch itself asks for a call of two arguments."""
LAYER = "MoE"
"""A layer of 256 experts for one token: what it does beside its operators."""


@dataclass(frozen=True)
class Call:
    """One row: an operator on its smallest case. ran: its implementation;
    ratio: to `BASELINE` in the same run.
    """

    name: str
    arguments: int
    ran: str
    timing: Timing
    ratio: float


def named(pattern: str) -> list[str]:
    """What is timed whose name contains `pattern`."""
    return [name for name in (LAYER, *OPERATORS) if pattern in name]


def host(pattern: str, rounds: int) -> list[Call]:
    """The baseline, then the layer and the operators whose names contain `pattern`,
    native kernels first.
    """
    one = torch.ones(1)
    with torch.inference_mode():
        calls: dict[str, Callable[[], object]] = {BASELINE: lambda: torch.add(one, one)}
        counts, who = {BASELINE: 2}, {BASELINE: "torch"}
        if pattern in LAYER:
            calls[LAYER], counts[LAYER] = beside_operators(small_moe(256)), 2
            who[LAYER] = "beside its operators"
        for operator in OPERATORS.values():
            if pattern in operator.name:
                arguments = _smallest(operator)
                calls[operator.name] = _bound(operator, arguments)
                counts[operator.name] = len(arguments)
                who[operator.name] = ran(operator.name, *arguments)
        timings = interleaved(calls, rounds)
    base = timings[BASELINE].median
    rows = [Call(n, counts[n], who[n], t, t.median / base) for n, t in timings.items()]
    return sorted(rows, key=lambda row: (row.name != BASELINE, row.ran == REFERENCE, row.name))


def _smallest(operator: Operator) -> tuple[Any, ...]:
    """The arguments of the case with the fewest elements,
    as values of their own: calls write into some.
    """
    cases = (sample.case.arguments for sample in samples(operator))
    least = min(cases, key=_elements)
    return tuple(map_tensors(lambda t: t.clone(), argument) for argument in least)


def _elements(arguments: tuple[Any, ...]) -> int:
    tensors = (t for a in arguments for t in (a if isinstance(a, list | tuple) else [a]))
    return sum(t.numel() for t in tensors if isinstance(t, torch.Tensor))


def _bound(operator: Operator, arguments: tuple[Any, ...]) -> Callable[[], object]:
    function = getattr(torch.ops.dsv4, operator.name)
    return lambda: function(*arguments)


def section(rows: list[Call]) -> Section:
    """The table."""
    return Section(
        "What a call costs before its kernel works",
        ("call", "arguments", "ran", "us", "quartiles", f"times {BASELINE}"),
        [_cells(row) for row in rows],
        (f"the smallest arguments; times {BASELINE}: in the same run",),
        text=(0, 2),
    )


def _cells(row: Call) -> list[str]:
    median, low, high = (1e6 * s for s in (row.timing.median, row.timing.low, row.timing.high))
    return [
        row.name,
        str(row.arguments),
        row.ran,
        f"{median:.2f}",
        f"{low:.2f} to {high:.2f}",
        f"{row.ratio:.1f}",
    ]
