"""Programs run in processes of their own: one chip for each,
and a failed queue of torch_npu poisons its process.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from tier import BESIDE

from softnpu import environment
from softnpu.settings import settings

HERE = Path(__file__).resolve().parent

long = pytest.mark.long


def finishes(process, timeout):
    """Whether it ends in time by itself; torchrun that is told to end takes its ranks along."""
    try:
        process.wait(timeout)
        return True
    except subprocess.TimeoutExpired:
        process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return False


def execute(command, env, timeout=280):
    """(exit code, output) of a Python process that finds torch_npu."""
    env = {**env, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(BESIDE)}
    # Files, not pipes: a rank that outlives its launcher would keep a pipe open, and the
    # reader waiting.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen([sys.executable, *command], env=env, stdout=out, stderr=err)
        finished = finishes(process, timeout)
        out.seek(0), err.seek(0)
        output = (out.read() + err.read()).decode(errors="replace")
    assert finished, f"{command}: not ended within {timeout} s\n{output}"
    return process.returncode, output


def run(program, *arguments, ranks=0, variables=None, timeout=280, **options):
    """Run a program of ./programs on the software device, on `ranks` processes when given."""
    # On a free port.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*(launcher if ranks else []), str(HERE / "programs" / program), *map(str, arguments)]
    return execute(command, environment({**settings(**options), **(variables or {})}), timeout)
