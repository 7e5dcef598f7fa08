"""`dsv4-ascend doctor`: what this machine has, what is missing, and what to do."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import torch
import typer
from rich.markup import escape
from rich.table import Table

import dsv4_backend
from dsv4_ascend.cli import FINDINGS, console, print_json
from dsv4_backend import dispatch
from dsv4_backend.support import Finding, Probes, diagnose, probe, verdict

_COLOURS = {"ok": "green", "note": "dim", "warning": "yellow", "problem": "bold red"}


def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Look at versions, devices, CPU features, torch_npu and CANN; say what is missing and what to do.

    Exit code 0 without problems (warnings allowed), 1 with problems that leave the CPU usable.
    """
    probes = probe()
    findings = (*diagnose(probes), _self_check())
    problems = any(f.state == "problem" for f in findings)
    if json:
        print_json(_report(probes, findings))
    else:
        _show(probes, findings)
    if problems:
        raise typer.Exit(FINDINGS)


def _self_check() -> Finding:
    """Run one operator on the CPU, against its closed form."""
    ones = torch.ones(2, 8)
    result = torch.ops.dsv4.rms_norm(3 * ones, ones[0], 0.0)
    total, native = len(dsv4_backend.OPERATORS), sum(d == "cpu" for _, d in dispatch.native_kernels())
    found = f"{total} known, all run on the CPU ({native} with native kernels); `dsv4-ascend ops` lists them"
    if torch.allclose(result, ones):
        return Finding("operators", "ok", found)
    advice = "rebuild the extension: pip install --force-reinstall --no-cache-dir dsv4-ascend"
    return Finding("operators", "problem", "rms_norm gives wrong values on the CPU", advice)


def _report(probes: Probes, findings: tuple[Finding, ...]) -> dict[str, object]:
    return {
        "probes": asdict(probes),
        "findings": [asdict(f) for f in findings],
        "verdict": verdict(findings, probes.npus),
    }


def _show(probes: Probes, findings: tuple[Finding, ...]) -> None:
    table = Table.grid(padding=(0, 2))
    for f in findings:
        colour = _COLOURS[f.state]
        table.add_row(f"[bold]{f.subject}[/]", f"[{colour}]{f.state}[/]", escape(f.found))
        if f.advice:
            table.add_row("", "", f"[cyan]-> {escape(f.advice)}[/]")
    table.add_row("[bold]verdict[/]", "", verdict(findings, probes.npus))
    console().print(table)
