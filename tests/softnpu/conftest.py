"""Programs run in processes of their own: one chip for each, and a failed queue of torch_npu poisons its process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsv4_backend.errors import EnvironmentFault
from dsv4_backend.softnpu import environment, library_folder
from dsv4_backend.softnpu.settings import settings

HERE = Path(__file__).resolve().parent
BACKEND = HERE.parents[1] / "backend"
SOCS = ("Ascend910B3", "Ascend910_9391", "Ascend950PR_9599")

long = pytest.mark.skipif(not os.environ.get("SOFTNPU_LONG"), reason="the longer tier: set SOFTNPU_LONG=1")


@pytest.fixture(scope="session", autouse=True)
def _available():
    if importlib.util.find_spec("torch_npu") is None:
        pytest.skip("torch_npu is not installed (pip install torch-npu==2.13.0, in an environment of its own)")
    try:
        library_folder()
    except EnvironmentFault as fault:
        pytest.skip(str(fault))


@pytest.fixture
def run():
    """Run a program of ./programs on the software device; returns (exit code, output)."""

    def call(program, *arguments, ranks=0, variables=None, timeout=280, **options):
        launcher = (
            [
                "-m",
                "torch.distributed.run",
                "--nproc-per-node",
                str(ranks),
                "--master-port",
                str(29500 + os.getpid() % 500),
            ]
            if ranks
            else []
        )
        full = environment(
            {**settings(**options), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(BACKEND), **(variables or {})}
        )
        command = [sys.executable, *launcher, str(HERE / "programs" / program), *map(str, arguments)]
        done = subprocess.run(command, env=full, capture_output=True, text=True, timeout=timeout)
        return done.returncode, done.stdout + done.stderr

    return call
