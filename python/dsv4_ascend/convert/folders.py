"""Files of a folder that grows: each is there whole or not at all, and one process writes."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dsv4_ascend.checkpoint.foreign import JOURNAL
from dsv4_ascend.checkpoint.safetensors_file import checkpoint_error
from dsv4_ascend.checkpoint.writing import sync
from dsv4_backend.errors import CheckpointError

RECORD, QUALITY = "conversion.json", "conversion_quality.json"
"""In a finished folder: what it was made of, and how; how far its values are from those."""
_PART = ".part"


@contextmanager
def atomic(path: Path) -> Iterator[int]:
    """A descriptor of a new file that gets its name, and its data onto the disk, at the end."""
    part = path.with_name(f".{path.name}{_PART}")
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        yield descriptor
        os.fsync(descriptor)
        os.replace(part, path)
        sync(path.parent)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes | memoryview) -> None:
    """A whole file."""
    with atomic(path) as descriptor:
        write_at(descriptor, 0, content)


def write_at(descriptor: int, offset: int, content: bytes | memoryview) -> None:
    """All of `content` at a place of a file."""
    rest = memoryview(content)
    while rest:
        done = os.pwrite(descriptor, rest[: 1 << 28], offset)
        offset, rest = offset + done, rest[done:]


def drop_parts(folder: Path) -> None:
    """Remove what a killed writer left."""
    for path in folder.rglob(f".*{_PART}"):
        path.unlink(missing_ok=True)


@contextmanager
def writing(target: Path) -> Iterator[Path]:
    """The journal of a target folder, locked while inside; its content is the caller's.

    CheckpointError where another process holds it, or where the disk refuses; an error of the
    operating system inside becomes one that says what to do.
    """
    try:
        target.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(target / JOURNAL)
    except OSError as error:
        raise refused(target, error) from None
    try:
        yield target / JOURNAL
    except OSError as error:
        raise refused(target, error) from None
    finally:
        os.close(descriptor)


def _locked(journal: Path) -> int:
    while True:
        descriptor = os.open(journal, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.path.samestat(os.fstat(descriptor), os.stat(journal))
        except FileNotFoundError:
            same = False
        except BlockingIOError:
            os.close(descriptor)
            raise checkpoint_error(
                journal.parent,
                ["found another conversion writing here, expected none: wait until it ends"],
            ) from None
        if same:
            return descriptor
        os.close(descriptor)  # who held it has finished and taken it away


def refused(target: Path, error: OSError) -> CheckpointError:
    """What an error of the operating system means for a conversion."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    advice = "; what is finished stays: make room, then run the same command again"
    return checkpoint_error(target, [f"cannot be written ({error}){advice if full else ''}"])
