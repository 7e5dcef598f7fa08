"""What a command reads as its prompt: text, token ids or messages,
from an option, a file or standard input (`-`).
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from dsv4_ascend.chat.messages import Message
from dsv4_ascend.checkpoint.strict_json import FileProblem, parse
from dsv4_ascend.cli.voice import rank_prefix
from dsv4_backend.errors import ArgumentError, EnvironmentFault

STDIN = "-"
_INTEGERS = (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)
_PLAIN_IDS = re.compile(rb"\s*(-?\d{1,20}\s+)*-?\d{1,20}\s*")


def read_text(source: Path, option: str) -> str:
    """The UTF-8 text of a file or of standard input, to its last character.
    ArgumentError names the option.
    """
    raw = _read(source, option)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"{_name(source)} holds the byte {raw[error.start]:#04x} at {error.start}"
        raise ArgumentError(f"{option}: {where}, expected UTF-8 text") from None


def read_ids(source: Path, option: str = "--input-ids") -> list[int]:
    """Ids of one sequence: a JSON list, whole numbers between blanks,
    or the only tensor of a .safetensors file.

    ArgumentError says what the file holds instead.
    """
    if source.suffix == ".safetensors":
        return _from_safetensors(source, option)
    raw = _read(source, option)
    if _PLAIN_IDS.fullmatch(raw):
        return [int(number) for number in raw.split()]
    try:
        ids = parse(raw)
    except FileProblem as error:
        name = _name(source)
        raise ArgumentError(
            f"{option}: {name} is neither JSON nor named *.safetensors nor numbers: {error}"
        ) from error
    if not isinstance(ids, list):
        raise ArgumentError(
            f"{option}: {_name(source)} holds {type(ids).__name__}, expected a list of integers"
        )
    for position, token in enumerate(ids):
        if type(token) is not int:
            raise ArgumentError(
                f"{option}: {token!r:.40} at position {position}, expected an integer"
            )
    return ids


def read_messages(source: Path, option: str = "--messages") -> list[Message]:
    """A JSON list of messages, or an object with `messages` and,
    as in a request, `tools` and `response_format`.

    The latter two go to the first system message, which is made if there is none. ArgumentError for
    anything else.
    """
    try:
        found = parse(_read(source, option))
    except FileProblem as error:
        raise ArgumentError(f"{option}: {_name(source)}: {error}") from error
    request = found if isinstance(found, dict) else {"messages": found}
    messages = request.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ArgumentError(
            f"{option}: {_name(source)} holds {found!r:.40}, expected a JSON list of messages"
        )
    extras = {key: request[key] for key in ("tools", "response_format") if request.get(key)}
    if extras and not (messages and messages[0].get("role") == "system"):
        messages = [{"role": "system", "content": ""}, *messages]
    return [{**extras, **messages[0]}, *messages[1:]] if extras else messages


def check_ids(ids: list[int], vocab_size: int, option: str = "--input-ids") -> None:
    """ArgumentError for the first id that the model does not have."""
    for position, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise ArgumentError(
                f"{option}: {token} at position {position}, expected ids in [0, {vocab_size})"
            )


def _read(source: Path, option: str) -> bytes:
    if str(source) == STDIN:
        return _read_standard_input(option)
    if not os.path.exists(source):
        raise ArgumentError(f"{option}: no file {source}")
    try:
        return source.read_bytes()
    except OSError as error:
        raise ArgumentError(f"{option}: {source} cannot be read: {error.strerror}") from error


def _read_standard_input(option: str) -> bytes:
    if rank_prefix():
        raise ArgumentError(
            f"{option}: found standard input, expected a file, which all ranks read"
        )
    if sys.stdin is None:
        raise EnvironmentFault(
            f"{option}: standard input is closed; give a file, or send something into it"
        )
    try:
        return sys.stdin.buffer.read()
    except OSError as error:
        raise EnvironmentFault(
            f"{option}: standard input cannot be read: {error.strerror}"
        ) from error


def _name(source: Path) -> str:
    return "standard input" if str(source) == STDIN else str(source)


def _from_safetensors(path: Path, option: str) -> list[int]:
    if not os.path.isfile(path):
        raise ArgumentError(f"{option}: no file {path}")
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            if len(names) != 1:
                raise ArgumentError(f"{option}: {path} holds {len(names)} tensors, expected one")
            tensor = file.get_tensor(names[0])
    except SafetensorError as error:
        raise ArgumentError(f"{option}: {path} is not a safetensors file: {error}") from error
    if tensor.dim() != 1 or tensor.dtype not in _INTEGERS:
        raise ArgumentError(
            f"{option}: {names[0]!r} is {tensor.dtype} {tuple(tensor.shape)}, expected integers [T]"
        )
    return tensor.tolist()  # type: ignore[no-any-return]
