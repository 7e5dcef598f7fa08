"""Programs run in processes of their own: one chip for each, and a failed queue of torch_npu poisons its process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsv4_backend.errors import EnvironmentFault
from dsv4_backend.softnpu import SOCS, environment, library_folder  # noqa: F401  (SOCS for the tests beside this)
from dsv4_backend.softnpu.settings import settings

HERE = Path(__file__).resolve().parent
BESIDE = HERE.parents[1] / ".venv" / "npu"
"""Where ci/setup puts torch_npu: on the path of these tests' programs only, since it breaks `import torch` without CANN."""

long = pytest.mark.skipif(not os.environ.get("SOFTNPU_LONG"), reason="the longer tier: set SOFTNPU_LONG=1")


@pytest.fixture(scope="session", autouse=True)
def _available():
    if importlib.util.find_spec("torch_npu") is None and not BESIDE.exists():
        pytest.skip("torch_npu is not installed: ci/setup test puts it into .venv/npu")
    try:
        library_folder()
    except EnvironmentFault as fault:
        pytest.skip(str(fault))


def execute(command, env, timeout=280):
    """(exit code, output) of a process that finds torch_npu."""
    env = {**env, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(BESIDE)}
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=timeout)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def run():
    """Run a program of ./programs on the software device, on `ranks` processes when given."""

    def call(program, *arguments, ranks=0, variables=None, timeout=280, **options):
        port = str(29500 + os.getpid() % 500)
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", port]
        command = [*(launcher if ranks else []), str(HERE / "programs" / program), *map(str, arguments)]
        return execute(command, environment({**settings(**options), **(variables or {})}), timeout)

    return call
