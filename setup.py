"""Builds `dsv4_backend._C`. Everything declarative is in pyproject.toml."""

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

# A broken device backend fails `import torch`, and no device is needed here.
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"

import torch
from setuptools import setup
from torch.utils.cpp_extension import (
    BuildExtension,
    CppExtension,
    get_cxx_compiler,
    include_paths,
)

CSRC = Path("csrc")
PRECOMPILED = CSRC / "bind" / "precompiled.h"
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

    def build_extensions(self) -> None:
        header = self.precompile()
        for extension in self.extensions:
            extension.extra_compile_args += ["-include", str(header)]
        super().build_extensions()

    def precompile(self) -> Path:
        """Parse what every source includes once for all of them: half of the time of a build."""
        header = Path(self.build_temp).resolve() / PRECOMPILED.name
        compiler = [*shlex.split(get_cxx_compiler()), *self.compiler.compiler_so[1:], *FLAGS]
        command = [*compiler, "-x", "c++-header", str(header), "-o", f"{header}.gch"]
        text = f"// {shlex.join(command)}\n{PRECOMPILED.read_text()}"
        if not (header.is_file() and header.read_text() == text):
            header.parent.mkdir(parents=True, exist_ok=True)
            header.with_suffix(".h.gch").unlink(missing_ok=True)
            header.write_text(text)
        if not header.with_suffix(".h.gch").is_file():
            subprocess.run(command, check=True)
        return header


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
