"""`python started.py`: a process that has imported torch with torch_npu, and forks for each
program it is told to run.

A line of standard input is {"argv": [...], "environment": {...}, "output": file}; answered with the
process id of its run, and with its exit code when it has ended. It starts no thread and touches no
device, so each run has what the interpreter and `import torch` alone leave behind.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

import torch  # noqa: F401  brings torch_npu along


def wanted():
    """Serve until standard input ends, then None; in each fork: what it is to run."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            return json.loads(line)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return None


def become(argv, environment, output):
    """Take over what a process of its own would have been given."""
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = argv
    sys.path[0] = str(Path(argv[0]).parent)
    for descriptor, file, mode in ((0, os.devnull, "r"), (1, output, "a"), (2, output, "a")):
        with open(file, mode) as opened:
            os.dup2(opened.fileno(), descriptor)
    sys.stdin = os.fdopen(0, closefd=False)


if __name__ == "__main__" and (run := wanted()):
    become(**run)
    runpy.run_path(sys.argv[0], run_name="__main__")
