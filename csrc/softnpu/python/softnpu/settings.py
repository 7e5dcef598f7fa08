"""Where the libraries are and how a process is told to use them."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from softnpu.errors import ArgumentError, EnvironmentFault

SOCS = ("Ascend910B3", "Ascend910_9391", "Ascend950PR_9599")
"""One name of each emulated generation: A2, A3, A5."""

# In the order in which each one finds what it needs.
LIBRARIES = (
    "libascendcl.so", "libacl_op_compiler.so", "libge_runner.so", "libgraph.so",
    "libacl_tdt_channel.so", "libnnopbase.so", "libhccl.so", "libhcomm.so", "libopapi.so",
)  # fmt: skip

VENDORS = ("vllm-ascend",)
"""Operator packages that softnpu has beside CANN's own, each as a vendor's folder."""

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
    vendor: str | Sequence[str] | None = None,
) -> dict[str, str]:
    """SOFTNPU_* variables.

    `soc`: Ascend910B*, Ascend910_93* or Ascend950*; `cann`: the version that torch_npu is told
    (9.1.0); `memory`: of each device, "64M" or "2G"; `workspace`: that every operator asks for,
    "4K"; `chaos`: seed, one stream at a time is delayed; `trace`: Chrome JSON written when the
    process ends, %p = process id; `fail`: "CALL:N:CODE", comma separated, the n-th use of CALL
    answers CODE (CALL@kernel: on the stream, found when it is synchronised; CALL@idle: it is
    launched and does nothing); `vendor`: operator packages that are asked before CANN's own, best
    first, names of `VENDORS` or folders that hold op_api/lib/libcust_opapi.so. Raises ArgumentError
    for a value that the device refuses, EnvironmentFault when it was not built.
    """
    vendors = [vendor] if isinstance(vendor, str) else vendor
    given = {
        "SOC": soc,
        "CANN": cann,
        "DEVICES": devices,
        "MEMORY": memory,
        "WORKSPACE": workspace,
        "CHAOS": chaos,
        "TRACE": trace,
        "FAIL": fail,
        "VENDOR": None if vendors is None else os.pathsep.join(vendors),
    }
    texts = {name: str(value) for name, value in given.items() if value is not None}
    for name, text in texts.items():
        if refusal := _refusal(name, text):
            raise ArgumentError(f"softnpu: {name.lower()}: found {text!r}: {refusal}")
    variables = {f"SOFTNPU_{name}": text for name, text in texts.items()}
    vendor_folders(variables)  # that are not there are refused here
    return variables


def vendor_folders(variables: Mapping[str, str]) -> list[str]:
    """Folders of the operator packages that SOFTNPU_VENDOR names; ArgumentError for another."""
    names = filter(None, variables.get("SOFTNPU_VENDOR", "").split(os.pathsep))
    return [_vendor_folder(name) for name in names]


def _vendor_folder(name: str) -> str:
    folder = library_folder() / "vendors" / name if name in VENDORS else Path(name).absolute()
    library = folder / "op_api" / "lib" / "libcust_opapi.so"
    if not library.is_file():
        if name in VENDORS:
            advice = "install it again: pip install ./csrc/softnpu"
            raise EnvironmentFault(f"softnpu: no {library}: {advice}")
        expected = f"{', '.join(VENDORS)} or a folder that holds op_api/lib/{library.name}"
        raise ArgumentError(f"softnpu: vendor: found {name!r}: expected {expected}")
    return str(folder)


def custom_path(variables: Mapping[str, str]) -> dict[str, str]:
    """ASCEND_CUSTOM_OPP_PATH with the vendors of these variables before those that are there."""
    folders = vendor_folders(variables)
    present = filter(None, variables.get("ASCEND_CUSTOM_OPP_PATH", "").split(os.pathsep))
    path = [*folders, *(folder for folder in present if folder not in folders)]
    return {"ASCEND_CUSTOM_OPP_PATH": os.pathsep.join(path)} if folders else {}


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
    paths = _home() | _default_device(result)
    result.update({name: path for name, path in paths.items() if name not in result})
    result.update(custom_path(result))
    _prepend(result, "LD_LIBRARY_PATH", str(library_folder()))
    _prepend(result, "PYTHONPATH", torch_npu_path())
    return result


def _home() -> dict[str, str]:
    """Where CANN would be: torch_npu looks for its folders and warns on stdout without them."""
    folder = str(Path(__file__).resolve().parent)
    return {"ASCEND_HOME_PATH": folder, "ASCEND_OPP_PATH": folder}


def _default_device(variables: Mapping[str, str]) -> dict[str, str]:
    """Where aclInit's file is that names the default device, for a torch_npu `beside` torch.

    It looks for the file in the folder of torch; from CANN 8.3 on it sets no device by itself.
    """
    told = variables.get("SOFTNPU_CANN", DEFAULTS["SOFTNPU_CANN"])
    version = re.match(r"(\d+)\.(\d+)", told)
    folder = torch_npu_path()
    if not folder or version is None or tuple(map(int, version.groups())) < (8, 3):
        return {}
    file = Path(folder) / "torch_npu" / "acl_default.json"
    return {"TORCH_ACL_INIT_CONFIG_PATH": str(file)} if file.is_file() else {}


def _prepend(variables: dict[str, str], name: str, folder: str | None) -> None:
    if folder:
        variables[name] = os.pathsep.join(filter(None, [folder, variables.get(name)]))
