"""A bundle: the cases of a parity run with their inputs and outputs, as one safetensors file.

Tensors carry every value; `__metadata__` holds one JSON text that says what they are: the machine,
the selection, and for each case its arguments and, for each implementation, its outputs, the
written arguments afterwards, or the error. Nothing in a bundle is trusted.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from dsv4_ascend.checkpoint.safetensors_file import SafetensorsFile
from dsv4_ascend.checkpoint.strict_json import FileProblem, parse
from dsv4_ascend.parity.runner import LeftOut
from dsv4_backend.errors import ArgumentError, CheckpointError

KEY = "dsv4_ascend_parity"
"""Of the metadata."""
FORMAT = 1
_Read = TypeVar("_Read")


@dataclass(frozen=True)
class Machine:
    """Where and when a bundle was recorded; None for what is not there.

    date: UTC, ISO 8601. device: "cpu" or "npu". software: the NPU was softnpu's. isa: of our CPU
    kernels.
    """

    date: str
    dsv4_ascend: str
    device: str
    torch: str
    torch_npu: str | None
    cann: str | None
    chip: str | None
    software: bool
    machine: str
    isa: str


@dataclass(frozen=True)
class TensorName:
    """An argument that is a tensor: its name in the file."""

    name: str


@dataclass(frozen=True)
class Run:
    """A case on one implementation: names of its outputs and of the written arguments afterwards,
    in the order of the schema, None for an absent one; or its error.
    """

    implementation: str
    seconds: float
    outputs: tuple[str | None, ...]
    error: str


@dataclass(frozen=True)
class RecordedCase:
    """One case: its arguments (tensors by name, numbers, None) and its runs."""

    operator: str
    profile: str
    case: str
    arguments: tuple[TensorName | int | float | bool | None, ...]
    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        """OPERATOR/PROFILE/CASE."""
        return f"{self.operator}/{self.profile}/{self.case}"


@dataclass(frozen=True)
class Manifest:
    """All of a bundle but its tensors.

    pattern, profile: what was asked for; complete: False where the recording was interrupted.
    """

    machine: Machine
    pattern: str
    profile: str | None
    complete: bool
    cases: tuple[RecordedCase, ...]
    left_out: tuple[LeftOut, ...]


def to_text(manifest: Manifest) -> str:
    """The JSON text of the metadata."""
    data = {
        "format": FORMAT,
        "machine": asdict(manifest.machine),
        "pattern": manifest.pattern,
        "profile": manifest.profile,
        "complete": manifest.complete,
        "cases": [_case_data(case) for case in manifest.cases],
        "left_out": [asdict(case) for case in manifest.left_out],
    }
    return json.dumps(data, separators=(",", ":"), allow_nan=False)


def _case_data(case: RecordedCase) -> dict[str, object]:
    return asdict(case) | {"arguments": [_argument_data(a) for a in case.arguments]}


def _argument_data(argument: object) -> dict[str, object] | None:
    """One key, the kind. A float is text: JSON knows no infinity."""
    if argument is None:
        return None
    if isinstance(argument, TensorName):
        return {"tensor": argument.name}
    if isinstance(argument, float):
        return {"float": repr(argument)}
    return {type(argument).__name__: argument}


class Bundle:
    """An opened bundle: its manifest, and its tensors as views of the mapped file.

    ArgumentError in one line for a file that is none: truncated, garbage, of another format.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = SafetensorsFile(path)
            text = self._file.metadata.get(KEY)
            if text is None:
                raise FileProblem(f"found no {KEY!r} in its metadata, expected a parity bundle")
            self.manifest = _manifest(parse(text.encode("utf-8", "surrogatepass")))
        except CheckpointError as error:
            raise _refused(path, error.problems[0]) from None
        except FileProblem as problem:
            raise _refused(path, f"{path.name}: {problem}") from None

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor by its name; FileProblem if it is missing."""
        if name not in self._file.tensors:
            raise FileProblem(f"tensor {name!r} is missing in the bundle")
        return self._file.tensor(name)


def _refused(path: Path, problem: str) -> ArgumentError:
    found = problem.removeprefix(f"{path.name}: ")
    return ArgumentError(
        f"--replay: {path} is no bundle that can be judged: {printable(found)}; "
        "`dsv4-ascend parity --record` writes them"
    )


def printable(text: str) -> str:
    """Foreign text in one line, without what a terminal would obey."""
    line = " ".join(text.splitlines())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def _manifest(data: object) -> Manifest:
    at = _Object(data, "the manifest")
    found = at.read("format", _whole)
    if found != FORMAT:
        raise FileProblem(
            f"found format {found}, expected {FORMAT}: judge it with the dsv4-ascend that wrote it"
        )
    return Manifest(
        machine=_machine(at.read("machine", _Object)),
        pattern=at.read("pattern", _text),
        profile=at.read("profile", _optional_text),
        complete=at.read("complete", _flag),
        cases=at.read("cases", _each(_case)),
        left_out=at.read("left_out", _each(_left_out)),
    )


def _machine(at: _Object) -> Machine:
    names = {
        "date": _text, "dsv4_ascend": _text, "device": _text, "torch": _text,
        "torch_npu": _optional_text, "cann": _optional_text, "chip": _optional_text,
        "software": _flag, "machine": _text, "isa": _text,
    }  # fmt: skip
    read: dict[str, Any] = {name: at.read(name, kind) for name, kind in names.items()}
    return Machine(**read)


def _left_out(data: object, where: str) -> LeftOut:
    at = _Object(data, where)
    return LeftOut(at.read("name", _text), at.read("reason", _text))


def _case(data: object, where: str) -> RecordedCase:
    at = _Object(data, where)
    return RecordedCase(
        operator=at.read("operator", _text),
        profile=at.read("profile", _text),
        case=at.read("case", _text),
        arguments=at.read("arguments", _each(_argument)),
        runs=at.read("runs", _each(_run)),
    )


def _run(data: object, where: str) -> Run:
    at = _Object(data, where)
    return Run(
        implementation=at.read("implementation", _text),
        seconds=at.read("seconds", _real),
        outputs=at.read("outputs", _each(_optional_text)),
        error=at.read("error", _text),
    )


def _argument(data: object, where: str) -> TensorName | int | float | bool | None:
    if data is None:
        return None
    if isinstance(data, dict) and len(data) == 1:
        ((kind, value),) = data.items()
        read = _ARGUMENTS.get(kind)
        if read is not None:
            return read(value, where)
    raise _unfit(data, where, "null or one of tensor, int, float, bool with its value")


def _from_repr(data: object, where: str) -> float:
    try:
        return float(_text(data, where))
    except ValueError:
        raise _unfit(data, where, "a number as text") from None


class _Object:
    """A JSON object, and where in the manifest it stands."""

    def __init__(self, data: object, where: str) -> None:
        if not isinstance(data, dict):
            raise _unfit(data, where, "an object")
        self._data, self._where = data, where

    def read(self, name: str, kind: Callable[[object, str], _Read]) -> _Read:
        """A member of a kind; FileProblem when it is missing or of another."""
        where = f"{self._where}: {name}"
        if name not in self._data:
            raise FileProblem(f"{where}: found nothing, expected it there")
        return kind(self._data[name], where)


def _each(kind: Callable[[object, str], _Read]) -> Callable[[object, str], tuple[_Read, ...]]:
    def read(data: object, where: str) -> tuple[_Read, ...]:
        if not isinstance(data, list):
            raise _unfit(data, where, "a list")
        return tuple(kind(item, f"{where}[{i}]") for i, item in enumerate(data))

    return read


def _text(data: object, where: str) -> str:
    if not isinstance(data, str):
        raise _unfit(data, where, "text")
    return printable(data)


def _optional_text(data: object, where: str) -> str | None:
    return None if data is None else _text(data, where)


def _flag(data: object, where: str) -> bool:
    if not isinstance(data, bool):
        raise _unfit(data, where, "true or false")
    return data


def _whole(data: object, where: str) -> int:
    if type(data) is not int:
        raise _unfit(data, where, "a whole number")
    return data


def _real(data: object, where: str) -> float:
    if not isinstance(data, float | int) or isinstance(data, bool) or not abs(data) < 1e9:
        raise _unfit(data, where, "a number below 1e9")
    return float(data)


_ARGUMENTS: dict[str, Callable[[object, str], TensorName | int | float | bool]] = {
    "tensor": lambda data, where: TensorName(_text(data, where)),
    "int": _whole,
    "float": _from_repr,
    "bool": _flag,
}
"""Kind of an argument -> its reader."""


def _unfit(found: object, where: str, expected: str) -> FileProblem:
    shown = ascii(found)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return FileProblem(f"{where}: found {shown}, expected {expected}")
