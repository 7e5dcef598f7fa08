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

CHIPS = ("A2", "A3", "A5")
PACKAGES = ("builtin", "vllm-ascend", "recipes")
"""Operator packages for Ascend: CANN's own, vllm-ascend's, cann-recipes-infer's."""


@dataclass(frozen=True)
class Implementation:
    """What runs an operator on a device: a kernel's name, `reference`, or `none`; and why."""

    name: str
    reason: str


Machines = dict[str, tuple[str, dispatch.Context | None]]
"""Heading of a column -> device, and the machine to ask about; None: this one."""

app = typer.Typer()
app.command("new")(new)


@app.callback(invoke_without_command=True)
def ops(
    context: typer.Context,
    chip: Annotated[
        list[str] | None,
        typer.Option(help="A2, A3, A5 or a SoC name, here or not; repeatable.", metavar="CHIP"),
    ] = None,
    cann: Annotated[str, typer.Option(help="The CANN that --chip has.")] = "9.1.0",
    package: Annotated[
        list[str] | None,
        typer.Option(
            help=f"An operator package that --chip has: {', '.join(PACKAGES)}; repeatable."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    docs: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", file_okay=False, help="Write a page for each operator."),
    ] = None,
) -> None:
    """List every operator with the implementation that runs it on each device, and the reason.

    A native kernel is asked about the operator's own parity cases; the others of its calls run
    the reference. With --chip it is asked for that machine: by what documents say, not by what
    is installed.
    """
    if context.invoked_subcommand is not None:
        return
    if docs is not None:
        _write(docs)
        return
    machines = _machines(chip, cann, tuple(package or PACKAGES[:1]))
    found = sorted(OPERATORS.values(), key=lambda op: (op.rows, op.name))
    rows = [
        (op, {name: implementation(op, *machine) for name, machine in machines.items()})
        for op in found
    ]
    if json:
        print_json({"operators": [_as_json(op, answers) for op, answers in rows]})
        return
    table = Table(
        "operator",
        "spec rows",
        *(c for name in machines for c in (name, f"why on {name}")),
        box=None,
    )
    for op, answers in rows:
        cells = (
            cell for answer in answers.values() for cell in (answer.name, escape(answer.reason))
        )
        table.add_row(f"[bold]{op.name}[/]", ", ".join(map(str, op.rows)), *cells)
    console().print(table)


def _machines(chips: list[str] | None, cann: str, packages: tuple[str, ...]) -> Machines:
    """CPU and NPU of this machine, or the chips that are asked about."""
    for name in packages:
        if name not in PACKAGES:
            raise typer.BadParameter(
                f"{name!r} is not one of {', '.join(PACKAGES)}", param_hint="--package"
            )
    for name in chips or ():
        if not name.startswith(("Ascend", *CHIPS)):
            raise typer.BadParameter(
                f"{name!r} is not {', '.join(CHIPS)} or a SoC name", param_hint="--chip"
            )
    asked: Machines = {
        c: ("npu", dispatch.Context("portable", c, cann, packages)) for c in chips or ()
    }
    return asked or {"cpu": ("cpu", None), "npu": ("npu", None)}


def _write(folder: Path) -> None:
    try:
        changed = write_pages(folder)
    except OSError as error:
        raise typer.BadParameter(str(error), param_hint="--docs") from error
    print(f"{len(OPERATORS)} operators: {len(changed)} pages changed in {folder}")


def implementation(
    operator: Operator, device: str, context: dispatch.Context | None = None
) -> Implementation:
    """Which implementation of `operator` the dispatcher picks on `device`,
    as far as can be said without arguments.

    context: a machine to ask about instead of this one.
    """
    fault = npu_fault() if device == "npu" and context is None else None
    if fault is not None:
        return Implementation("none", fault)
    if (operator.name, device) not in dispatch.native_kernels():
        return Implementation("reference", dispatch.NO_KERNEL)
    return Implementation(*_coverage(operator, device, context))


def _coverage(operator: Operator, device: str, context: dispatch.Context | None) -> tuple[str, str]:
    """The candidate that runs most of the operator's cases, and how many of them run natively."""
    cases = operator.iterate_cases()
    answers = [
        dispatch.support(operator.name, *c.arguments, device=device, context=context) for c in cases
    ]
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
