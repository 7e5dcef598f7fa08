"""DeepSeek V4 on Huawei Ascend, provable on any laptop: the model,
parity runs and the command line.

`load` opens a checkpoint; `Model.forward` gives logits and `Model.generate` tokens. Importing the
package imports torch in the safe way (dsv4_backend._torch); the command `dsv4-ascend` does so
itself, once it has seen to Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsv4_ascend.model.model import Model, load

__all__ = ["Model", "load"]


def _is_command() -> bool:
    arguments: list[str] = getattr(sys, "argv", None) or [""]
    return os.path.basename(arguments[0]) == "dsv4-ascend"


if not _is_command() and "torch" not in sys.modules:
    import_module("dsv4_backend")  # first: it decides how torch is imported


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'dsv4_ascend' has no attribute {name!r}")
    import_module("dsv4_backend")
    return getattr(import_module("dsv4_ascend.model.model"), name)
