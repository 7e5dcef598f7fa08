from __future__ import annotations

import importlib.util

import pytest
from processes import BESIDE

from dsv4_backend.errors import EnvironmentFault
from dsv4_backend.softnpu import library_folder


@pytest.fixture(scope="session", autouse=True)
def _available():
    if importlib.util.find_spec("torch_npu") is None and not BESIDE.exists():
        pytest.skip("torch_npu is not installed: ci/setup test puts it into .venv/npu")
    try:
        library_folder()
    except EnvironmentFault as fault:
        pytest.skip(str(fault))
