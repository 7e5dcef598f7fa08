"""Standard streams that are closed, full or broken: they end a command with one line,
never with a traceback.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress


def prepare() -> None:
    """Put something in the place of streams that were closed (`>&-`),
    and escape what a terminal's encoding lacks.

    Writing to a closed standard output fails as it does on a full disk; what goes to a closed
    standard error is gone.
    """
    for number, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            # Takes the lowest free number, so that no file of ours becomes the stream.
            os.open(os.devnull, mode)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def complain(message: str) -> None:
    """One line on standard error, if that can be written."""
    with suppress(OSError):
        print(f"dsv4-ascend: {message}", file=sys.stderr, flush=True)


def drop_unwritable() -> None:
    """Send what a broken stream still holds to nowhere, where Python may flush it when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
