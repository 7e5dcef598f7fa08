"""`softnpu -- COMMAND`: run a command on the software Ascend device."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Annotated, NoReturn

import typer

from softnpu.errors import ArgumentError, EnvironmentFault, SoftnpuError
from softnpu.settings import beside, environment, settings, torch_npu_path

ENVIRONMENT = 3
"""Exit code when something is missing here; usage errors leave with 2, COMMAND with its own."""


def main() -> None:
    """Run the command line of this process and leave it with its exit code."""
    try:
        call(sys.argv[1:])
    except SoftnpuError as error:
        print(f"softnpu: {error}", file=sys.stderr)
        sys.exit(ENVIRONMENT)


def call(arguments: Sequence[str], name: str = "softnpu") -> NoReturn:
    """Run COMMAND in the place of this process; `name` is the command in usage lines.

    Leaves with exit code 2 on a usage error. Raises EnvironmentFault when COMMAND cannot run.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(_run)
    sys.exit(app(args=list(arguments), prog_name=name))


def _run(
    context: typer.Context,
    command: Annotated[
        list[str], typer.Argument(help="What to run, after `--`.", metavar="-- COMMAND")
    ],
    soc: Annotated[
        str | None, typer.Option(help="Ascend910B3 (default), Ascend910_9391, Ascend950PR_9599 ...")
    ] = None,
    devices: Annotated[
        int | None, typer.Option(help="How many NPUs the process sees (8).", min=1, max=32)
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Of each device: 64M, 2G.")] = None,
    cann: Annotated[
        str | None, typer.Option(help="The CANN version that torch_npu is told: 9.1.0, 8.5.0.")
    ] = None,
    workspace: Annotated[
        str | None, typer.Option(help="Of every operator, checked and overwritten: 4K.")
    ] = None,
    chaos: Annotated[
        int | None, typer.Option(help="Seed: one stream at a time is delayed.")
    ] = None,
    trace: Annotated[
        str | None, typer.Option(help="Chrome trace of all launches; %p = process id.")
    ] = None,
    fail: Annotated[
        str | None, typer.Option(help="CALL:N:CODE,...: the n-th use of CALL answers CODE.")
    ] = None,
    vendor: Annotated[
        list[str] | None,
        typer.Option(
            help="Operators before CANN's own: vllm-ascend, or a folder that holds "
            "op_api/lib/libcust_opapi.so; repeatable.",
            metavar="NAME",
        ),
    ] = None,
) -> None:
    """Run COMMAND with torch_npu on the software device. It proves launchers and order, not NPU
    arithmetic or speed.

    `python`, `torchrun`, `pytest` are this environment's, active or not. What is not given here is
    as SOFTNPU_* say.
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
            vendor=vendor,
        )
    except ArgumentError as error:
        raise typer.BadParameter(str(error)) from None
    if torch_npu_path() is None:
        print(f"{context.info_name}: {_without_torch_npu()}", file=sys.stderr)
    _execute(command, environment(variables))


def _execute(command: list[str], variables: dict[str, str]) -> None:
    """Replace this process; this environment's programs come before those of PATH."""
    variables["PATH"] = os.pathsep.join(
        [os.path.dirname(sys.executable), variables.get("PATH", os.defpath)]
    )
    try:
        os.execvpe(command[0], command, variables)
    except FileNotFoundError:
        raise EnvironmentFault(f"command not found: {command[0]}") from None
    except OSError as error:  # a folder, a file that may not be executed or is of no known format
        raise EnvironmentFault(f"cannot execute {command[0]}: {error.strerror}") from None


def _without_torch_npu() -> str:
    """Said before a COMMAND that finds torch_npu only if it runs in an environment of its own."""
    release = ".".join(re.findall(r"\d+", metadata.version("torch"))[:3])
    advice = f"pip install --no-deps --target {beside()} torch-npu=={release}"
    return f"torch_npu is not installed here; without it COMMAND sees no NPU: {advice}"
