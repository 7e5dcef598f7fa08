"""`dsv4-ascend bench`: measure this machine; ratios within one run are what counts."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import torch
import typer
from rich.table import Table

from dsv4_ascend.bench.host import BASELINE, Call, host
from dsv4_ascend.bench.launches import launches, queue_mode
from dsv4_ascend.cli import console, print_json
from dsv4_backend import _C

SUITES = ("host",)
DEVICES = ("cpu", "npu")


def bench(
    suite: Annotated[str, typer.Option(help=f"One of {', '.join(SUITES)}.")] = "host",
    pattern: Annotated[str, typer.Option("-k", help="Part of an operator's name.")] = "",
    rounds: Annotated[int, typer.Option(help="Samples of every call, interleaved.", min=2)] = 15,
    device: Annotated[
        str, typer.Option(help="cpu, or npu: launches beside torch_npu's own.")
    ] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time operators on this machine: medians with quartiles,
    and the ratio to torch's own in the same run.

    host: what a call costs on the smallest arguments, checks and dispatch and all.
    """
    _check_choice(suite, SUITES, "--suite")
    _check_choice(device, DEVICES, "--device")
    if device == "npu":
        _bench_launches(pattern, rounds, json)
        return
    threads = torch.get_num_threads()
    rows = host(pattern, rounds)
    if len(rows) == 1:
        raise typer.BadParameter(f"{pattern!r} is part of no operator's name", param_hint="-k")
    machine = {"machine": platform.machine(), "isa": _C.isa(), "threads": threads}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if json:
        calls = [asdict(row) for row in rows]
        print_json({"suite": suite, "rounds": rounds, **machine, **versions, "calls": calls})
        return
    console().print(_table(rows))
    facts = ", ".join(f"{name} {value}" for name, value in (machine | versions).items())
    console().print(f"{facts}; {rounds} interleaved samples; times {BASELINE}: in the same run")


def _check_choice(found: str, choices: Sequence[str], option: str) -> None:
    if found not in choices:
        raise typer.BadParameter(f"{found!r} is not one of {', '.join(choices)}", param_hint=option)


def _bench_launches(pattern: str, rounds: int, json: bool) -> None:
    rows = launches(pattern, rounds)
    if not rows:
        timed = ", ".join(launch.operator for launch in launches("", 2))
        raise typer.BadParameter(
            f"{pattern!r} is part of no name of what is timed on npu: {timed}", param_hint="-k"
        )
    mode = {"TASK_QUEUE_ENABLE": queue_mode()}
    if json:
        print_json({"suite": "host", "rounds": rounds, **mode, "calls": [asdict(r) for r in rows]})
        return
    table = Table("operator", "function", "arguments", "us", "torch_npu us", "times torch_npu")
    for column in range(2, 6):
        table.columns[column].justify = "right"
    for row in rows:
        times = f"{1e6 * row.ours.median:.1f}", f"{1e6 * row.theirs.median:.1f}"
        table.add_row(row.operator, row.function, str(row.arguments), *times, f"{row.ratio:.2f}")
    console().print(table)
    console().print(
        f"what the caller waits for; TASK_QUEUE_ENABLE {queue_mode()}; {rounds} interleaved samples"
    )


def _table(rows: list[Call]) -> Table:
    table = Table("call", "arguments", "ran", "us", "quartiles", f"times {BASELINE}")
    for column in (1, 3, 4, 5):
        table.columns[column].justify = "right"
    for row in rows:
        table.add_row(*_cells(row))
    return table


def _cells(row: Call) -> list[str]:
    median, low, high = (1e6 * s for s in (row.timing.median, row.timing.low, row.timing.high))
    return [
        row.name,
        str(row.arguments),
        row.ran,
        f"{median:.2f}",
        f"{low:.2f} to {high:.2f}",
        f"{row.ratio:.1f}",
    ]
