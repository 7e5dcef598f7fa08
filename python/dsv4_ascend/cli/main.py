"""The `dsv4-ascend` command.
Only the chosen command is imported, so that the others cost it no time.

Exit codes: 0 good, 1 findings, 2 usage, 3 environment, 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dsv4_ascend.cli import ENVIRONMENT, FINDINGS, INTERRUPTED, USAGE, streams
from dsv4_ascend.cli.voice import one_voice, rank_prefix

COMMANDS = {
    "generate": (
        "dsv4_ascend.cli.generate:generate",
        "Continue a prompt, with the shipped small model by default.",
    ),
    "logits": (
        "dsv4_ascend.cli.logits:logits",
        "Logits of a list of token ids, written as safetensors.",
    ),
    "ops": ("dsv4_ascend.cli.ops:app", "The operators and what runs them, and why; a new one."),
    "parity": (
        "dsv4_ascend.cli.parity:parity",
        "Compare every implementation with the oracle; hunt named faults.",
    ),
    "bench": ("dsv4_ascend.cli.bench:bench", "Time operators on this machine, beside torch's own."),
    "plan": (
        "dsv4_ascend.cli.plan:plan",
        "Does it fit on these devices, which layout, where does the time go.",
    ),
    "convert": (
        "dsv4_ascend.cli.convert:convert",
        "Write a checkpoint in the formats of a chip, streamed and resumable.",
    ),
    "inspect": (
        "dsv4_ascend.cli.inspect:inspect",
        "What a checkpoint folder holds: release, format, sizes, what is missing.",
    ),
    "verify": (
        "dsv4_ascend.cli.inspect:verify",
        "Read every value of a checkpoint folder and name what looks wrong.",
    ),
    "doctor": (
        "dsv4_ascend.cli.doctor:doctor",
        "Versions, devices, torch_npu and CANN: what is missing, what to do.",
    ),
    "softnpu": (
        "dsv4_ascend.cli.softnpu:softnpu",
        "Run a command on the software Ascend device, with no NPU or CANN.",
    ),
    "train-tiny": (
        "dsv4_ascend.cli.train_tiny:train_tiny",
        "Train and quantise the small model that is shipped.",
    ),
}
"""Name -> (module:object, one line of help). The object is a command's function or a typer app."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command line and leave the process with its exit code."""
    streams.prepare()
    with one_voice():
        _main(sys.argv[1:] if arguments is None else arguments)


def _main(arguments: Sequence[str]) -> None:
    try:
        try:
            code = _run(arguments)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:  # whoever read the output has seen enough
        code = FINDINGS
    except OSError as error:
        what = "" if error.filename else "a standard stream cannot be used: "
        code = _complain(f"{what}{error}", ENVIRONMENT)
    streams.drop_unwritable()
    sys.exit(code)


@contextmanager
def _interrupts_end_the_process() -> Iterator[None]:
    """Ctrl-C leaves at once while modules are imported: their code might swallow an exception,
    or print it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _run(arguments: Sequence[str]) -> int:
    name = next((a for a in arguments if not a.startswith("-")), "")
    if name not in COMMANDS:
        with _interrupts_end_the_process():
            from dsv4_ascend.cli import app
        return app.call(COMMANDS, {}, arguments)
    if arguments[0] == "softnpu":  # its options are its own, and torch need not be imported
        return _softnpu(list(arguments[1:]))
    target, _ = COMMANDS[name]
    try:
        with _interrupts_end_the_process():
            function = _load(target)
            from dsv4_ascend.cli import app
            from dsv4_backend.errors import ArgumentError, Dsv4Error, EnvironmentFault
            from dsv4_backend.support import memory_fault
    except (ImportError, OSError) as error:
        advice = "; reinstall it for this Python: pip install --force-reinstall dsv4-ascend"
        # These say what to do themselves.
        advised = str(error).startswith(("dsv4_backend._C is stale", "DSV4_ISA"))
        return _complain(f"{name} does not load: {error}{'' if advised else advice}", ENVIRONMENT)
    try:
        return app.call(COMMANDS, {name: function}, arguments)
    except EnvironmentFault as error:
        return _complain(
            f"{error}. `dsv4-ascend doctor` looks at the whole environment", ENVIRONMENT
        )
    except Dsv4Error as error:
        # What a checkpoint led to; all other arguments are options.
        by_operator = str(error).startswith("dsv4::")
        usage = isinstance(error, ArgumentError) and not by_operator
        return _complain(str(error), USAGE if usage else FINDINGS)
    except (MemoryError, RuntimeError) as error:
        fault = memory_fault(error)
        if fault is None:
            raise
        return _complain(f"{name}: {fault}", ENVIRONMENT)


def _softnpu(arguments: list[str]) -> int:
    from dsv4_ascend.cli.softnpu import softnpu

    return _complain(
        f"{softnpu(arguments)}. `dsv4-ascend doctor` looks at the whole environment", ENVIRONMENT
    )


def _load(target: str) -> Any:
    # Before any module that imports torch: see dsv4_backend._torch.
    importlib.import_module("dsv4_backend")
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


def _complain(message: str, code: int) -> int:
    streams.complain(f"{rank_prefix()}{message}")
    return code
