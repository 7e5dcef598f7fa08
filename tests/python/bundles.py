"""Bundles that tests record, and edits of them: the manifest, the header, the bytes of a tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dsv4_ascend.cli import main as command
from dsv4_ascend.parity.bundle import KEY


def run(capsys: Any, *arguments: object) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a command line in this process."""
    capsys.readouterr()
    code: Any = None
    try:
        command.main([str(argument) for argument in arguments])
    except SystemExit as left:
        code = left.code
    out, err = capsys.readouterr()
    return code, out, err


def loaded(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and manifest, by the safetensors library."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()[KEY])


@contextmanager
def edited(source: Path, target: Path) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """Tensors and manifest of a bundle; what is made of them becomes `target`."""
    tensors, manifest = loaded(source)
    yield tensors, manifest
    save_file(tensors, target, {KEY: json.dumps(manifest)})


def with_text(source: Path, target: Path, text: str | None) -> None:
    """A bundle with another text in the place of its manifest; None for no metadata."""
    tensors, _ = loaded(source)
    save_file(tensors, target, None if text is None else {KEY: text})


def with_bytes(source: Path, target: Path, edit: Callable[[bytes], bytes]) -> None:
    """A bundle with other bytes."""
    target.write_bytes(edit(source.read_bytes()))


def replay(capsys: Any, path: Path, *options: str) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """(exit code, rows by operator, whole report) of a replay as JSON."""
    code, out, err = run(capsys, "parity", "--replay", path, "--json", *options)
    assert err == ""
    report = json.loads(out)
    return code, {row["operator"]: row for row in report["operators"]}, report


def first(manifest: dict[str, Any]) -> dict[str, Any]:
    """The first case."""
    return manifest["cases"][0]
