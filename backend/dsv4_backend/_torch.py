"""Import torch without letting a broken device backend take the process down.

`import torch` autoloads every `torch.backends` entry point and fails if one of them does; torch_npu
without a CANN runtime is the usual case. Here torch is imported first and its backends second, so
that the fault is kept for `dsv4-ascend doctor` and the CPU path stays usable. The environment is
left as it was found.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"

backend_fault: BaseException | None = None
"""Why a torch device backend could not be loaded, or None."""


@contextmanager
def _autoload_kept() -> Iterator[None]:
    """Leave the variable as it was: we set it, and torch_npu does when its import fails."""
    before = os.environ.get(_AUTOLOAD)
    try:
        yield
    finally:
        os.environ.pop(_AUTOLOAD, None)
        if before is not None:
            os.environ[_AUTOLOAD] = before


def import_torch() -> None:
    """Import torch; a failing device backend is recorded in `backend_fault` instead of raised."""
    global backend_fault
    if "torch" in sys.modules:
        return
    with _autoload_kept():
        os.environ[_AUTOLOAD] = "0"
        import torch
    if os.environ.get(_AUTOLOAD) == "0":
        return
    try:
        # torch_npu prints a warning while it loads: standard output belongs to whoever imports us.
        with _autoload_kept(), redirect_stdout(sys.stderr):
            torch._import_device_backends()
    except RuntimeError as error:
        backend_fault = error.__cause__ or error


import_torch()
