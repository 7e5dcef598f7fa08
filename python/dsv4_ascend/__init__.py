"""DeepSeek V4 on Huawei Ascend, provable on any laptop: the model, parity runs and the command line.

`load` opens a checkpoint; `Model.forward` gives logits and `Model.generate` tokens.
"""

import dsv4_backend  # noqa: F401  (first: it decides how torch is imported)
from dsv4_ascend.model.model import Model, load

__all__ = ["Model", "load"]
