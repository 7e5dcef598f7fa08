"""`dsv4-ascend ops`: the operators and what runs them, their pages, a new one's skeleton."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from dsv4_ascend.cli import console, print_json
from dsv4_ascend.cli.new_operator import new
from dsv4_ascend.cli.operator_pages import write_pages
from dsv4_backend import OPERATORS, dispatch
from dsv4_backend.contract import Operator
from dsv4_backend.support import Support, npu_fault

CHIPS = ("A2", "A3", "A5")
PACKAGES = ("builtin", "vllm-ascend", "recipes")
"""Operator packages for Ascend: CANN's own, vllm-ascend's, cann-recipes-infer's."""


@dataclass(frozen=True)
class Implementation:
    """What runs an operator on a device: a candidate's name, `reference`, or `none`; and why.

    kind: `kernel`, `fused` or `composite` (see `dispatch.Launcher`); `refused`, where candidates
    exist and take none of the cases there; `reference`, where there is no candidate; `none`.
    """

    kind: str
    name: str
    reason: str

    @property
    def cell(self) -> str:
        """Kind, function and reason; the operator's name stands in its row already."""
        function = self.name.partition("/")[2]
        return (
            f"{self.kind} {function}: {self.reason}" if function else f"{self.kind}: {self.reason}"
        )


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
    the reference. Chips are asked by what documents say, not by what is installed: one function
    is fused, several are composite, and where all cases are refused the reference runs.
    """
    if context.invoked_subcommand is not None:
        return
    if docs is not None:
        _write(docs)
        return
    machines = _machines(chip, cann, tuple(package or PACKAGES[:1]))
    found = sorted(OPERATORS.values(), key=lambda op: (op.rows, op.name))
    rows = [(op, implementations(op, machines)) for op in found]
    if json:
        print_json({"operators": [_as_json(op, answers) for op, answers in rows]})
        return
    _show(rows)


def _show(rows: Sequence[tuple[Operator, Mapping[str, Implementation]]]) -> None:
    """A column for each machine; one that is not here is said once."""
    absent = {name: said.reason for name, said in rows[0][1].items() if said.kind == "none"}
    shown = [name for name in rows[0][1] if name not in absent]
    table = Table(Column("operator", no_wrap=True), "rows", box=None)
    for name in shown:
        table.add_column(name, overflow="fold")
    for op, answers in rows:
        cells = (escape(answers[name].cell) for name in shown)
        table.add_row(f"[bold]{op.name}[/]", ", ".join(map(str, op.rows)), *cells)
    out = console()
    out.print(table)
    for name, reason in absent.items():
        out.print(escape(f"no {name} here: {reason}"), soft_wrap=True)


def _machines(chips: list[str] | None, cann: str, packages: tuple[str, ...]) -> Machines:
    """The chips that are asked about, or CPU and NPU of this machine and one chip of each kind."""
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
    here: Machines = {} if chips else {"cpu": ("cpu", None), "npu": ("npu", None)}
    asked = {c: ("npu", dispatch.Context("portable", c, cann, packages)) for c in chips or CHIPS}
    return here | asked


def _write(folder: Path) -> None:
    try:
        changed = write_pages(folder)
    except OSError as error:
        raise typer.BadParameter(str(error), param_hint="--docs") from error
    print(f"{len(OPERATORS)} operators: {len(changed)} pages changed in {folder}")


def implementations(operator: Operator, machines: Machines) -> dict[str, Implementation]:
    """What the dispatcher picks for `operator` on each machine, as far as its own cases say."""
    cases = [case.arguments for case in operator.iterate_cases()]
    return {name: _on(operator, cases, *machine) for name, machine in machines.items()}


def _on(
    operator: Operator,
    cases: Sequence[tuple[Any, ...]],
    device: str,
    context: dispatch.Context | None,
) -> Implementation:
    fault = npu_fault() if device == "npu" and context is None else None
    if fault is not None:
        return Implementation("none", "none", fault)
    if (operator.name, device) not in dispatch.native_kernels():
        return Implementation("reference", "reference", dispatch.NO_KERNEL)
    where: dict[str, Any] = {"device": device, "context": context}
    return _coverage([dispatch.support(operator.name, *c, **where) for c in cases])


def _coverage(answers: Sequence[Support]) -> Implementation:
    """The candidate that runs most of the operator's cases, how many of them run natively,
    and the most frequent reason against the others.
    """
    refusals = Counter(answer.reason for answer in answers if not answer)
    names = Counter(answer.reason for answer in answers if answer)
    against = refusals.most_common(1)[0][0] if refusals else ""
    if not names:
        return Implementation("refused", "reference", against)
    name = names.most_common(1)[0][0]
    kind = next(one.kind for one in dispatch.launchers() if one.name == name)
    if not refusals:
        return Implementation(kind, name, "runs all of its cases")
    told = f"runs {names.total()} of {len(answers)} cases; else the reference: {against}"
    return Implementation(kind, name, told)


def _as_json(operator: Operator, answers: dict[str, Implementation]) -> dict[str, object]:
    return {
        "name": operator.name,
        "schema": operator.schema,
        "spec_rows": list(operator.rows),
        "faults": len(operator.faults),
        "devices": {
            device: {"name": answer.name, "reason": answer.reason}
            for device, answer in answers.items()
        },
        "kinds": {device: answer.kind for device, answer in answers.items()},
    }
