"""Fixture `softnpu`, which also fails a test that left something wrong on the device.

Use it with `pytest_plugins = ["softnpu.pytest_plugin"]` in the top conftest.py.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from softnpu import Softnpu, current, start


@pytest.fixture
def softnpu() -> Iterator[Softnpu]:
    """The software device of this process, started when needed; faults and chaos end with the test.

    A test fails that over-wrote memory, launched a kernel that did nothing, prepared an operator
    and never launched it, sent a message that nobody received, or planned a fault that never fired.
    """
    if importlib.util.find_spec("torch_npu") is None:
        advice = "pip install torch-npu==2.13.0 in an environment of its own"
        pytest.skip(f"torch_npu is not installed ({advice})")
    device = current() or start()
    import torch_npu

    before = device.statistics()
    yield device
    try:
        torch_npu.npu.synchronize()  # what is still on its way, and its faults, belong to this test
    finally:
        unfired = device.statistics()["planned"]
        device.inject("")
        device.chaos(0)
    device.check_red_zones()
    after = device.statistics()
    for kind in ("idle_launches", "unlaunched", "unreceived"):
        new = {
            name: count for name, count in after[kind].items() if count > before[kind].get(name, 0)
        }
        assert not new, f"softnpu: {kind.replace('_', ' ')} in this test: {new}"
    assert not unfired, f"softnpu: planned faults never fired in this test: {unfired}"
