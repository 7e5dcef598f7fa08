"""Writing one safetensors file tensor by tensor, in the memory of one: all of it, or nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import IO

import torch

from dsv4_ascend.checkpoint.safetensors_file import DTYPES
from dsv4_ascend.checkpoint.writing import file_start

STORED = {torch_dtype: name for name, (bits, torch_dtype) in DTYPES.items() if bits >= 8}
"""torch dtype -> what a file calls it."""
_WIDTHS = (8, 4, 2, 1)


def data_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor's values in row-major order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _unnamed(folder: Path) -> IO[bytes]:
    return tempfile.TemporaryFile(dir=folder)


class SafetensorsStream:
    """A file that grows by `add` and gets its name in `finish`; a context.

    What is added goes to unnamed files in the target's folder, one per width of elements: wide ones
    come first in the result, so that every tensor is aligned without holes, which the format
    forbids. Until `finish` ends nothing has the target's name, and a process that is killed leaves
    nothing behind. OSError where the folder or the disk refuses.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self._open = ExitStack()
        self._parts = {w: self._open.enter_context(_unnamed(target.parent)) for w in _WIDTHS}
        self._sizes = dict.fromkeys(_WIDTHS, 0)
        self._entries: dict[int, dict[str, tuple[str, tuple[int, ...]]]]
        self._entries = {width: {} for width in _WIDTHS}

    def add(self, name: str, tensor: torch.Tensor) -> str:
        """Append a tensor of any device; its name."""
        width = tensor.element_size()
        begin, part = self._sizes[width], self._parts[width]
        part.seek(begin)  # where an interrupted call began, not where it ended
        part.write(data_of(tensor))
        self._entries[width][name] = STORED[tensor.dtype], tuple(tensor.shape)
        self._sizes[width] = begin + tensor.nbytes
        return name

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write everything under the target's name, in place of what has it."""
        unfinished = self._target.with_name(f".{self._target.name}.part")
        try:
            with unfinished.open("wb") as file:
                file.write(self._header(metadata))
                for width, part in self._parts.items():
                    part.truncate(self._sizes[width])
                    part.seek(0)
                    shutil.copyfileobj(part, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(self._target)
        finally:
            with suppress(OSError):
                unfinished.unlink()

    def _header(self, metadata: Mapping[str, str]) -> bytes:
        entries = (
            (name, *entry)
            for of_width in self._entries.values()
            for name, entry in of_width.items()
        )
        return file_start(entries, metadata)[0]

    def __enter__(self) -> SafetensorsStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        with suppress(OSError):  # a full disk was told where it was met
            self._open.close()
