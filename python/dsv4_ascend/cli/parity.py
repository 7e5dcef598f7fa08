"""`dsv4-ascend parity`: every operator against its reference, its cases against its named faults,
and both halves of a comparison between machines: recording a run, judging a recorded one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import Progress

from dsv4_ascend.cli import FINDINGS, INTERRUPTED, console, print_json
from dsv4_ascend.cli.bundles import (
    origin_data,
    recording,
    show_absent,
    show_origin,
    show_written,
)
from dsv4_ascend.cli.parity_table import show
from dsv4_ascend.parity.bundle import Bundle
from dsv4_ascend.parity.record import Recorder
from dsv4_ascend.parity.replay import absent, replay
from dsv4_ascend.parity.report import OperatorReport, Selection, measure, totals
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
    record: Annotated[
        Path | None,
        typer.Option(
            "--record",
            metavar="BUNDLE",
            help="Also write inputs and outputs of all cases, as safetensors.",
        ),
    ] = None,
    replayed: Annotated[
        Path | None,
        typer.Option(
            "--replay", metavar="BUNDLE", help="Run nothing: judge what --record wrote elsewhere."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run every parity case on every implementation of a device,
    and compare with the oracle's values.

    Limit use is error / limit: 0 is exact, above 1 fails. Exit code 1 if a case fails, a fault
    survives, or a case of a bundle cannot be judged.
    """
    _check_together(record, replayed, device, faults or mutants)
    selection = Selection(
        pattern, _checked_profile(profile), _checked_device(device), faults, mutants
    )
    if replayed is not None:
        _replay(replayed, selection, json)
        return
    recorded = 0
    with recording(record) if record else nullcontext() as recorder:
        reports, interrupted = _collected(_with_progress(selection, recorder))
        _check_found(reports, interrupted, pattern)
        if recorder is not None:
            recorded = recorder.finish(selection, reports, not interrupted)
    if json:
        print_json(_as_json(selection.device, reports, not interrupted))
    else:
        show(reports)
        if record is not None:
            show_written(record, recorded)
    _leave(reports, interrupted)


def _replay(path: Path, selection: Selection, json: bool) -> None:
    bundle = Bundle(path)
    reports, interrupted = _collected(replay(bundle, selection))
    _check_found(reports, interrupted, selection.pattern)
    lacks = absent(bundle, selection)
    if json:
        found = _as_json(bundle.manifest.machine.device, reports, not interrupted)
        print_json(found | origin_data(bundle, lacks))
    else:
        show_origin(bundle)
        show(reports, str(path))
        show_absent(lacks)
    _leave(reports, interrupted)


def _collected(found: Iterable[OperatorReport]) -> tuple[list[OperatorReport], bool]:
    """Reports, up to an interrupt; whether there was one."""
    reports: list[OperatorReport] = []
    try:
        for report in found:
            reports.append(report)
    except KeyboardInterrupt:
        return reports, True
    return reports, False


def _check_found(reports: Sequence[OperatorReport], interrupted: bool, pattern: str) -> None:
    if not reports and not interrupted:
        raise typer.BadParameter(f"{pattern!r} names no case or fault", param_hint="-k")


def _leave(reports: Sequence[OperatorReport], interrupted: bool) -> None:
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    if any(r.failures or r.survivors or r.unjudged for r in reports):
        raise typer.Exit(FINDINGS)


def _check_together(
    record: Path | None, replayed: Path | None, device: str, with_mutants: bool
) -> None:
    """Options that make no sense beside each other."""
    if with_mutants and (record or replayed):
        option = "--record" if record else "--replay"
        raise typer.BadParameter(
            "faults and mutants change references, on the CPU: a run of its own shows them",
            param_hint=f"{option} with --faults or --mutants",
        )
    if replayed and record:
        raise typer.BadParameter("a run is recorded or judged", param_hint="--record and --replay")
    if replayed and device != "cpu":
        raise typer.BadParameter(
            "a bundle is judged on the CPU, wherever it was recorded",
            param_hint="--replay with --device",
        )


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


def _with_progress(selection: Selection, recorder: Recorder | None) -> Iterator[OperatorReport]:
    """Measure, with a progress bar where somebody watches."""
    run = measure if recorder is None else partial(measure, observe=recorder)
    operators = selection.operators()
    bar = Progress(console=console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    with bar:
        task = bar.add_task("parity", total=len(operators))
        for operator in operators:
            bar.update(task, description=operator.name)
            report = run(operator, selection)
            bar.advance(task)
            if report.cases or report.left_out or report.faults or report.mutants:
                yield report


def _as_json(device: str, reports: Sequence[OperatorReport], complete: bool) -> dict[str, object]:
    return {
        "torch": torch.__version__,
        "device": device,
        "complete": complete,
        "operators": [r.to_json() for r in reports],
        "totals": totals(reports),
    }
