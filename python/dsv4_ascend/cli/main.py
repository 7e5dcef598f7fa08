"""The `dsv4-ascend` command. Only the chosen command is imported, so that the others cost it no time.

Exit codes: 0 good, 1 findings, 2 usage, 3 environment, 130 interrupted.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Annotated, Any

import typer

from dsv4_ascend.cli import ENVIRONMENT, FINDINGS, INTERRUPTED

COMMANDS = {
    "generate": ("dsv4_ascend.cli.generate:generate", "Continue a prompt, with the shipped small model by default."),
    "logits": ("dsv4_ascend.cli.logits:logits", "Logits of a list of token ids, written as safetensors."),
    "ops": ("dsv4_ascend.cli.ops:app", "The operators and what runs them, and why; a new one."),
    "parity": ("dsv4_ascend.cli.parity:parity", "Compare every operator with its reference; hunt its named faults."),
    "doctor": ("dsv4_ascend.cli.doctor:doctor", "Versions, devices, torch_npu and CANN: what is missing, what to do."),
    "softnpu": ("dsv4_ascend.cli.softnpu:softnpu", "Run a command on the software Ascend device, with no NPU or CANN."),
    "train-tiny": ("dsv4_ascend.cli.train_tiny:train_tiny", "Train and quantise the small model that is shipped."),
}
"""Name -> (module:object, one line of help). The object is a command's function or a typer app."""

Command = Callable[..., Any] | typer.Typer


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command line and leave the process with its exit code."""
    try:
        sys.exit(_run(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _run(arguments: Sequence[str]) -> int:
    name = next((a for a in arguments if not a.startswith("-")), "")
    if name not in COMMANDS:
        return _call(_app({}), arguments)
    target, _ = COMMANDS[name]
    try:
        function = _load(target)
    except (ImportError, OSError) as error:
        advice = "reinstall it for this Python: pip install --force-reinstall dsv4-ascend"
        return _complain(f"{name} does not load: {error}; {advice}", ENVIRONMENT)
    from dsv4_backend.errors import Dsv4Error, EnvironmentFault

    try:
        return _call(_app({name: function}), arguments)
    except EnvironmentFault as error:
        return _complain(f"{error}. `dsv4-ascend doctor` looks at the whole environment", ENVIRONMENT)
    except Dsv4Error as error:
        return _complain(str(error), FINDINGS)


def _load(target: str) -> Command:
    importlib.import_module("dsv4_backend")  # before any module that imports torch: see dsv4_backend._torch
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def _app(loaded: dict[str, Command]) -> typer.Typer:
    """The command group, with the loaded commands and a line of help for the others."""
    app = typer.Typer(
        name="dsv4-ascend",
        help="DeepSeek V4 on Huawei Ascend, provable on any laptop.",
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    app.callback()(_options)
    for name, (_, line) in COMMANDS.items():
        command = loaded.get(name, _unloaded)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name, short_help=line)
        else:
            app.command(name, short_help=line)(command)
    return app


def _unloaded() -> None:
    """Stand in the list of commands for one that this run does not need."""


def _show_version(wanted: bool) -> None:
    if wanted:
        print(metadata.version("dsv4-ascend"))
        raise typer.Exit


_Version = Annotated[
    bool, typer.Option("--version", help="Show the version and leave.", callback=_show_version, is_eager=True)
]


def _options(version: _Version = False) -> None:
    pass


def _call(app: typer.Typer, arguments: Sequence[str]) -> int:
    app(args=list(arguments), prog_name="dsv4-ascend")
    return 0


def _complain(message: str, code: int) -> int:
    print(f"dsv4-ascend: {message}", file=sys.stderr)
    return code
