"""`dsv4-ascend doctor`: what this machine has, what is missing, and what to do."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from typing import Annotated

import torch
import typer
from rich.markup import escape
from rich.table import Table

import dsv4_backend
from dsv4_ascend.cli import FINDINGS, console, print_json
from dsv4_ascend.cli.engines import engine_findings
from dsv4_ascend.cli.symbols import judge, show
from dsv4_ascend.cli.symbols import symbols as list_symbols
from dsv4_backend import dispatch
from dsv4_backend.support import Finding, Probes, diagnose, probe, verdict

_COLOURS = {"ok": "green", "note": "dim", "warning": "yellow", "problem": "bold red"}


def doctor(
    symbols: Annotated[
        bool,
        typer.Option("--symbols", help="List the functions of launchers, also without an NPU."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look at versions, devices, CPU features, torch_npu and CANN;
    say what is missing and what to do. Where vLLM is installed: which class would serve V4 there.

    On an NPU every function that a launcher needs is looked up, and listed with what runs the
    operator where it is missing.

    Exit code 0 without problems (warnings allowed), 1 with problems that leave the CPU usable.
    """
    probes = probe()
    on_npu = probes.npus > 0
    functions = list_symbols(on_npu)
    checked = _self_check(("cpu", "npu") if on_npu else ("cpu",))
    findings = (*diagnose(probes), checked, judge(functions, on_npu), *engine_findings())
    problems = any(f.state == "problem" for f in findings)
    if json:
        print_json(_report(probes, findings) | {"symbols": [asdict(one) for one in functions]})
    else:
        _show(probes, findings)
        if symbols or on_npu:
            show(functions)
    if problems:
        raise typer.Exit(FINDINGS)


def _self_check(devices: tuple[str, ...]) -> Finding:
    """Run one operator on each device, against its closed form;
    say how many have kernels of their own there.
    """
    wrong = [device for device in devices if not _norm_is_right(device)]
    if wrong:
        advice = "rebuild the extension: pip install --force-reinstall --no-cache-dir dsv4-ascend"
        return Finding(
            "operators", "problem", f"rms_norm gives wrong values on {', '.join(wrong)}", advice
        )
    parts = [
        f"{len(dsv4_backend.OPERATORS)} known",
        *map(_implementations, devices),
        "`dsv4-ascend ops` lists them",
    ]
    return Finding("operators", "ok", "; ".join(parts))


def _norm_is_right(device: str) -> bool:
    ones = torch.ones(2, 8, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it runs as a reference there, the finding says
        return torch.allclose(torch.ops.dsv4.rms_norm(3 * ones, ones[0], 0.0), ones)


def _implementations(device: str) -> str:
    native = sum(where == device for _, where in dispatch.native_kernels())
    others = len(dsv4_backend.OPERATORS) - native
    return f"on {device} {native} with native kernels, {others} as references"


def _report(probes: Probes, findings: tuple[Finding, ...]) -> dict[str, object]:
    return {
        "probes": asdict(probes),
        "findings": [asdict(f) for f in findings],
        "verdict": verdict(findings, probes.npus, probes.npu_is_software),
    }


def _show(probes: Probes, findings: tuple[Finding, ...]) -> None:
    table = Table.grid(padding=(0, 2))
    for f in findings:
        colour = _COLOURS[f.state]
        table.add_row(f"[bold]{f.subject}[/]", f"[{colour}]{f.state}[/]", escape(f.found))
        if f.advice:
            table.add_row("", "", f"[cyan]-> {escape(f.advice)}[/]")
    table.add_row("[bold]verdict[/]", "", verdict(findings, probes.npus, probes.npu_is_software))
    console().print(table)
