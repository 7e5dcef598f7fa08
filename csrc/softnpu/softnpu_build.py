"""Builds the software Ascend device: libraries with the names and the ABI of CANN's, without CANN.

`python csrc/softnpu/softnpu_build.py [FOLDER]` builds into FOLDER, python/softnpu/lib beside it
unless given; setup.py calls `build`. Environment: CXX (g++; may carry arguments, "ccache g++"),
CXXFLAGS, LDFLAGS, MAX_JOBS.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parent
TARGET = SOURCE / "python" / "softnpu" / "lib"
WORK = SOURCE / "build" / "objects"
PARTS = ("acl", "hccl", "opapi")
PUBLIC = ("acl", "opapi")
"""Whose headers operators of others include: they go into `include` beside the libraries."""
FILES_AT_ONCE = 5
# Names that torch_npu links or opens; what they are asked for is in libascendcl, which they need.
SHIMS = ("acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel", "nnopbase")
FLAGS = "-std=c++20 -O2 -g0 -fPIC -Wall -Wextra -fvisibility=hidden -fstack-protector-strong"
LINK = "-shared -Wl,-z,relro,-z,now -Wl,-z,noexecstack -Wl,--no-undefined -Wl,-rpath,'$$ORIGIN'"


def _given(variable: str, default: str = "") -> str:
    """What the environment says, as ninja writes it down for the shell."""
    return (os.environ.get(variable, "").strip() or default).replace("$", "$$")


def _escaped(path: Path) -> str:
    """A path in a build line of ninja."""
    return "".join(f"${c}" if c in "$ :" else c for c in str(path))


def _flag(option: str, path: object) -> str:
    """An option with a path, as the shell and ninja need it."""
    return shlex.quote(f"{option}{path}").replace("$", "$$")


def _torch_flags() -> tuple[str, str]:
    # A broken device backend fails `import torch`.
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    from torch.utils.cpp_extension import include_paths, library_paths

    includes = " ".join(_flag("-isystem", path) for path in include_paths())
    libraries = " ".join(_flag("-L", path) for path in library_paths())
    return includes, f"{libraries} -ltorch_cpu -lc10"


def _together(work: Path, sources: list[Path]) -> list[Path]:
    """Files that include FILES_AT_ONCE sources each.

    Every compilation that includes torch spends seconds on torch's own templates. So names in
    anonymous namespaces must differ within a folder.
    """
    work.mkdir(parents=True, exist_ok=True)
    files = []
    for first in range(0, len(sources), FILES_AT_ONCE):
        some = sources[first : first + FILES_AT_ONCE]
        text = "".join(f'#include "{source}"\n' for source in some)
        files.append(work / f"together_{first // FILES_AT_ONCE}.cpp")
        if not files[-1].is_file() or files[-1].read_text() != text:
            files[-1].write_text(text)
    return files


def _library(
    work: Path,
    target: Path,
    name: str,
    folder: str | None,
    extra_cxx: str,
    extra_link: str,
    needs: str = "",
    place: str = "",
) -> list[str]:
    """Lines that build target/place/lib<name>.so of a folder's sources; needs: what it links."""
    lines: list[str] = []
    precompiled = ""
    sources = sorted((SOURCE / folder).glob("*.cpp")) if folder else []
    if folder and (header := SOURCE / folder / "precompiled.h").is_file():
        precompiled = f"{folder}/precompiled.h.gch"
        lines.append(f"build {precompiled}: precompile {_escaped(header)}")
        lines.append(f"  extra = {extra_cxx}")
        extra_cxx += f" -include {folder}/precompiled.h"
        sources = _together(work / folder, sources)
    objects = [f"{folder}/{source.stem}.o" for source in sources]
    for source, made in zip(sources, objects, strict=True):
        lines.append(f"build {made}: cxx {_escaped(source)} | {precompiled}")
        lines.append(f"  extra = {extra_cxx}")
    out = _escaped(target / place / f"lib{name}.so")
    lines.extend(
        [
            f"build {out}: link {' '.join(objects)} | {needs}",
            f"  soname = lib{name}.so",
            f"  extra = {extra_link}",
        ]
    )
    return lines


def _rules(work: Path, target: Path, include: Path) -> str:
    includes, torch = _torch_flags()
    cxx = _given("CXX", "g++")
    lines = [
        "ninja_required_version = 1.3",
        "rule cxx",
        f"  command = {cxx} {FLAGS} {_given('CXXFLAGS')} {_flag('-I', include)} $extra"
        " -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule precompile",
        f"  command = {cxx} {FLAGS} {_given('CXXFLAGS')} {_flag('-I', include)} $extra"
        " -MMD -MF $out.d -x c++-header $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",  # never half written
        f"  command = {cxx} {LINK} {_given('LDFLAGS')} -Wl,-soname,$soname"
        " -o $out.new $in $extra && mv $out.new $out",
    ]

    def library(*arguments: Any) -> None:
        lines.extend(_library(work, target, *arguments))

    runtime = _escaped(target / "libascendcl.so")
    on_runtime = f"{_flag('-L', target)} -Wl,--no-as-needed -lascendcl"
    library("ascendcl", "acl", "", "-lpthread")
    library("hccl", "hccl", "", f"{on_runtime} -lpthread -lrt", runtime)
    # Operators that exchange rows between ranks find their communicator there.
    exchanges = f"{runtime} {_escaped(target / 'libhccl.so')}"
    library("opapi", "opapi", f"-O1 {includes}", f"{on_runtime} -lhccl {torch}", exchanges)
    on_operators = f"{on_runtime} -lopapi {torch} -Wl,-rpath,'$$ORIGIN/../../../..'"
    for vendor in sorted(p.name for p in (SOURCE / "vendors").glob("*") if p.is_dir()):
        library(
            "cust_opapi",
            f"vendors/{vendor}",
            f"-O1 {includes}",
            on_operators,
            _escaped(target / "libopapi.so"),
            f"vendors/{vendor}/op_api/lib",
        )
    for name in SHIMS:
        library(name, None, "", on_runtime, runtime)
    # It is asked for HcclGroupStart.
    library("hcomm", None, "", f"{on_runtime} -lhccl", _escaped(target / "libhccl.so"))
    return "\n".join(lines) + "\n"


def _include_folder(work: Path) -> Path:
    """Where the sources find "softnpu/...", whatever the folder they lie in is called."""
    folder = work / "include" / "softnpu"
    folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        link = folder / part
        if link.resolve() != SOURCE / part:
            link.unlink(missing_ok=True)
            link.symlink_to(SOURCE / part)
    return folder.parent


def _refuse_a_missing_compiler() -> None:
    program = (shlex.split(os.environ.get("CXX", "")) or ["g++"])[0]
    if shutil.which(program) is None:
        sys.exit(
            f"softnpu: compiler not found: {program}: "
            "install g++ 12 or newer, or name another one in CXX"
        )


def build(target: Path = TARGET, work: Path = WORK) -> None:
    """Build what has changed into the folder `target`; `work` keeps the objects.

    Leaves the process when there is no compiler; raises subprocess.CalledProcessError when a source
    does not compile.
    """
    _refuse_a_missing_compiler()
    target.mkdir(parents=True, exist_ok=True)
    include = _include_folder(work)
    (work / "build.ninja").write_text(_rules(work.absolute(), target.resolve(), include.absolute()))
    ninja = [found] if (found := shutil.which("ninja")) else [sys.executable, "-m", "ninja"]
    jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    subprocess.run([*ninja, *jobs, "-C", str(work)], check=True)
    for part in PUBLIC:
        headers = shutil.ignore_patterns("*.cpp", "precompiled.h")
        shutil.copytree(
            SOURCE / part, target / "include" / "softnpu" / part, ignore=headers, dirs_exist_ok=True
        )


if __name__ == "__main__":
    build(*(Path(argument) for argument in sys.argv[1:]))
