"""Builds the software Ascend device: shared libraries with the names and the ABI of CANN's, with no CANN present.

`python csrc/softnpu/softnpu_build.py [FOLDER]` builds into FOLDER, backend/dsv4_backend/softnpu/lib unless given;
setup.py calls `build`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parent
TARGET = SOURCE.parents[1] / "backend" / "dsv4_backend" / "softnpu" / "lib"
# Names that torch_npu links or opens; everything they are asked for is in libascendcl, which they depend on.
SHIMS = ("acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel", "nnopbase")
FLAGS = "-std=c++20 -O2 -g0 -fPIC -Wall -Wextra -fvisibility=hidden -fstack-protector-strong"
LINK = "-shared -Wl,-z,relro,-z,now -Wl,-z,noexecstack -Wl,--no-undefined -Wl,-rpath,'$$ORIGIN'"


def _torch_flags() -> tuple[str, str]:
    from torch.utils.cpp_extension import include_paths, library_paths

    includes = " ".join(f"-isystem{path}" for path in include_paths())
    libraries = " ".join(f"-L{path}" for path in library_paths())
    return includes, f"{libraries} -ltorch_cpu -lc10"


def _rules(target: Path) -> str:
    includes, torch = _torch_flags()
    lines = [
        "ninja_required_version = 1.3",
        "rule cxx",
        f"  command = g++ {FLAGS} -I{SOURCE.parent} $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = g++ {LINK} -Wl,-soname,$soname -o $out.new $in $extra && mv $out.new $out",  # never half written
    ]

    def library(name: str, folder: str | None, extra_cxx: str, extra_link: str, needs: str = "") -> None:
        objects = []
        for source in sorted((SOURCE / folder).glob("*.cpp")) if folder else []:
            objects.append(f"{folder}/{source.stem}.o")
            lines.extend([f"build {objects[-1]}: cxx {source}", f"  extra = {extra_cxx}"])
        out = target / f"lib{name}.so"
        lines.extend(
            [f"build {out}: link {' '.join(objects)} | {needs}", f"  soname = lib{name}.so", f"  extra = {extra_link}"]
        )

    runtime = target / "libascendcl.so"
    on_runtime = f"-L{target} -Wl,--no-as-needed -lascendcl"
    library("ascendcl", "acl", "", "-lpthread")
    library("hccl", "hccl", "", f"{on_runtime} -lpthread -lrt", str(runtime))
    library("opapi", "opapi", f"-O1 {includes}", f"{on_runtime} {torch}", str(runtime))
    for name in SHIMS:
        library(name, None, "", on_runtime, str(runtime))
    library("hcomm", None, "", f"{on_runtime} -lhccl", str(target / "libhccl.so"))  # asked for HcclGroupStart
    return "\n".join(lines) + "\n"


def build(target: Path = TARGET, work: Path | None = None) -> None:
    """Builds what has changed. `work` keeps the objects (default: build/softnpu of the source tree)."""
    work = work or SOURCE.parents[1] / "build" / "softnpu"
    work.mkdir(parents=True, exist_ok=True)
    target.mkdir(parents=True, exist_ok=True)
    (work / "build.ninja").write_text(_rules(target.resolve()))
    ninja = [found] if (found := shutil.which("ninja")) else [sys.executable, "-m", "ninja"]
    jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    subprocess.run([*ninja, *jobs, "-C", str(work)], check=True)


if __name__ == "__main__":
    build(*(Path(argument) for argument in sys.argv[1:]))
