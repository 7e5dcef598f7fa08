"""Bundles on the command line: where one was recorded, what it lacks, what was written."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from rich.markup import escape

from dsv4_ascend.checkpoint.safetensors_stream import SafetensorsStream
from dsv4_ascend.cli import console
from dsv4_ascend.cli.outputs import check_output
from dsv4_ascend.parity.bundle import Bundle, Machine
from dsv4_ascend.parity.record import Recorder
from dsv4_backend.errors import EnvironmentFault

_SHOWN = 10


@contextmanager
def recording(path: Path) -> Iterator[Recorder]:
    """A recorder whose bundle gets its name when it is finished."""
    check_output(path, "--record")
    try:
        with SafetensorsStream(path) as stream:
            yield Recorder(stream)
    except OSError as error:
        raise EnvironmentFault(f"--record: {path} cannot be written: {error}") from error


def show_written(path: Path, cases: int) -> None:
    """Say what a recording wrote, and what to do with it."""
    text = f"recorded: {cases} cases, {path.stat().st_size / 1e6:.1f} MB in {path}"
    command = f"dsv4-ascend parity --replay {shlex.quote(str(path))}"
    console().print(escape(f"{text}; judge it on any machine: {command}"), soft_wrap=True)


def show_origin(bundle: Bundle) -> None:
    """Say where and when a bundle was recorded, and what of."""
    manifest = bundle.manifest
    out = console()
    out.print(escape(_origin(manifest.machine)), soft_wrap=True)
    ours = metadata.version("dsv4-ascend")
    if manifest.machine.dsv4_ascend != ours:
        out.print(f"judged by the contracts of dsv4-ascend {ours}", soft_wrap=True)
    if not manifest.complete:
        out.print("[yellow]the recording was interrupted[/]: later cases are not in it")


def _origin(machine: Machine) -> str:
    """One line."""
    where = machine.device
    if machine.chip is not None:
        kind = " (softnpu, no hardware)" if machine.software else ""
        where += f", {machine.chip}{kind} with CANN {machine.cann}"
    versions = f"dsv4-ascend {machine.dsv4_ascend}, torch {machine.torch}"
    if machine.torch_npu is not None:
        versions += f", torch_npu {machine.torch_npu}"
    host = f"{machine.machine}, {machine.isa}"
    return f"recorded {machine.date} on {where}; {versions}; host {host}"


def show_absent(names: list[str]) -> None:
    """Name cases of this version that a bundle lacks."""
    if names:
        first = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        text = f"{len(names)} case(s) of this version are not in the bundle: {first}"
        console().print(escape(text), soft_wrap=True)


def origin_data(bundle: Bundle, names: list[str]) -> dict[str, object]:
    """For JSON: where a bundle was recorded, what of, and the cases of this version
    that it lacks.
    """
    manifest = bundle.manifest
    return {
        "recorded": asdict(manifest.machine),
        "recording": {
            "pattern": manifest.pattern,
            "profile": manifest.profile,
            "complete": manifest.complete,
        },
        "absent": names,
    }
