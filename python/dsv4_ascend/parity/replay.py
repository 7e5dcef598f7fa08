"""Judging a bundle without the machine that recorded it.

The oracle runs on the inputs of the bundle, not on those that this machine draws: torch's normal
values differ in their last bits between instruction sets, so that half of all cases would be lost
between an Arm host and a laptop. They must be of the same form as the contract's case of that name
(kinds, dtypes, shapes, equal numbers) and pass the contract's own checks; where values differ, the
case is judged all the same and counted as one of other inputs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from dsv4_ascend.checkpoint.strict_json import FileProblem
from dsv4_ascend.parity.bundle import Bundle, RecordedCase, Run, TensorName
from dsv4_ascend.parity.report import OperatorReport, Selection
from dsv4_ascend.parity.runner import (
    RAISED,
    LeftOut,
    Outcome,
    Sample,
    case_result,
    samples,
    verdict,
)
from dsv4_backend import _C, OPERATORS
from dsv4_backend.contract import Case
from dsv4_backend.errors import Dsv4Error

_UNFIT_VALUES = (Dsv4Error, *RAISED, ArithmeticError, AssertionError, LookupError, TypeError)
"""What an oracle may raise on values that no case of ours has."""


def replay(bundle: Bundle, selection: Selection) -> Iterator[OperatorReport]:
    """Judge the selected cases of a bundle, operator by operator."""
    entries: dict[str, list[RecordedCase]] = {}
    for case in bundle.manifest.cases:
        if _is_selected(case.name, case.profile, selection):
            entries.setdefault(case.operator, []).append(case)
    left_out: dict[str, list[LeftOut]] = {}
    for unfit in bundle.manifest.left_out:
        operator, profile = [*unfit.name.split("/"), ""][:2]
        if _is_selected(unfit.name, profile, selection):
            left_out.setdefault(operator, []).append(unfit)
    names = {**entries, **left_out}
    for name in sorted(names, key=_place):
        report = _judged(bundle, name, entries.get(name, []))
        report.left_out += left_out.get(name, [])
        yield report


def absent(bundle: Bundle, selection: Selection) -> list[str]:
    """Names of the cases of this version that the bundle should have and does not mention:
    those of its own selection, as far as they are selected now.
    """
    manifest = bundle.manifest
    mentioned = {case.name for case in manifest.cases} | {c.name for c in manifest.left_out}
    recorded = Selection(manifest.pattern, manifest.profile)
    return [
        sample.name
        for operator in recorded.operators()
        for sample in samples(operator, recorded.profile, recorded.part)
        if sample.name not in mentioned
        and _is_selected(sample.name, sample.case.profile, selection)
    ]


def _is_selected(name: str, profile: str, selection: Selection) -> bool:
    if selection.profile not in (None, profile):
        return False
    operator, _, rest = name.partition("/")
    if operator not in OPERATORS:
        return selection.pattern in name
    return OPERATORS[operator] in selection.operators() and selection.part in rest


def _place(name: str) -> tuple[tuple[int, ...], str]:
    """In the order of the spec; what is unknown first."""
    return OPERATORS[name].rows if name in OPERATORS else (), name


def _judged(bundle: Bundle, name: str, entries: Sequence[RecordedCase]) -> OperatorReport:
    start = time.perf_counter()
    operator = OPERATORS.get(name)
    report = OperatorReport(name, operator.rows if operator else ())
    known = {sample.name: sample.case for sample in samples(operator)} if operator else {}
    for entry in entries:
        try:
            if operator is None or entry.name not in known:
                raise FileProblem(_unknown(entry))
            _judge_case(bundle, entry, Sample(operator, known[entry.name]), report)
        except FileProblem as problem:
            report.unjudged.append(LeftOut(entry.name, str(problem)))
    report.seconds = time.perf_counter() - start
    return report


def _unknown(entry: RecordedCase) -> str:
    what = "case" if entry.operator in OPERATORS else "operator"
    return f"this version has no such {what}"


def _judge_case(bundle: Bundle, entry: RecordedCase, ours: Sample, report: OperatorReport) -> None:
    """Add the results of every run; FileProblem where the case cannot be judged."""
    arguments = _arguments(bundle, entry, ours)
    sample = ours
    if not all(map(_same_value, arguments, ours.case.arguments)):
        sample = _of_other_inputs(ours, arguments)
        report.other_inputs.add(ours.name)
    if not entry.runs:
        raise FileProblem("no implementation ran it")
    device = bundle.manifest.machine.device
    for run in entry.runs:
        comparison = verdict(sample, _outcome(bundle, run))
        report.cases.append(
            case_result(sample, device, run.implementation, run.seconds, comparison)
        )


def _arguments(bundle: Bundle, entry: RecordedCase, ours: Sample) -> tuple[Any, ...]:
    """The bundle's arguments; FileProblem unless they are of the form of our case's."""
    expected = ours.case.arguments
    if len(entry.arguments) != len(expected):
        raise FileProblem(
            f"other inputs: found {len(entry.arguments)} arguments, expected {len(expected)}"
        )
    found = tuple(
        bundle.tensor(argument.name) if isinstance(argument, TensorName) else argument
        for argument in entry.arguments
    )
    for place, (got, want) in enumerate(zip(found, expected, strict=True)):
        if _form(got) != _form(want):
            raise FileProblem(
                f"other inputs: argument {place}: found {_form(got)}, expected {_form(want)}"
            )
    return found


def _form(argument: object) -> str:
    """What must be equal before values may differ: of numbers, all."""
    if isinstance(argument, torch.Tensor):
        return f"{argument.dtype} {list(argument.shape)}"
    return f"{type(argument).__name__} {argument}" if argument is not None else "nothing"


def _same_value(got: object, want: object) -> bool:
    """Whether tensors have the same bits; numbers and None have the same form already."""
    if not isinstance(got, torch.Tensor) or not isinstance(want, torch.Tensor):
        return True
    return torch.equal(_bytes(got), _bytes(want))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _of_other_inputs(ours: Sample, arguments: tuple[Any, ...]) -> Sample:
    """Our case on foreign values; FileProblem unless the contract and its oracle take them."""
    case = ours.case
    sample = Sample(ours.operator, Case(case.name, case.profile, arguments))
    try:
        _C.check(ours.operator.name, *ours.operator.with_defaults(arguments))
        _ = sample.golden
    except _UNFIT_VALUES as error:
        raise FileProblem(f"other inputs, and they cannot be judged: {error}") from None
    return sample


def _outcome(bundle: Bundle, run: Run) -> Outcome:
    if run.error:
        return Outcome(error=run.error)
    names = run.outputs
    return Outcome(tuple(None if name is None else bundle.tensor(name) for name in names))
