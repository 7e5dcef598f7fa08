"""Another engine's kernels in a Python of their own, timed there in turn with ours.

A child process per operator: a kernel that needs instructions which the machine lacks ends its
process, and nothing else.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from dsv4_ascend.bench.timing import TimesItself

_KEPT_OUT = "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"


class PeerError(Exception):
    """What a peer said, or how its process ended."""


class Peer:
    """The process of a script that answers a line of JSON with another (vllm_cpu.py)."""

    def __init__(self, process: subprocess.Popen[str], errors: IO[bytes]) -> None:
        self._process, self._errors = process, errors

    @classmethod
    @contextmanager
    def running(cls, python: Path, script: Path) -> Iterator[Peer]:
        """`script` run by the Python of the peer's environment. PeerError if there is none."""
        environment = {name: value for name, value in os.environ.items() if name not in _KEPT_OUT}
        environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
        pipe = subprocess.PIPE
        with tempfile.TemporaryFile() as errors:
            try:
                process = subprocess.Popen(
                    [python, script],
                    stdin=pipe,
                    stdout=pipe,
                    stderr=errors,
                    text=True,
                    env=environment,
                )
            except OSError as error:
                raise PeerError(f"{python}: {error.strerror}") from error
            try:
                yield cls(process, errors)
            finally:
                process.kill()
                process.communicate()

    def ask(self, **request: object) -> dict[str, Any]:
        """Its answer. PeerError if that is an error, or none."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerError(self._end())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def _end(self) -> str:
        """How the process ended, in one line."""
        code = self._process.wait()
        if code == -signal.SIGILL:
            return "uses instructions that this processor does not have"
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        last = f": {said[-1].strip()}" if said else ""
        by = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"ended with {by}{last}"


class PeerCall(TimesItself):
    """A kernel of a peer for a number of tokens, which the peer has built and run once.

    name: as the peer calls it.
    """

    def __init__(self, peer: Peer, operator: str, of: Mapping[str, Any], tokens: int) -> None:
        self._peer, self._tokens = peer, tokens
        answer = peer.ask(build=operator, tokens=tokens, of=of)
        self.name: str = answer["name"]

    def seconds(self, count: int) -> float:
        """See `TimesItself`."""
        return float(self._peer.ask(run=self._tokens, count=count)["seconds"])
