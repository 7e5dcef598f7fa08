"""Import torch without letting a broken device backend take the process down.

`import torch` autoloads every `torch.backends` entry point and fails if one of them does; torch_npu without a CANN
runtime is the usual case. Here torch is imported first and its backends second, so that the fault is kept for
`dsv4-ascend doctor` and the CPU path stays usable. The environment is left as it was found.
"""

from __future__ import annotations

import os
import sys

_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"

backend_fault: BaseException | None = None
"""Why a torch device backend could not be loaded, or None."""


def import_torch() -> None:
    """Import torch; a failing device backend is recorded in `backend_fault` instead of raised."""
    global backend_fault
    if "torch" in sys.modules:
        return
    wanted = os.environ.get(_AUTOLOAD)
    os.environ[_AUTOLOAD] = "0"
    try:
        import torch
    finally:
        if wanted is None:
            del os.environ[_AUTOLOAD]
        else:
            os.environ[_AUTOLOAD] = wanted
    if wanted == "0":
        return
    try:
        torch._import_device_backends()
    except RuntimeError as error:
        backend_fault = error.__cause__ or error


import_torch()
