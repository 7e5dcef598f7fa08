"""`dsv4-ascend inspect` and `verify`: what a folder holds, and whether it looks right."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from dsv4_ascend.cli import FINDINGS, console, print_json
from dsv4_ascend.cli.loading import AllowUnknown, chosen_folder
from dsv4_ascend.cli.progress import bytes_bar
from dsv4_ascend.convert.comparison import compare
from dsv4_ascend.convert.inspection import Inspection
from dsv4_ascend.convert.inspection import inspect as look
from dsv4_ascend.convert.verification import verify as read

_Folder = Annotated[
    Path | None, typer.Argument(help="The shipped small model if absent or `tiny`.")
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def inspect(
    folder: _Folder = None, allow_unknown: AllowUnknown = None, json: _Json = False
) -> None:
    """Tell what a checkpoint folder holds, from its headers alone.

    The exit code is 1 when something is missing, surplus or of another form.
    """
    found = look(chosen_folder("FOLDER", folder), allow_unknown or ())
    if json:
        print_json(_as_json(found))
    else:
        _show(found)
    if found.problems:
        raise typer.Exit(FINDINGS)


def verify(
    folder: _Folder = None,
    against: Annotated[
        Path | None, typer.Option(help="Folder whose weights these should be; tells what differs.")
    ] = None,
    allow_unknown: AllowUnknown = None,
    json: _Json = False,
) -> None:
    """Read every value of a checkpoint folder and name what looks wrong.

    The exit code is 1 when anything does, or when values differ from those of --against.
    """
    path = chosen_folder("FOLDER", folder)
    if against is not None:
        against = chosen_folder("--against", against)
    with bytes_bar("reading") as report:
        found = read(path, allow_unknown or (), report)
    compared = None if against is None or found else compare(against, path)
    if json:
        told = {"folder": str(path), "findings": found}
        print_json(told | ({"against": compared.as_json()} if compared else {}))
    else:
        for line in [*found, *(compared.lines() if compared else ())]:
            print(line)
        print(f"{path}: {len(found)} finding(s)" if found else f"{path}: nothing looks wrong")
    if found or (compared and compared.other_values):
        raise typer.Exit(FINDINGS)


def _as_json(found: Inspection) -> dict[str, object]:
    return {
        "folder": str(found.folder),
        "release": found.release,
        "format": found.format,
        "naming": found.naming,
        "files": found.files,
        "parameters": found.parameters,
        "bytes": found.nbytes,
        "classes": {
            name: {
                "tensors": size.tensors,
                "parameters": size.parameters,
                "bytes": size.nbytes,
                "formats": dict(size.formats),
            }
            for name, size in found.classes.items()
        },
        "notes": list(found.notes),
        "problems": list(found.problems),
    }


def _show(found: Inspection) -> None:
    print(f"{found.folder}\n  release  {found.release}\n  format   {found.format}")
    print(f"  names    {found.naming}, {found.files} file(s)")
    table = Table("class", "tensors", "parameters", "GB", "stored as")
    for name, size in found.classes.items():
        forms = ", ".join(f"{form} {count}" for form, count in sorted(size.formats.items()))
        numbers = f"{size.tensors:,}", f"{size.parameters:,}", f"{size.nbytes / 1e9:.4f}"
        table.add_row(name, *numbers, forms)
    table.add_row("all", "", f"{found.parameters:,}", f"{found.nbytes / 1e9:.4f}", "")
    console().print(table)
    for kind, lines in (("note", found.notes), ("problem", found.problems)):
        for line in lines:
            print(f"{kind}: {line}")
