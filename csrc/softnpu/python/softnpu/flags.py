"""Flags of g++ for a library of operators: `g++ -o LIBRARY SOURCE $(python -m softnpu.flags)`.

docs/operators.md of softnpu says what such a source holds and where the library goes.
"""

from __future__ import annotations

import os
import shlex

from softnpu.settings import library_folder


def flags() -> list[str]:
    """For g++ behind the source, whose library is shared; EnvironmentFault without libraries."""
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # torch_npu without CANN breaks the import
    from torch.utils.cpp_extension import include_paths, library_paths

    ours = library_folder()
    return [
        *("-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden"),
        f"-I{ours / 'include'}",
        *(f"-isystem{path}" for path in include_paths()),
        *(f"-L{path}" for path in (ours, *library_paths())),
        *("-lopapi", "-lascendcl", "-ltorch_cpu", "-lc10"),
        f"-Wl,-rpath,{ours}",
    ]


if __name__ == "__main__":
    print(shlex.join(flags()))
