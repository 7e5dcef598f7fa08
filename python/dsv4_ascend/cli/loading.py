"""Options and loading that commands with a checkpoint share."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from dsv4_ascend.checkpoint.foreign import foreign_format
from dsv4_ascend.cli.progress import bytes_bar
from dsv4_ascend.model.model import Model, load, usable_device
from dsv4_ascend.model.parallel import ALONE, Parallel
from dsv4_ascend.model.profile import PROFILES, profile_named
from dsv4_ascend.tiny.release import SHIPPED
from dsv4_backend.errors import ArgumentError

AllowUnknown = Annotated[
    list[str] | None,
    typer.Option(
        help="A field of config.json to ignore though it is unknown; repeatable.", metavar="FIELD"
    ),
]

CheckpointFolder = Annotated[
    Path | None, typer.Option(help="Folder; the shipped small model if absent.")
]

ProfileName = Annotated[
    str | None,
    typer.Option(
        "--profile",
        help=f"What is rounded: {', '.join(PROFILES)}.",
        show_default="official, or what the folder was converted to",
    ),
]


def load_model(
    checkpoint: Path | None,
    device: str,
    profile: str | None,
    allow_unknown: list[str] | None = None,
    parallel: Parallel = ALONE,
) -> Model:
    """The checkpoint (the shipped small one if None) on `device`,
    with a progress bar on a terminal.

    What was ignored or set aside in it is told on standard error.
    """
    if profile is not None:
        profile_named(profile, "--profile")
    where = usable_device(device, "--device")
    folder = chosen_folder("--checkpoint", checkpoint)
    with bytes_bar("loading") as report:
        model = load(
            folder,
            device=where,
            profile=profile,
            progress=report,
            allow_unknown=allow_unknown or (),
            parallel=parallel,
        )
    for note in model.notes:
        print(f"dsv4-ascend: note: {note}", file=sys.stderr)
    return model


def chosen_folder(argument: str, folder: Path | None) -> Path:
    """A folder that is there; the shipped small model if none is named, or `tiny` is and is none.

    ArgumentError that says what is in its place otherwise.
    """
    if folder is None or (str(folder) == "tiny" and not folder.exists()):
        return SHIPPED
    if not os.path.isdir(folder):
        raise ArgumentError(f"{argument}: {_no_folder(folder)}")
    return folder


def _no_folder(path: Path) -> str:
    """What is in the place of a checkpoint folder, and what to give instead."""
    if not os.path.exists(path):
        return f"no folder {path}"
    advice = "give the folder that holds it, config.json and model.safetensors"
    return f"{path}: {foreign_format(path) or f'found a file, expected a folder: {advice}'}"
