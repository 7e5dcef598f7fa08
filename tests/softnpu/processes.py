"""Programs run in processes of their own: one chip for each,
and a failed queue of torch_npu poisons its process.

Importing torch with torch_npu takes longer than most programs: those that start alike (same chip,
same settings) are forked from one process that has done it.
"""

from __future__ import annotations

import functools
import json
import os
import select
import signal
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


def for_a_program(env):
    """That environment, where torch_npu is found and a program has one core."""
    return {**env, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(BESIDE)}


def execute(command, env, timeout=280):
    """(exit code, output) of a Python process that finds torch_npu."""
    env = for_a_program(env)
    # Files, not pipes: a rank that outlives its launcher would keep a pipe open, and the
    # reader waiting.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen([sys.executable, *command], env=env, stdout=out, stderr=err)
        finished = finishes(process, timeout)
        out.seek(0), err.seek(0)
        output = (out.read() + err.read()).decode(errors="replace")
    assert finished, f"{command}: not ended within {timeout} s\n{output}"
    return process.returncode, output


class Started:
    """A process of started.py, which has imported torch with torch_npu in `environment`."""

    def __init__(self, environment):
        command = [sys.executable, str(HERE / "started.py")]
        pipe = subprocess.PIPE  # unbuffered: select sees every line that was not read
        self.process = subprocess.Popen(
            command, bufsize=0, env=environment, stdin=pipe, stdout=pipe
        )

    def __del__(self):
        self.process.communicate()

    def run(self, argv, environment, timeout):
        """(exit code, output) of a program that is forked from it."""
        with tempfile.NamedTemporaryFile() as file:
            wanted = {"argv": argv, "environment": environment, "output": file.name}
            self.process.stdin.write(json.dumps(wanted).encode() + b"\n")
            self.process.stdin.flush()
            child = int(self.process.stdout.readline())
            finished = False
            try:
                finished = bool(select.select([self.process.stdout], [], [], timeout)[0])
            finally:  # also where pytest's own limit is reached
                if not finished:
                    os.kill(child, signal.SIGKILL)
                code = int(self.process.stdout.readline())
            output = file.read().decode(errors="replace")
        assert finished, f"{argv}: not ended within {timeout} s\n{output}"
        return code, output


PER_RUN = {"PYTEST_CURRENT_TEST", "TASK_QUEUE_ENABLE", "PYTORCH_NO_NPU_MEMORY_CACHING"}
"""Nothing reads them while torch and torch_npu are imported."""


@functools.lru_cache(maxsize=4)  # each holds 300 MB; the one unused for longest ends
def started(variables):
    """The process for programs of these variables, (name, text) in order."""
    return Started(dict(variables))


def run(program, *arguments, ranks=0, variables=None, timeout=280, **options):
    """Run a program of ./programs on the software device, on `ranks` processes when given."""
    argv = [str(HERE / "programs" / program), *map(str, arguments)]
    env = environment({**settings(**options), **(variables or {})})
    if ranks:  # on a free port
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        return execute([*launcher, *argv], env, timeout)
    env = for_a_program(env)
    alike = tuple(sorted(item for item in env.items() if item[0] not in PER_RUN))
    return started(alike).run(argv, env, timeout)
