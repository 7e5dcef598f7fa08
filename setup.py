"""Builds `dsv4_backend._C`. Everything declarative is in pyproject.toml."""

import os
import shlex
import subprocess
import sys
import sysconfig
from itertools import dropwhile
from pathlib import Path

# A broken device backend fails `import torch`, and no device is needed here.
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"

# torch puts ccache before the compiler by itself, which fails where CXX says it too.
if len(shlex.split(os.environ.get("CXX", ""))) > 1:
    os.environ.setdefault("TORCH_NO_COMPILER_WRAPPER", "1")

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
SOURCES = [
    str(path)
    for folder in ("common", "cpu", "npu", "bind")
    for path in sorted((CSRC / folder).glob("*.cpp"))
]
FILES_AT_ONCE = 5
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

    Files of `bind` are compiled several at once, those of a CPU apart from those of an NPU, because
    every compilation that includes torch spends seconds on torch's own templates. So names in
    their anonymous namespaces must differ.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        platform, python = sysconfig.get_platform(), sys.implementation.cache_tag
        self.build_temp = f"build/{platform}-{python}-torch{torch.__version__}"

    def build_extensions(self) -> None:
        (extension,) = self.extensions
        bound = [path for path in extension.sources if Path(path).parent == PRECOMPILED.parent]
        npu = [path for path in bound if path.endswith("_npu.cpp")]
        cpu = [path for path in bound if path not in npu]
        # Of CC="ccache gcc" torch replaces one word alone.
        words = self.compiler.compiler_so
        self.compiler.compiler_so = [words[0], *dropwhile(lambda w: not w.startswith("-"), words)]
        self.precompile()
        extension.sources = [path for path in extension.sources if path not in bound]
        extension.sources += [*self.together("cpu", cpu), *self.together("npu", npu)]
        super().build_extensions()

    def together(self, name: str, sources: list[str]) -> list[str]:
        """Files that include FILES_AT_ONCE sources each, behind the precompiled header."""
        files = []
        for first in range(0, len(sources), FILES_AT_ONCE):
            some = [Path(path).resolve() for path in sources[first : first + FILES_AT_ONCE]]
            lines = [f'#include "{path}"\n' for path in (PRECOMPILED.name, *some)]
            files.append(f"{self.build_temp}/bind_{name}_{first // FILES_AT_ONCE}.cpp")
            write_changed(Path(files[-1]), "".join(lines))
        return files

    def precompile(self) -> None:
        """Parse what most sources of `bind` include once for all of them."""
        header = Path(self.build_temp).resolve() / PRECOMPILED.name
        compiled = header.with_suffix(".h.gch")
        compiler = [*shlex.split(get_cxx_compiler()), *self.compiler.compiler_so[1:], *FLAGS]
        command = [*compiler, "-x", "c++-header", str(header), "-o", str(compiled)]
        if write_changed(header, f"// {shlex.join(command)}\n{PRECOMPILED.read_text()}"):
            compiled.unlink(missing_ok=True)
        if not compiled.is_file():
            subprocess.run(command, check=True)


def write_changed(path: Path, text: str) -> bool:
    """Write a file unless it holds that text already, which its time would tell otherwise."""
    if path.is_file() and path.read_text() == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return True


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
