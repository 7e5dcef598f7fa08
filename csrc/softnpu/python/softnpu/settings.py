"""Where the libraries are and how a process is told to use them."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from pathlib import Path

from softnpu.errors import ArgumentError, EnvironmentFault

SOCS = ("Ascend910B3", "Ascend910_9391", "Ascend950PR_9599")
"""One name of each emulated generation: A2, A3, A5."""

# In the order in which each one finds what it needs.
LIBRARIES = (
    "libascendcl.so", "libacl_op_compiler.so", "libge_runner.so", "libgraph.so",
    "libacl_tdt_channel.so", "libnnopbase.so", "libhccl.so", "libhcomm.so", "libopapi.so",
)  # fmt: skip

DEFAULTS = {
    "SOFTNPU_SOC": "Ascend910B3",
    "SOFTNPU_CANN": "9.1.0",
    "SOFTNPU_DEVICES": "8",
    "SOFTNPU_CHAOS": "0",
}


def library_folder() -> Path:
    """Folder of the built libraries; EnvironmentFault when they were not built."""
    folder = Path(__file__).resolve().parent / "lib"
    missing = [name for name in LIBRARIES if not (folder / name).exists()]
    if missing:
        advice = "install it again: pip install ./csrc/softnpu"
        raise EnvironmentFault(f"softnpu: {', '.join(missing)} not in {folder}: {advice}")
    return folder


def settings(
    *,
    soc: str | None = None,
    cann: str | None = None,
    devices: int | None = None,
    memory: str | None = None,
    workspace: str | None = None,
    chaos: int | None = None,
    trace: str | os.PathLike[str] | None = None,
    fail: str | None = None,
) -> dict[str, str]:
    """SOFTNPU_* variables.

    `soc`: Ascend910B*, Ascend910_93* or Ascend950*; `cann`: the version that torch_npu is told
    (9.1.0); `memory`: of each device, "64M" or "2G"; `workspace`: that every operator asks for,
    "4K"; `chaos`: seed, one stream at a time is delayed; `trace`: Chrome JSON written when the
    process ends, %p = process id; `fail`: "CALL:N:CODE", comma separated, the n-th use of CALL
    answers CODE (CALL@kernel: on the stream, found when it is synchronised; CALL@idle: it is
    launched and does nothing). Raises ArgumentError for a value that the device refuses,
    EnvironmentFault when it was not built.
    """
    given = {
        "SOC": soc,
        "CANN": cann,
        "DEVICES": devices,
        "MEMORY": memory,
        "WORKSPACE": workspace,
        "CHAOS": chaos,
        "TRACE": trace,
        "FAIL": fail,
    }
    texts = {name: str(value) for name, value in given.items() if value is not None}
    for name, text in texts.items():
        if refusal := _refusal(name, text):
            raise ArgumentError(f"softnpu: {name.lower()}: found {text!r}: {refusal}")
    return {f"SOFTNPU_{name}": text for name, text in texts.items()}


def _refusal(name: str, value: str) -> str:
    """Why SOFTNPU_<name> may not be `value`, said by the device itself; "" when it may."""
    runtime = ctypes.CDLL(str(library_folder() / LIBRARIES[0]))
    runtime.softnpu_refusal.restype = ctypes.c_char_p
    return str(runtime.softnpu_refusal(name.encode(), value.encode()).decode())


def beside() -> Path:
    """Where torch_npu may lie: beside the environment, in which it would break `import torch`."""
    return Path(sys.prefix) / "npu"


def torch_npu_path() -> str | None:
    """What Python's path needs for torch_npu: nothing ("") where it is installed; None: nowhere."""
    if importlib.util.find_spec("torch_npu") is not None:
        return ""
    return str(beside()) if (beside() / "torch_npu").is_dir() else None


def environment(variables: dict[str, str] | None = None) -> dict[str, str]:
    """Environment of a process whose torch_npu is to use the software device.

    `variables` come from `settings`.
    A torch_npu that lies `beside` this environment is put on the Python path of that process.
    """
    result = {**os.environ, **(variables or {})}
    # torch_npu leaves "0" behind when its import has failed.
    result.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
    result.update({name: path for name, path in _home().items() if name not in os.environ})
    _prepend(result, "LD_LIBRARY_PATH", str(library_folder()))
    _prepend(result, "PYTHONPATH", torch_npu_path())
    return result


def _home() -> dict[str, str]:
    """Where CANN would be: torch_npu looks for its folders and warns on stdout without them."""
    folder = str(Path(__file__).resolve().parent)
    return {"ASCEND_HOME_PATH": folder, "ASCEND_OPP_PATH": folder}


def _prepend(variables: dict[str, str], name: str, folder: str | None) -> None:
    if folder:
        variables[name] = os.pathsep.join(filter(None, [folder, variables.get(name)]))
