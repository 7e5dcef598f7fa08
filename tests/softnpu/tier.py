"""Whether the software device can be tested here: a person without it gets a skip, CI a failure."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import NoReturn

import pytest

REQUIRED = "SOFTNPU_REQUIRED"
"""ci/test sets it: what is skipped here was then not tested at all."""

BESIDE = Path(sys.prefix) / "npu"
"""Where ci/setup puts torch_npu: on the path of these tests' programs only,
since it breaks `import torch` without CANN.
"""


def missing() -> str | None:
    """What a run on the software device lacks here, and what to do; None when it lacks nothing."""
    try:
        from softnpu import library_folder
        from softnpu.errors import EnvironmentFault
    except ImportError as error:  # a folder of that name on the path is not it either
        return f"softnpu is not installed ({error}): pip install ./csrc/softnpu, or ci/setup test"
    try:
        library_folder()
    except EnvironmentFault as fault:
        return str(fault)
    if importlib.util.find_spec("torch_npu") is None and not (BESIDE / "torch_npu").is_dir():
        return f"torch_npu is neither installed nor in {BESIDE}: ci/setup test puts it there"
    return None


def lacking(what: str, required: str = REQUIRED) -> NoReturn:
    """Skip the running test because of what is missing; fail it where its tier is required, which
    the variable of that name says.
    """
    if os.environ.get(required):
        pytest.fail(f"{what} ({required} is set, so this is no skip)", pytrace=False)
    pytest.skip(what)
