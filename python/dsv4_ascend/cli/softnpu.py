"""`dsv4-ascend softnpu -- COMMAND`: run a command on the software Ascend device."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import torch
import typer

from dsv4_backend.errors import ArgumentError, EnvironmentFault
from dsv4_backend.softnpu.settings import beside, environment, settings, torch_npu_path
from dsv4_backend.support import install_torch_npu


def softnpu(
    command: Annotated[list[str], typer.Argument(help="What to run, after `--`.", metavar="-- COMMAND")],
    soc: Annotated[str | None, typer.Option(help="Ascend910B3 (default), Ascend910_9391, Ascend950PR_9599 ...")] = None,
    devices: Annotated[int | None, typer.Option(help="How many NPUs the process sees (8).", min=1, max=32)] = None,
    memory: Annotated[str | None, typer.Option(help="Of each device: 64M, 2G.")] = None,
    cann: Annotated[str | None, typer.Option(help="The CANN version that torch_npu is told: 8.5.0, 9.1.0.")] = None,
    workspace: Annotated[str | None, typer.Option(help="Of every operator, checked and overwritten: 4K.")] = None,
    chaos: Annotated[int | None, typer.Option(help="Seed: one stream at a time is delayed.")] = None,
    trace: Annotated[str | None, typer.Option(help="Chrome trace of all launches; %p = process id.")] = None,
    fail: Annotated[str | None, typer.Option(help="CALL:N:CODE,...: the n-th use of CALL answers CODE.")] = None,
) -> None:
    """Run COMMAND with torch_npu on the software device. It proves launchers and order, not NPU arithmetic or speed.

    `python`, `torchrun`, `pytest` are this environment's, active or not. What is not given here is as SOFTNPU_* say.
    """
    try:
        variables = settings(
            soc=soc,
            cann=cann,
            devices=devices,
            memory=memory,
            workspace=workspace,
            chaos=chaos,
            trace=trace,
            fail=fail,
        )
    except ArgumentError as error:
        raise typer.BadParameter(str(error)) from None
    if torch_npu_path() is None:
        print(_absent(), file=sys.stderr)
    full = environment(variables)
    full["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), full.get("PATH", os.defpath)])
    try:
        os.execvpe(command[0], command, full)
    except FileNotFoundError:
        raise EnvironmentFault(f"command not found: {command[0]}") from None
    except OSError as error:  # a folder, a file that may not be executed or is of no known format
        raise EnvironmentFault(f"cannot execute {command[0]}: {error.strerror}") from None


def _absent() -> str:
    """Said before a COMMAND that finds torch_npu only if it runs in an environment of its own."""
    advice = install_torch_npu(torch.__version__, f"--no-deps --target {beside()}")
    return f"dsv4-ascend softnpu: torch_npu is not installed here; without it COMMAND sees no NPU: {advice}"
