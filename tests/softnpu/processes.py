"""Programs run in processes of their own: one chip for each, and a failed queue of torch_npu poisons its process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsv4_backend.softnpu import environment
from dsv4_backend.softnpu.settings import settings

HERE = Path(__file__).resolve().parent
BESIDE = HERE.parents[1] / ".venv" / "npu"
"""Where ci/setup puts torch_npu: on the path of these tests' programs only, since it breaks `import torch` without CANN."""

long = pytest.mark.skipif(not os.environ.get("SOFTNPU_LONG"), reason="the longer tier: set SOFTNPU_LONG=1")


def execute(command, env, timeout=280):
    """(exit code, output) of a Python process that finds torch_npu."""
    env = {**env, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(BESIDE)}
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=timeout)
    return done.returncode, done.stdout + done.stderr


def run(program, *arguments, ranks=0, variables=None, timeout=280, **options):
    """Run a program of ./programs on the software device, on `ranks` processes when given."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]  # on a free port
    command = [*(launcher if ranks else []), str(HERE / "programs" / program), *map(str, arguments)]
    return execute(command, environment({**settings(**options), **(variables or {})}), timeout)
