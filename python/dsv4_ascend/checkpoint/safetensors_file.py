"""Strict reader of one safetensors file: checked whole before it is mapped,
tensors are views of it.

Stricter than the safetensors library: duplicate keys, names with path parts, NUL or nothing
in them, and more than 400,000 tensors are refused. Nothing executes, nothing is written, no
byte is copied.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

from dsv4_ascend.checkpoint.problems import listed
from dsv4_ascend.checkpoint.strict_json import (
    FileProblem,
    not_the_file,
    open_regular,
    parse,
    what_it_looks_like,
)
from dsv4_backend.errors import CheckpointError

MAX_TENSORS = 400_000
MAX_HEADER = 32 * 2**20
MAX_RANK = 8
_MAX_COUNT = 2**63
NAME = re.compile(r"[A-Za-z0-9_\-]{1,64}(\.[A-Za-z0-9_\-]{1,64}){0,15}", re.ASCII)

DTYPES: dict[str, tuple[int, torch.dtype]] = {
    "BOOL": (8, torch.bool), "U8": (8, torch.uint8), "I8": (8, torch.int8), "F4": (4, torch.int8),
    "F8_E4M3": (8, torch.float8_e4m3fn), "F8_E5M2": (8, torch.float8_e5m2),
    "F8_E8M0": (8, torch.float8_e8m0fnu), "I16": (16, torch.int16), "F16": (16, torch.float16),
    "BF16": (16, torch.bfloat16), "U16": (16, torch.uint16), "U32": (32, torch.uint32),
    "U64": (64, torch.uint64), "I32": (32, torch.int32), "F32": (32, torch.float32),
    "I64": (64, torch.int64), "F64": (64, torch.float64),
}  # fmt: skip
"""safetensors dtype -> (bits, torch dtype of the view).
F4 comes out packed: int8 with half the last dimension.
"""


def stored_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes in a file of a tensor of a safetensors dtype."""
    return prod(shape) * DTYPES[dtype][0] // 8


class TensorInfo(NamedTuple):
    """Where one tensor lies: dtype as named in the file, shape, and byte range within the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def checkpoint_error(where: object, problems: Sequence[str]) -> CheckpointError:
    """One CheckpointError for all problems of one checkpoint;
    `.problems` has every line, the message 50.
    """
    error = CheckpointError(listed(where, problems))
    error.problems = tuple(problems)
    return error


Header = tuple[dict[str, TensorInfo], dict[str, str]]
"""Tensors by name, and the metadata."""


class SafetensorsFile:
    """One validated and mapped file. `tensors` maps name to TensorInfo, `metadata` is the header's;
    views keep the mapping alive.

    The mapping is private: writing into a view changes a copy of the page, never the file.
    Raises CheckpointError with every problem of the header.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            descriptor, size = open_regular(path)
        except FileProblem as problem:
            raise checkpoint_error(path, [f"{path.name}: {problem}"]) from None
        try:
            self.tensors, self.metadata = _read_header(path.name, descriptor, size)
            self._mapping = _map(descriptor, size)
            self._bytes = torch.frombuffer(self._mapping, dtype=torch.uint8)
        except FileProblem as problem:
            raise checkpoint_error(path, [f"{path.name}: {problem}"]) from None
        finally:
            os.close(descriptor)

    def tensor(self, name: str) -> torch.Tensor:
        """A view of one tensor;
        only a misaligned one (our writers and the library make none) is copied.
        """
        info = self.tensors[name]
        dtype = DTYPES[info.dtype][1]
        raw = self._bytes[info.begin : info.end]
        if info.begin % dtype.itemsize:
            raw = raw.clone()
        shape = (*info.shape[:-1], info.shape[-1] // 2) if info.dtype == "F4" else info.shape
        return raw.view(dtype).view(shape)

    def strided(
        self, begin: int, dtype: torch.dtype, shape: tuple[int, ...], count: int, distance: int
    ) -> torch.Tensor:
        """A view [count, *shape] of tensors of that form,
        the first at byte `begin`, `distance` bytes apart.
        """
        size = prod(shape) * dtype.itemsize
        raw = self._bytes[begin : begin + (count - 1) * distance + size].view(dtype)
        strides = torch.empty(shape, device="meta").stride()
        return raw.as_strided((count, *shape), (distance // dtype.itemsize, *strides))

    def release(self, name: str) -> None:
        """Let the kernel take back the pages of a tensor that has been copied;
        reading it again reads the file.
        """
        info = self.tensors[name]
        start = info.begin - info.begin % mmap.PAGESIZE
        if info.end > start:
            self._mapping.madvise(mmap.MADV_DONTNEED, start, info.end - start)


def _map(descriptor: int, size: int) -> mmap.mmap:
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        return mmap.mmap(descriptor, size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except (OSError, ValueError) as error:
        raise FileProblem(f"cannot be mapped ({error})") from None


def _read_header(file: str, descriptor: int, size: int) -> Header:
    start = os.pread(descriptor, 64, 0)
    other = not_the_file(start)
    if other or not start:
        raise FileProblem(
            f"{f'found {other}' if other else 'truncated: found an empty file; fetch it again'}"
        )
    beginning, start = start, start[:8]
    length = int.from_bytes(start, "little")
    # Only a length that cannot be one is taken for a pickle's first bytes: 0x80 is also a fine low
    # byte of a length.
    if 8 + length > size and (start[:4] == b"PK\x03\x04" or start[:1] == b"\x80"):
        raise FileProblem(
            "found a zip or pickle file, expected safetensors (pickles are never opened)"
        )
    if len(start) < 8 or 8 + length > size:
        looks = what_it_looks_like(beginning)
        if looks:
            raise FileProblem(f"found {looks}")
        raise FileProblem(
            f"truncated: found {size} bytes, expected at least "
            f"{8 + length if len(start) == 8 else 8}"
        )
    if not 2 <= length <= MAX_HEADER:
        raise FileProblem(f"found a header of {length} bytes, expected 2 to {MAX_HEADER}")
    raw = os.pread(descriptor, length, 8)
    # Counted before parsing: a hostile header must not become gigabytes of Python objects.
    if raw.count(b"{") > MAX_TENSORS + 2 or raw.count(b",") > 16 * raw.count(b"{") + 100_000:
        raise FileProblem(f"found more than {MAX_TENSORS} tensors or oversized values")
    header = parse(raw)
    if raw[:1] != b"{" or not isinstance(header, dict):
        raise FileProblem("found a header that does not start with '{', expected a JSON object")
    return _check_header(file, header, 8 + length, size)


def _check_header(file: str, header: dict[str, object], data: int, size: int) -> Header:
    problems: list[str] = []
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        problems.append(
            f"{file}: __metadata__: found something else, expected an object of strings"
        )
    tensors: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        info = _name_problem(name) or _entry(entry, data)
        if isinstance(info, str):
            problems.append(f"{file}: tensor {_shown(name)}: {info}")
        else:
            tensors[name] = info
    problems += _range_problems(file, tensors, data, size) if not problems else []
    if problems:
        raise checkpoint_error(file, problems)
    assert isinstance(metadata, dict)
    return tensors, metadata


def _name_problem(name: str) -> str | None:
    if NAME.fullmatch(name):
        return None
    return (
        "found a name that is empty, too long or has path parts or control characters, expected "
        "dotted ASCII words"
    )


def _entry(entry: object, data: int) -> TensorInfo | str:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return f"found {_shown(entry)}, expected an object of dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"found dtype {_shown(dtype)}, expected one of {', '.join(DTYPES)}"
    if not _counts(shape) or len(shape) > MAX_RANK:
        return f"found shape {_shown(shape)}, expected a list of at most {MAX_RANK} sizes"
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"found data_offsets {_shown(offsets)}, expected [begin, end]"
    if dtype == "F4" and (not shape or shape[-1] % 2):
        return f"found F4 with shape {_shown(shape)}, expected an even last dimension"
    bits, held = prod(shape) * DTYPES[dtype][0], offsets[1] - offsets[0]
    if bits != held * 8:
        return f"found {held} bytes of data, expected {-(-bits // 8)} for {dtype} {shape}"
    return TensorInfo(dtype, tuple(shape), data + offsets[0], data + offsets[1])


def _counts(value: object) -> bool:
    return isinstance(value, list) and not any(
        type(item) is not int or not 0 <= item < _MAX_COUNT for item in value
    )


def _range_problems(file: str, tensors: dict[str, TensorInfo], data: int, size: int) -> list[str]:
    problems, position = [], data
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            kind = (
                "overlaps the tensor before it"
                if info.begin < position
                else "leaves a hole before it"
            )
            problems.append(
                f"{file}: tensor {_shown(name)}: {kind}: "
                f"found offset {info.begin}, expected {position}"
            )
        if info.end > size:
            problems.append(
                f"{file}: tensor {_shown(name)}: truncated: "
                f"found a file of {size} bytes, expected {info.end}"
            )
        position = max(position, info.end)
    if position < size:
        problems.append(f"{file}: found {size - position} trailing bytes, expected none")
    return problems


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 100 else text[:97] + "..."
