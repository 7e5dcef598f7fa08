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
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import torch

from dsv4_ascend.bench.timing import TimesItself

_T = TypeVar("_T")
PATIENCE = 600.0
"""Seconds that a peer has for one answer."""
_LEAVE = 5.0
"""Seconds that a process has to end once it has closed its output."""


class PeerError(Exception):
    """What a peer said, or how its process ended."""


class Peer:
    """The process of a script that answers a line of JSON with another (vllm_cpu.py)."""

    def __init__(self, process: subprocess.Popen[str], errors: IO[bytes]) -> None:
        self._process, self._errors = process, errors

    @classmethod
    @contextmanager
    def running(cls, python: Path, script: Path) -> Iterator[Peer]:
        """`script` run by the Python of the peer's environment, which sees neither ours nor paths
        of the caller. PeerError if there is none.
        """
        pipe = subprocess.PIPE
        with tempfile.TemporaryFile() as errors:
            try:
                process = subprocess.Popen(
                    [python, "-I", script],
                    stdin=pipe,
                    stdout=pipe,
                    stderr=errors,
                    encoding="utf-8",
                    errors="replace",
                    env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
                )
            except OSError as error:
                raise PeerError(f"{python}: {error.strerror}") from error
            try:
                yield cls(process, errors)
            finally:
                process.kill()
                process.communicate()

    def ask(self, wanted: str, kind: type[_T], **request: object) -> _T:
        """What it answers under the name `wanted`. PeerError if that is an error, or nothing."""
        line = self._answer(json.dumps(request))
        try:
            answer = json.loads(line)
            if "error" in answer:
                raise PeerError(answer["error"])
            found = answer[wanted]
        except (ValueError, TypeError, KeyError):
            raise PeerError(f"answered {line.strip()[:60]!r}") from None
        if not isinstance(found, kind):
            raise PeerError(f"answered {found!r} as {wanted}")
        return found

    def _answer(self, request: str) -> str:
        """Its next line."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        late = threading.Timer(PATIENCE, self._process.kill)
        late.start()
        try:
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            late.cancel()
        if not line:
            raise PeerError(self._end())
        return line

    def _end(self) -> str:
        """How the process ended, in one line."""
        try:
            code = self._process.wait(_LEAVE)
        except subprocess.TimeoutExpired:
            return "closed its output"
        if code == -signal.SIGILL:
            return "uses instructions that this processor does not have"
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        last = f": {said[-1].strip()}" if said else ""
        by = f"exit code {code}" if code >= 0 else signal.strsignal(-code) or f"signal {-code}"
        return f"ended ({by}){last}"


class PeerCall(TimesItself):
    """A kernel of a peer for a number of tokens, which the peer has built and run once.

    name: as the peer calls it.
    """

    def __init__(self, peer: Peer, operator: str, of: Mapping[str, Any], tokens: int) -> None:
        self._peer, self._operator, self._tokens = peer, operator, tokens
        self.name = peer.ask("name", str, build=operator, tokens=tokens, of=of)

    def seconds(self, count: int) -> float:
        """See `TimesItself`. PeerError names the operator."""
        try:
            found = self._peer.ask("seconds", float, run=self._tokens, count=count)
        except PeerError as error:
            raise PeerError(f"{self._operator}, {self._tokens} tokens: {error}") from error
        if found <= 0:
            raise PeerError(f"{self._operator}, {self._tokens} tokens: took {found} s")
        return found
