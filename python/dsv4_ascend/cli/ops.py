"""`dsv4-ascend ops`: the operators and what runs them, their pages, a new one's skeleton."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from dsv4_ascend.cli import console, print_json
from dsv4_ascend.cli.new_operator import new
from dsv4_ascend.cli.operator_pages import write_pages
from dsv4_backend import OPERATORS, dispatch
from dsv4_backend.contract import Operator
from dsv4_backend.support import npu_fault

DEVICES = ("cpu", "npu")


@dataclass(frozen=True)
class Implementation:
    """What runs an operator on a device: a kernel's name, `reference`, or `none`; and why."""

    name: str
    reason: str


app = typer.Typer()
app.command("new")(new)


@app.callback(invoke_without_command=True)
def ops(
    context: typer.Context,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    docs: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", file_okay=False, help="Write a page for each operator."),
    ] = None,
) -> None:
    """List every operator with the implementation that runs it on each device, and the reason.

    A native kernel is asked about the operator's own parity cases; the others of its calls run the reference.
    """
    if context.invoked_subcommand is not None:
        return
    if docs is not None:
        _write(docs)
        return
    found = sorted(OPERATORS.values(), key=lambda op: (op.rows, op.name))
    rows = [(op, {device: implementation(op, device) for device in DEVICES}) for op in found]
    if json:
        print_json({"operators": [_as_json(op, answers) for op, answers in rows]})
        return
    table = Table("operator", "spec rows", *(f"{c}" for d in DEVICES for c in (d, f"why on {d}")), box=None)
    for op, answers in rows:
        cells = (cell for device in DEVICES for cell in (answers[device].name, escape(answers[device].reason)))
        table.add_row(f"[bold]{op.name}[/]", ", ".join(map(str, op.rows)), *cells)
    console().print(table)


def _write(folder: Path) -> None:
    try:
        changed = write_pages(folder)
    except OSError as error:
        raise typer.BadParameter(str(error), param_hint="--docs") from error
    print(f"{len(OPERATORS)} operators: {len(changed)} pages changed in {folder}")


def implementation(operator: Operator, device: str) -> Implementation:
    """Which implementation of `operator` the dispatcher picks on `device`, as far as can be said without arguments."""
    fault = npu_fault() if device == "npu" else None
    kernels = dispatch.native_kernels().get((operator.name, device))
    if fault is not None:
        return Implementation("none", fault)
    if kernels is None:
        return Implementation("reference", "no kernel for this device in this build")
    return Implementation(*_coverage(operator, device))


def _coverage(operator: Operator, device: str) -> tuple[str, str]:
    """The candidate that runs most of the operator's cases, and how many of them run natively."""
    answers = [dispatch.support(operator.name, *c.arguments, device=device) for c in operator.iterate_cases()]
    refusals = [answer.reason for answer in answers if not answer]
    names = Counter(answer.reason for answer in answers if answer)
    name = names.most_common(1)[0][0] if names else "reference"
    if not refusals:
        return name, "runs all of its cases"
    native = len(answers) - len(refusals)
    return name, f"runs {native} of {len(answers)} cases; else the reference: {refusals[0]}"


def _as_json(operator: Operator, answers: dict[str, Implementation]) -> dict[str, object]:
    return {
        "name": operator.name,
        "schema": operator.schema,
        "spec_rows": list(operator.rows),
        "faults": len(operator.faults),
        "devices": {device: asdict(answer) for device, answer in answers.items()},
    }
