"""The software Ascend device: the unmodified torch_npu runs on it, with no NPU, driver or CANN.

`start()` before `import torch_npu` makes this process use it; `environment()` is the same for
another process, as `softnpu -- COMMAND` does. It proves launchers and orchestration, never NPU
arithmetic or speed.
"""

from softnpu.device import Softnpu, current, start
from softnpu.settings import SOCS, VENDORS, environment, library_folder

__all__ = ["SOCS", "VENDORS", "Softnpu", "current", "environment", "library_folder", "start"]
