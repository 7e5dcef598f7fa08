"""JSON from untrusted files: one meaning or an error.
No duplicate keys, no NaN, no deep nesting, bounded size.
"""

from __future__ import annotations

import codecs
import json
import os
import stat
from pathlib import Path


class FileProblem(ValueError):
    """Why a text is refused; the caller adds the file name."""


_LFS = "a Git LFS pointer instead of the file: fetch the data with `git lfs pull`"
_DOWNLOADS = {
    b"version https://git-lfs": _LFS,
    b"version https://hawser": _LFS,
    b"version http://git-media": _LFS,
    b"<!doctype html": "an HTML page instead of the file: the download was refused or redirected; "
    "fetch it again",
    b"<html": "an HTML page instead of the file: the download was refused or redirected; fetch it "
    "again",
    b"<?xml": "an XML answer instead of the file: the download was refused; fetch it again",
    b"GGUF": "a GGUF file: not read here, expected the official safetensors",
}
"""How files begin that are not what their names say -> what they are."""
_PACKED = {
    b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "Zstandard", b"\xfd7zXZ\x00": "xz", b"BZh": "bzip2",
    b"PK\x03\x04": "zip",
}  # fmt: skip
"""How compressed files begin."""
_JSON = ("{", "[")
_SHOWN, _WORD = 32, 4
"""How much of a text is shown, in bytes, and below how many characters nothing is taken for one."""


def not_the_file(start: bytes) -> str | None:
    """What a file is that begins so, if it is known for standing in another's place;
    None for anything else.
    """
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((told for sign, told in _DOWNLOADS.items() if text.startswith(sign.lower())), None)


def what_it_looks_like(start: bytes) -> str | None:
    """What a file is that begins so and cannot be what its name says; None if nothing tells."""
    packed = next((name for sign, name in _PACKED.items() if start.startswith(sign)), None)
    if packed:
        return f"a file compressed by {packed} instead of the file: unpack it"
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(start[:_SHOWN]).strip()
    except UnicodeDecodeError:
        return None
    if len(text) < _WORD or not all(char.isprintable() or char in "\t\r\n" for char in text):
        return None
    kind = "JSON" if text.startswith(_JSON) else "text"
    return (
        f"{kind} that begins with {text!r} instead of the file: the download failed; fetch it again"
    )


def parse(raw: bytes) -> object:
    """The value of a UTF-8 JSON text; FileProblem when it is malformed or ambiguous."""
    try:
        return json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except UnicodeDecodeError as error:
        raise FileProblem(
            f"found bytes that are not UTF-8 at {error.start}, expected JSON"
        ) from None
    except RecursionError:
        raise FileProblem("found too deeply nested JSON, expected a few levels") from None
    except FileProblem:
        raise
    except ValueError as error:
        raise FileProblem(f"found malformed JSON ({error}), expected one JSON value") from None


def read_object(path: Path, limit: int) -> dict[str, object]:
    """The JSON object in a regular file of at most `limit` bytes; FileProblem otherwise."""
    value = parse(read_text(path, limit))
    if not isinstance(value, dict):
        raise FileProblem(f"found a JSON {type(value).__name__}, expected an object")
    return value


def read_text(path: Path, limit: int) -> bytes:
    """The bytes of a JSON file, as `read_regular`;
    FileProblem too if it is empty or begins like no JSON object.
    """
    raw = read_regular(path, limit)
    other = not_the_file(raw[:100]) if raw.strip() else "an empty file; fetch it again"
    if not other and not raw.lstrip().startswith(tuple(map(str.encode, _JSON))):
        other = what_it_looks_like(raw)
    if other:
        raise FileProblem(f"found {other}")
    return raw


def open_regular(path: Path) -> tuple[int, int]:
    """(read-only file descriptor, size) of a regular file;
    FileProblem for anything else. Never blocks on a pipe.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise FileProblem(f"cannot be opened ({error})") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise FileProblem("found something that is no regular file")
    return descriptor, status.st_size


def read_regular(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes; FileProblem otherwise."""
    descriptor, size = open_regular(path)
    with os.fdopen(descriptor, "rb") as file:
        if size > limit:
            raise FileProblem(f"found {size} bytes, expected at most {limit}")
        return file.read(limit)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = sorted({key for key, _ in pairs if key in seen or seen.add(key)})  # type: ignore[func-returns-value]
        raise FileProblem(f"found duplicate keys {twice[:5]}, expected every key once")
    return result


def _no_constant(text: str) -> object:
    raise FileProblem(f"found {text}, expected a finite number")
