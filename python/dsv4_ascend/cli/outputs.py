"""Files that commands write for their users."""

from __future__ import annotations

import os
from pathlib import Path

from dsv4_backend.errors import ArgumentError


def check_output(path: Path, option: str) -> None:
    """ArgumentError unless a regular file at `path` can be made or replaced,
    as far as can be seen before the work is done.
    """
    special = os.path.lexists(path) and not os.path.isfile(path)
    if special or not path.name or not os.path.isdir(path.parent):
        raise ArgumentError(f"{option}: found {path}, expected a file in an existing folder")
