"""The command group: typer's part of the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Annotated, Any

import typer

Command = Callable[..., Any] | typer.Typer


def call(
    commands: Mapping[str, tuple[str, str]], loaded: Mapping[str, Command], args: Sequence[str]
) -> int:
    """Run a command line over the loaded commands and a line of help for the others."""
    app = typer.Typer(
        name="dsv4-ascend",
        help="DeepSeek V4 on Huawei Ascend, provable on any laptop.",
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    app.callback()(_options)
    for name, (_, line) in commands.items():
        command = loaded.get(name, _unloaded)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name, short_help=line)
        else:
            app.command(name, short_help=line)(command)
    app(args=list(args), prog_name="dsv4-ascend")
    return 0


def _unloaded() -> None:
    """Stand in the list of commands for one that this run does not need."""


def _show_version(wanted: bool) -> None:
    if wanted:
        print(metadata.version("dsv4-ascend"))
        raise typer.Exit


_Version = Annotated[
    bool,
    typer.Option(
        "--version", help="Show the version and leave.", callback=_show_version, is_eager=True
    ),
]


def _options(version: _Version = False) -> None:
    pass
