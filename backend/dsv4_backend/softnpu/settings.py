"""Where the libraries are and how a process is told to use them."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

from dsv4_backend.errors import ArgumentError, EnvironmentFault

SOCS = ("Ascend910B3", "Ascend910_9391", "Ascend950PR_9599")
"""One name of each emulated generation: A2, A3, A5."""

# In the order in which each one finds what it needs.
LIBRARIES = (
    "libascendcl.so", "libacl_op_compiler.so", "libge_runner.so", "libgraph.so", "libacl_tdt_channel.so",
    "libnnopbase.so", "libhcomm.so", "libhccl.so", "libopapi.so",
)  # fmt: skip

DEFAULTS = {"SOFTNPU_SOC": "Ascend910B3", "SOFTNPU_CANN": "8.5.0", "SOFTNPU_DEVICES": "8", "SOFTNPU_CHAOS": "0"}
MOST_MEMORY = 256 << 30
"""Of each device: the window of addresses that it has."""

_MEMORY = re.compile(r"(\d+(?:\.\d+)?)(?:([KMGkmg])(?:i?B)?)?")
_CANN = re.compile(r"\d+\.\d+(?:\.[0-9A-Za-z]+)*")
_FAULT = re.compile(r"[^:@,]+(?:@kernel|@idle)?:(\d+):(-?\d+)")


def library_folder() -> Path:
    """Folder of the built libraries; EnvironmentFault when they were not built."""
    folder = Path(__file__).resolve().parent / "lib"
    missing = [name for name in LIBRARIES if not (folder / name).exists()]
    if missing:
        raise EnvironmentFault(
            f"softnpu: {', '.join(missing)} not in {folder}: run `python csrc/softnpu/softnpu_build.py`"
        )
    return folder


def settings(
    *,
    soc: str | None = None,
    cann: str | None = None,
    devices: int | None = None,
    memory: str | None = None,
    chaos: int | None = None,
    trace: str | os.PathLike[str] | None = None,
    fail: str | None = None,
) -> dict[str, str]:
    """SOFTNPU_* variables.

    `soc`: Ascend910B*, Ascend910_93* or Ascend950*; `cann`: the version that torch_npu is told (8.5.0);
    `memory`: of each device, "64M" or "2G"; `chaos`: seed, one stream
    at a time is delayed; `trace`: Chrome JSON written when the process ends, %p = process id; `fail`: "CALL:N:CODE",
    comma separated, the n-th use of CALL answers CODE (CALL@kernel: on the stream, found when it is synchronised;
    CALL@idle: it is launched and does nothing). Raises ArgumentError for a value that the device refuses.
    """
    _check(soc, cann, devices, memory, chaos, fail)
    given = {
        "SOC": soc,
        "CANN": cann,
        "DEVICES": devices,
        "MEMORY": memory,
        "CHAOS": chaos,
        "TRACE": trace,
        "FAIL": fail,
    }
    return {f"SOFTNPU_{name}": str(value) for name, value in given.items() if value is not None}


def _check(
    soc: str | None, cann: str | None, devices: int | None, memory: str | None, chaos: int | None, fail: str | None
) -> None:
    """The rules of csrc/softnpu/acl/config.cpp and report.cpp, where the variables are read."""
    if soc is not None and not soc.startswith(("Ascend910B", "Ascend910_93", "Ascend950")):
        raise _refused("soc", soc, "Ascend910B*, Ascend910_93* or Ascend950*")
    if cann is not None and not (_CANN.fullmatch(cann) and len(cann) <= 60):
        raise _refused("cann", cann, "a version such as 8.5.0 or 8.3.RC1")
    if devices is not None and not (_integer(devices) and 1 <= devices <= 32):
        raise _refused("devices", devices, "1 to 32")
    if memory is not None and not 1 <= _bytes(memory) <= MOST_MEMORY:
        raise _refused("memory", memory, "a size such as 64M or 2G, 1 byte to 256G")
    if chaos is not None and not (_integer(chaos) and 0 <= chaos < 1 << 64):
        raise _refused("chaos", chaos, "a seed, 0 to 2^64 - 1")
    for fault in fail.split(",") if fail else ():
        found = _FAULT.fullmatch(fault)
        if (
            not found
            or not 1 <= int(found[1]) < 1 << 64
            or not -(1 << 31) <= int(found[2]) < 1 << 31
            or not int(found[2])
        ):
            raise _refused("fail", fault, "CALL:N:CODE with N >= 1 and CODE of 32 bits, not 0")


def _integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _bytes(size: str) -> float:
    found = _MEMORY.fullmatch(str(size))
    return float(found[1]) * 1024 ** " KMG".index((found[2] or " ").upper()) if found else math.nan


def _refused(name: str, found: object, expected: str) -> ArgumentError:
    return ArgumentError(f"softnpu: {name}: found {found!r}, expected {expected}")


def environment(variables: dict[str, str] | None = None) -> dict[str, str]:
    """Environment of a process whose torch_npu is to use the software device; `variables` come from `settings`."""
    result = {**os.environ, **(variables or {})}
    result.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)  # torch_npu leaves "0" behind when its import has failed
    previous = result.get("LD_LIBRARY_PATH")
    result["LD_LIBRARY_PATH"] = os.pathsep.join([str(library_folder()), *([previous] if previous else [])])
    return result
