"""What the opening of a checkpoint that lies says."""

import time

import pytest

from dsv4_ascend.checkpoint.folder import open_checkpoint
from dsv4_backend.errors import CheckpointError


def refusal(folder) -> str:
    """The message; the folder must be untouched and the refusal quick."""
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    started = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert time.monotonic() - started < 2
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    return str(caught.value)
