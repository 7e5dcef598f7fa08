"""Builds `dsv4_backend._C`. Everything declarative is in pyproject.toml."""

import os
import sys
import sysconfig
from pathlib import Path

# A broken device backend fails `import torch`, and no device is needed here.
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

CSRC = Path("csrc")
SOURCES = sorted(
    str(path)
    for folder in ("bind", "common", "cpu", "npu")
    for path in (CSRC / folder).glob("*.cpp")
)
FLAGS = [
    "-std=c++20",
    "-O2",
    "-g0",
    "-Wall",
    "-Wextra",
    "-fvisibility=hidden",
    "-fstack-protector-strong",
]
# Only compiled for OpenMP, not linked: the runtime must be the one that torch brings along.
FLAGS += ["-fopenmp"]
# torch's headers as system headers: our own warnings stay readable (gcc then ignores the -I of the
# same folder).
FLAGS += [f"-isystem{path}" for path in include_paths()]


class BuildExt(BuildExtension):
    """Keeps its objects between editable installs too,
    so that only what changed is compiled again.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        platform, python = sysconfig.get_platform(), sys.implementation.cache_tag
        self.build_temp = f"build/{platform}-{python}-torch{torch.__version__}"


setup(
    ext_modules=[
        CppExtension(
            "dsv4_backend._C",
            SOURCES,
            include_dirs=[str(CSRC.resolve())],
            extra_compile_args=FLAGS,
            extra_link_args=["-Wl,-z,relro,-z,now", "-Wl,-z,noexecstack"],
        )
    ],
    cmdclass={"build_ext": BuildExt},
)
