"""The device of this process: statistics, faults, chaos, traces."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from typing import Any

from softnpu.errors import EnvironmentFault
from softnpu.settings import DEFAULTS, LIBRARIES, custom_path, library_folder, settings

_current: Softnpu | None = None
_started: dict[str, str] = {}
"""SOFTNPU_* as they were when the device read them."""


class Softnpu:
    """Handle on the runtime in this process. Every method works at any time and from any thread.

    A process that was forked after the device was used has no device: EnvironmentFault.
    """

    def __init__(self, runtime: ctypes.CDLL) -> None:
        self._runtime = runtime
        runtime.softnpu_statistics.restype = ctypes.c_size_t
        runtime.aclGetRecentErrMsg.restype = ctypes.c_char_p

    def statistics(self) -> dict[str, Any]:
        """What has happened in this process.

        `calls` by function, `alive` objects, `launches` by operator, `idle_launches` (the kernel
        stored into none of its outputs), `unlaunched` (phase 1 without phase 2), `unreceived`
        messages, faults that `fired` and that are still `planned`, `memory`.
        """
        room = 1 << 16
        while True:
            text = ctypes.create_string_buffer(room)
            needed = self._runtime.softnpu_statistics(text, ctypes.c_size_t(room))
            self._check(needed == 0)
            if needed < room:
                return dict(json.loads(text.value))
            room = 2 * needed

    def alive(self) -> dict[str, int]:
        """Objects that exist now; tensors, scalars, arrays and executors are 0 between calls."""
        return dict(self.statistics()["alive"])

    def launches(self) -> dict[str, int]:
        """How often each operator was launched."""
        return {name: totals["launches"] for name, totals in self.statistics()["launches"].items()}

    def inject(self, faults: str) -> None:
        """Plan faults "CALL:N:CODE", comma separated, counted from now; "" forgets all.

        CALL@kernel fails on the stream, CALL@idle is launched and does nothing (any code but 0).
        Raises EnvironmentFault for a fault that cannot be read.
        """
        self._check(self._runtime.softnpu_inject(faults.encode()))

    def chaos(self, seed: int) -> None:
        """Delay one stream at a time, chosen by the seed; 0 stops."""
        self._runtime.softnpu_chaos(ctypes.c_uint64(seed))

    def write_trace(self, path: str | os.PathLike[str]) -> None:
        """Chrome trace of every launch so far; needs `start(trace=...)` or SOFTNPU_TRACE."""
        self._check(self._runtime.softnpu_write_trace(os.fspath(path).encode()))

    def check_red_zones(self) -> None:
        """Raise EnvironmentFault when any live allocation was over-written behind its end."""
        self._check(self._runtime.softnpu_check_red_zones())

    def raw_write(self, pointer: int, offset: int, value: int) -> None:
        """Write one byte as a faulty kernel would: `offset` is not checked. For tests of guards."""
        self._check(
            self._runtime.softnpu_raw_write(
                ctypes.c_void_p(pointer), ctypes.c_size_t(offset), ctypes.c_ubyte(value)
            )
        )

    def _check(self, code: int) -> None:
        if code:
            raise EnvironmentFault(self._runtime.aclGetRecentErrMsg().decode(errors="replace"))


def start(**options: Any) -> Softnpu:
    """Load the software device into this process, before `import torch_npu`.

    Options: see `settings.settings`. Raises EnvironmentFault when torch_npu is loaded already, the
    libraries were not built or the device runs already with other options; ArgumentError for a bad
    option.
    """
    global _current
    variables = settings(**options)
    if "torch_npu" in sys.modules and _current is None and not _inherited():
        raise EnvironmentFault(
            "softnpu.start() comes before `import torch_npu`: set TORCH_DEVICE_BACKEND_AUTOLOAD=0"
        )
    if _current is not None or "torch_npu" in sys.modules:
        _refuse_other(variables, _started if _current else dict(os.environ))
    if _current is None:
        os.environ.update(variables)
        os.environ.update(custom_path(os.environ))
        _started.update(
            (name, value) for name, value in os.environ.items() if name.startswith("SOFTNPU_")
        )
        import torch  # noqa: F401  (libopapi is linked against it)

        folder = library_folder()
        loaded = [ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL) for name in LIBRARIES]
        _current = Softnpu(loaded[0])
    return _current


def _refuse_other(wanted: dict[str, str], running: dict[str, str]) -> None:
    different = [
        f"{name} is {was or 'unset'}, {value} was asked for"
        for name, value in wanted.items()
        if (was := running.get(name) or DEFAULTS.get(name, "")) != value
    ]
    if different:
        raise EnvironmentFault(f"softnpu runs already with other options: {'; '.join(different)}")


def current() -> Softnpu | None:
    """The device of this process, also when the command `softnpu` started it; None if none is."""
    return start() if _current is None and _inherited() else _current


def _inherited() -> bool:
    return str(library_folder()) in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
