"""Closed, full and broken standard streams,
exhausted memory: one line and exit code 3, never a traceback.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_cli_model import Result, checkpoint, generate, run  # noqa: F401

from dsv4_ascend.model.transformer import Transformer
from dsv4_backend.errors import argument_error
from dsv4_backend.support import memory_fault

COMMAND = f"exec {sys.executable} -c 'from dsv4_ascend.cli.main import main; main()' "
SHORT = "generate --max-new-tokens 2 --temperature 0"


def in_a_shell(line: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        ["bash", "-c", COMMAND + line],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    return done


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f"{SHORT} --prompt - <&-", "--prompt: standard input is closed"),
        ("logits --input-ids - --output /none <&-", "--input-ids: standard input is closed"),
        (f"{SHORT} >/dev/full", "No space left on device"),
        ("--help >/dev/full", "No space left on device"),
        ("ops --json >&-", "Bad file descriptor"),
    ],
)
def test_a_stream_that_cannot_be_used_is_3(line: str, words: str, tmp_path: Path) -> None:
    done = in_a_shell(line.replace("/none", str(tmp_path / "out")))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (3, "", 1)
    assert done.stderr.startswith("dsv4-ascend: ")
    assert words in done.stderr


def test_what_goes_to_a_closed_standard_error_is_not_in_the_text() -> None:
    done = in_a_shell(f"{SHORT} 2>&-")
    assert done.returncode == 0
    assert "prefill" not in done.stdout


def test_a_reader_that_has_seen_enough_ends_the_command_quietly() -> None:
    done = in_a_shell("generate --max-new-tokens 4000 --temperature 0 | head -c 1")
    assert (len(done.stdout), done.stderr) == (1, "")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(
            "NPU out of memory. Tried to allocate 20.00 MiB (NPU 0).If reserved memory is\n[ERROR]"
        ),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: 8 bytes"
        ),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_exhausted_memory_is_3(generate, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:  # noqa: F811
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Transformer, "run_layers", fail)
    found: Result = generate()
    assert (found.code, found.out, found.err.count("\n")) == (3, "", 1)
    assert "out of memory" in found.err
    assert "use a shorter prompt" in found.err
    assert "If reserved" not in found.err


def test_other_errors_are_no_memory_fault(generate, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    assert memory_fault(RuntimeError("shape '[2]' is invalid")) is None
    assert memory_fault(RuntimeError()) is None

    def fail(*_: object) -> None:
        raise argument_error("sample", "logits", "NaN", "no NaN")

    monkeypatch.setattr(Transformer, "run_layers", fail)
    # An operator refused what the checkpoint led to: a finding, no usage.
    assert generate().code == 1


@pytest.mark.parametrize(
    "options",
    [
        ["--encoding", "nope", "--chat"],
        ["--encoding", "recipe"],
        ["--profile", "x"],
        ["--device", "cuda"],
        ["--device", "npu:x"],
        ["--prompt-file", "/none"],
        ["--input-ids", "/none"],
        ["--top-p", "nan"],
        ["--draft-tokens", str(2**70)],
    ],
)
def test_a_wrong_option_is_usage(generate, options: list[str]) -> None:  # noqa: F811
    assert generate(*options, "--temperature", 0).code == 2
