"""DeepSeek V4 on Huawei Ascend, provable on any laptop: the model, parity runs and the command line.

`load` opens a checkpoint; `Model.forward` gives logits and `Model.generate` tokens. Both names, and torch with them,
are loaded at their first use: importing the package does nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsv4_ascend.model.model import Model, load

__all__ = ["Model", "load"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'dsv4_ascend' has no attribute {name!r}")
    import_module("dsv4_backend")  # first: it decides how torch is imported
    return getattr(import_module("dsv4_ascend.model.model"), name)
