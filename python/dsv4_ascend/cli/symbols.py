"""Functions of the device's that launchers need: which are here, and what runs where one is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Column, Table

from dsv4_ascend.cli import console
from dsv4_backend.contract import OPERATORS
from dsv4_backend.dispatch import (
    Launcher,
    NpuFunction,
    launchers,
    npu_functions,
    npu_packages,
)
from dsv4_backend.support import Finding

_ABSENT = "package not here"
_COLOURS = {"found": "green", "missing": "bold red"}
_SHOWN = 5


@dataclass(frozen=True)
class Symbol:
    """One function that a candidate needs.

    state: `found`; `missing`, where documents place it on this chip and CANN and its library lacks
    it; `package not here`, where they place it in a package without a library; `not of this chip`,
    by documents; `not found` without an NPU. package: the one that has it,
    or where documents place it. instead: what runs the operator if this candidate cannot, by the
    first function of another one.
    """

    operator: str
    candidate: str
    kind: str
    symbol: str
    package: str
    state: str
    instead: str


def symbols(on_npu: bool) -> list[Symbol]:
    """Every function of every launcher, looked up now; on_npu: whether there is a device to ask."""
    ours = [one for one in launchers() if one.symbols]
    functions = {one.symbol: one for one in npu_functions()}
    return [
        _symbol(one, functions[symbol], on_npu, _instead(one, ours, functions))
        for one in ours
        for symbol in one.symbols
    ]


def _symbol(one: Launcher, function: NpuFunction, on_npu: bool, instead: str) -> Symbol:
    return Symbol(
        operator=one.operator,
        candidate=one.name,
        kind=one.kind,
        symbol=function.symbol,
        package=function.package or function.documented,
        state=_state(function, on_npu),
        instead=instead,
    )


def _state(function: NpuFunction, on_npu: bool) -> str:
    if function.package:
        return "found"
    if not on_npu:
        return "not found"
    if not function.expected:
        return "not of this chip"
    return "missing" if function.expected in npu_packages() else _ABSENT


def _instead(one: Launcher, ours: Sequence[Launcher], functions: Mapping[str, NpuFunction]) -> str:
    """Empty where all that a candidate needs is here."""
    complete = [
        other
        for other in ours
        if other.operator == one.operator and all(functions[s].package for s in other.symbols)
    ]
    if one in complete:
        return ""
    function = complete[0].symbols[0] if complete else ""
    return function or "reference; `strict` refuses"


def judge(found: Sequence[Symbol], on_npu: bool) -> Finding:
    """The line of `doctor` on functions."""
    states = {one.symbol: one.state for one in found}
    if not on_npu:
        told = f"no CANN in this process: none of {len(states)} functions of launchers is looked up"
        return Finding("functions", "note", f"{told}; `dsv4-ascend doctor --symbols` lists them")
    here = sum(state == "found" for state in states.values())
    missing = sorted(symbol for symbol, state in states.items() if state == "missing")
    absent = sum(state == _ABSENT for state in states.values())
    others = len(states) - here - len(missing) - absent
    told = f"{here} of {len(states)} found, {others} not of this chip or CANN by documents"
    told += f", {absent} of packages that are not here" if absent else ""
    if not missing:
        return Finding("functions", "ok", told)
    first = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
    advice = "what runs instead stands below; install the CANN that has them, or report it"
    return Finding("functions", "warning", f"{told}, {len(missing)} missing: {first}", advice)


def show(found: Sequence[Symbol]) -> None:
    """Print a table, a row for each function of each candidate."""
    table = Table(
        *(Column(name, no_wrap=True) for name in ("operator", "kind", "function", "state")),
        *(Column(name, overflow="fold") for name in ("package", "runs instead")),
        box=None,
    )
    for one in found:
        state = f"[{_COLOURS.get(one.state, 'dim')}]{one.state}[/]"
        package, instead = escape(one.package), escape(one.instead or "-")
        table.add_row(f"[bold]{one.operator}[/]", one.kind, one.symbol, state, package, instead)
    out = console()
    out.print(table)
    others = sorted(set(OPERATORS) - {one.operator for one in found})
    out.print(f"references on every chip, without a launcher: {', '.join(others)}", soft_wrap=True)
