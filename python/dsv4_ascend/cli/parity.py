"""`dsv4-ascend parity`: every operator against its reference,
and its cases against its named faults.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from dsv4_ascend.cli import FINDINGS, INTERRUPTED, console, print_json
from dsv4_ascend.parity.faults import FaultResult
from dsv4_ascend.parity.report import (
    OperatorReport,
    Selection,
    measure,
    mutation_score,
    reference_mutation_score,
    reproduce,
    totals,
)
from dsv4_ascend.parity.runner import CaseResult
from dsv4_backend.contract import PROFILES
from dsv4_backend.errors import EnvironmentFault
from dsv4_backend.support import npu_fault


def parity(
    faults: Annotated[
        bool, typer.Option("--faults", help="Also run every named fault through the cases.")
    ] = False,
    mutants: Annotated[
        bool, typer.Option("--mutants", help="Also run automatic mutants of the references.")
    ] = False,
    pattern: Annotated[
        str,
        typer.Option(
            "-k", help="Part of an OPERATOR's name, OPERATOR/PROFILE/CASE, OPERATOR/FAULT, a CASE."
        ),
    ] = "",
    profile: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(PROFILES)}; default: all.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or npu.")] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run every parity case on every implementation of a device,
    and compare with the oracle's values.

    Limit use is error / limit: 0 is exact, above 1 fails. Exit code 1 if a case fails or a
    fault survives.
    """
    selection = Selection(
        pattern, _checked_profile(profile), _checked_device(device), faults, mutants
    )
    reports: list[OperatorReport] = []
    interrupted = False
    try:
        for report in _with_progress(selection):
            reports.append(report)
    except KeyboardInterrupt:
        interrupted = True
    if not reports and not interrupted:
        raise typer.BadParameter(f"{pattern!r} names no case or fault", param_hint="-k")
    if json:
        print_json(_as_json(selection, reports, interrupted))
    else:
        _show(reports)
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    if any(r.failures or r.survivors for r in reports):
        raise typer.Exit(FINDINGS)


def _checked_profile(profile: str | None) -> str | None:
    if profile is not None and profile not in PROFILES:
        raise typer.BadParameter(
            f"{profile!r} is not one of {', '.join(PROFILES)}", param_hint="--profile"
        )
    return profile


def _checked_device(device: str) -> str:
    if device not in ("cpu", "npu"):
        raise typer.BadParameter(f"{device!r} is not cpu or npu", param_hint="--device")
    fault = npu_fault() if device == "npu" else None
    if fault is not None:
        raise EnvironmentFault(f"no NPU to run on: {fault}")
    return device


def _with_progress(selection: Selection) -> Iterator[OperatorReport]:
    """Measure, with a progress bar where somebody watches."""
    operators = selection.operators()
    bar = Progress(console=console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    with bar:
        task = bar.add_task("parity", total=len(operators))
        for operator in operators:
            bar.update(task, description=operator.name)
            report = measure(operator, selection)
            bar.advance(task)
            if report.cases or report.left_out or report.faults or report.mutants:
                yield report


def _as_json(
    selection: Selection, reports: Sequence[OperatorReport], interrupted: bool
) -> dict[str, object]:
    return {
        "torch": torch.__version__,
        "device": selection.device,
        "complete": not interrupted,
        "operators": [r.to_json() for r in reports],
        "totals": totals(reports),
    }


def _show(reports: Sequence[OperatorReport]) -> None:
    table = Table("operator", box=None)
    for heading in ("cases", "mean use", "max use", "faults killed", "mutants killed", "time"):
        table.add_column(heading, justify="right")
    for report in reports:
        table.add_row(*_cells(report))
    out = console()
    out.print(table)
    for report in reports:
        for unfit in report.left_out:
            out.print(f"left out: {escape(f'{unfit.name}: {unfit.reason}')}", soft_wrap=True)
        for case in report.failures:
            _fail(out, case, f"{case.implementation}: {case.comparison.detail}")
        for fault in report.survivors:
            _fail(out, fault, f"survives: {fault.how}")
    out.print(_summary(reports), soft_wrap=True)


def _fail(out: Console, result: CaseResult | FaultResult, why: str) -> None:
    out.print(
        f"[bold red]FAIL[/] {escape(result.name)}: {escape(why)}  $ {escape(reproduce(result))}",
        soft_wrap=True,
    )


def _cells(report: OperatorReport) -> tuple[str, ...]:
    bad = len(report.failures)
    return (
        f"[bold]{report.operator}[/]",
        f"[red]{len(report.cases) - bad}/{len(report.cases)}[/]"
        if bad
        else f"[green]{len(report.cases)}[/]",
        f"{report.mean_use:.3f}",
        f"[red]{report.max_use:.3g}[/]" if report.max_use > 1 else f"{report.max_use:.3f}",
        _killed(report.faults),
        _killed(report.mutants),
        f"{report.seconds:.2f} s",
    )


def _killed(results: Sequence[FaultResult]) -> str:
    killed = sum(result.killed for result in results)
    colour = "green" if killed == len(results) else "red"
    return f"[{colour}]{killed}/{len(results)}[/]" if results else "-"


def _summary(reports: Sequence[OperatorReport]) -> str:
    sums = totals(reports)
    text = f"{sums['operators']} operators, {sums['cases']} cases, {sums['failed']} failed"
    if sums["left_out"]:
        text += f", {sums['left_out']} left out"
    if sums["faults"]:
        killed = sums["faults"] - sums["faults_survived"]
        text += (
            f"; {killed} of {sums['faults']} faults killed, mutation score "
            f"{100 * mutation_score(reports):.1f} %"
        )
    if sums["mutants"]:
        killed = sums["mutants"] - sums["mutants_survived"]
        text += (
            f"; {killed} of {sums['mutants']} automatic mutants killed, "
            f"reference mutation score {100 * reference_mutation_score(reports):.1f} %"
        )
    return f"{text}; {sums['seconds']:.1f} s"
