"""What `dsv4-ascend parity` prints: a table, what failed and how to see it again, sums."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dsv4_ascend.cli import console
from dsv4_ascend.parity.faults import FaultResult
from dsv4_ascend.parity.report import (
    OperatorReport,
    mutation_score,
    reference_mutation_score,
    reproduce,
    totals,
)


def show(reports: Sequence[OperatorReport], replayed: str | None = None) -> None:
    """Print the reports; replayed: the bundle that they judge."""
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
        for unfit in report.unjudged:
            line = escape(f"{unfit.name}: {unfit.reason}")
            out.print(f"[bold red]NOT JUDGED[/] {line}", soft_wrap=True)
        again = partial(reproduce, replayed=replayed)
        for case in report.failures:
            foreign = ", on other inputs" if case.name in report.other_inputs else ""
            why = f"{case.implementation}{foreign}: {case.comparison.detail}"
            _fail(out, case.name, why, again(case))
        for fault in report.survivors:
            _fail(out, fault.name, f"survives: {fault.how}", again(fault))
    out.print(_summary(reports), soft_wrap=True)


def _fail(out: Console, name: str, why: str, command: str) -> None:
    out.print(
        f"[bold red]FAIL[/] {escape(name)}: {escape(why)}  $ {escape(command)}", soft_wrap=True
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
    for key, words in (
        ("left_out", "left out"),
        ("unjudged", "not judged"),
        ("other_inputs", "on inputs that this machine draws otherwise"),
    ):
        if sums[key]:
            text += f", {sums[key]} {words}"
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
