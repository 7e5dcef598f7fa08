"""Probes of the machine, and answers to "does this run here, and if not, why?".

`probe` looks, `diagnose` judges. Judging is pure, so it is tested with made-up probes.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from dsv4_backend import _torch

ISA_FLAGS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_int8", "amx_fp16"),
    *("asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2"),
)
"""CPU features that decide between kernels, as /proc/cpuinfo names them."""

State = Literal["ok", "note", "warning", "problem"]


@dataclass(frozen=True)
class Support:
    """A yes or no with its reason."""

    native: bool
    reason: str

    def __bool__(self) -> bool:
        return self.native


@dataclass(frozen=True)
class Cann:
    """One CANN installation: its folder, what named it, and its version if a version file tells."""

    home: str
    named_by: str
    version: str | None


@dataclass(frozen=True)
class Probes:
    """What was found on this machine.
    Faults are the text of the error, None where there was none.
    """

    python: str
    machine: str
    isa: tuple[str, ...]
    torch: str
    torch_npu: str | None
    backends: tuple[str, ...]
    backend_fault: str | None
    autoload: str | None
    npus: int
    npu_name: str | None
    npu_cann: str | None
    npu_is_software: bool
    cann: tuple[Cann, ...]
    ascend_home_fault: str | None
    ascendcl_fault: str | None
    home_fault: str | None
    cwd_fault: str | None


@dataclass(frozen=True)
class Finding:
    """One line of `dsv4-ascend doctor`: what was found, how bad it is, and what to do about it."""

    subject: str
    state: State
    found: str
    advice: str = ""


def probe(environ: Mapping[str, str] = os.environ) -> Probes:
    """Look at the machine. Opens libascendcl.so if the loader finds one;
    torch_npu is asked about its devices.
    """
    npus, npu = npu_count(), _torch_npu()
    return Probes(
        python=platform.python_version(),
        machine=platform.machine(),
        isa=_isa_flags(Path("/proc/cpuinfo")),
        torch=torch.__version__,
        torch_npu=_installed("torch-npu"),
        backends=tuple(sorted({e.name for e in metadata.entry_points(group="torch.backends")})),
        backend_fault=None if _torch.backend_fault is None else _first_line(_torch.backend_fault),
        autoload=environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD"),
        npus=npus,
        npu_name=npu.get_device_name() if npus else None,
        npu_cann=npu.utils.get_cann_version() if npus else None,
        npu_is_software=npus > 0 and npu_is_software(),
        cann=tuple(find_cann(environ)),
        ascend_home_fault=_ascend_home_fault(environ.get("ASCEND_HOME_PATH")),
        ascendcl_fault=_load_fault("libascendcl.so"),
        home_fault=_write_fault(os.path.expanduser("~")),
        cwd_fault=_write_fault("."),
    )


def npu_count() -> int:
    """Number of NPUs that the loaded torch sees; 0 without torch_npu."""
    npu = _torch_npu()
    return int(npu.device_count()) if npu is not None else 0


def _torch_npu() -> Any:
    """torch.npu, None when no torch_npu is loaded."""
    return getattr(torch, "npu", None)


def queue_mode() -> str:
    """How torch_npu enqueues launches in this process: 0, 1 or 2."""
    return os.environ.get("TASK_QUEUE_ENABLE", "1")


def npu_is_software() -> bool:
    """Whether the CANN runtime that the loader finds is softnpu's."""
    try:
        return hasattr(ctypes.CDLL("libascendcl.so"), "softnpu_statistics")
    except OSError:
        return False


def npu_fault() -> str | None:
    """Why torch cannot run on an NPU here, or None when it can."""
    if npu_count():
        return None
    if _torch.backend_fault is not None:
        return f"torch_npu fails to load: {_first_line(_torch.backend_fault)}"
    if _torch_npu() is not None:
        return "torch_npu sees no device"
    if _installed("torch-npu") is None:
        return "torch_npu is not installed (without an NPU: `dsv4-ascend softnpu -- COMMAND`)"
    return "torch_npu is not loaded"


_HOST_MEMORY = ("DefaultCPUAllocator", "std::bad_alloc", "Cannot allocate memory")


def memory_fault(error: BaseException) -> str | None:
    """What an error says about exhausted memory, and what to do; None for another error."""
    text = (str(error).splitlines() or [type(error).__name__])[0]
    advice = "use a shorter prompt, fewer new tokens or a smaller checkpoint"
    if isinstance(error, torch.OutOfMemoryError):
        return f"{text.split('.If ')[0]}; {advice}, or --device cpu"
    if isinstance(error, MemoryError) or any(sign in text for sign in _HOST_MEMORY):
        return f"out of memory ({text}); {advice}"
    return None


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _isa_flags(cpuinfo: Path) -> tuple[str, ...]:
    try:
        text = cpuinfo.read_text()
    except OSError:
        return ()
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    present = set(line[1].split()) if line else set()
    return tuple(flag for flag in ISA_FLAGS if flag in present)


def _ascend_home_fault(home: str | None) -> str | None:
    fine = home is None or os.path.isdir(home)
    return None if fine else f"ASCEND_HOME_PATH={home} is not a folder"


def _load_fault(library: str) -> str | None:
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return _first_line(error)
    return None


def _write_fault(folder: str) -> str | None:
    """Why no file can be created in a folder.
    Tries it, because permission bits lie to root and on read-only disks.
    """
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"{folder}: {error.strerror}"


def find_cann(environ: Mapping[str, str]) -> Iterator[Cann]:
    """CANN installations named by the environment or in the usual place,
    each once, the loader's choice first.
    """
    seen: set[str] = set()
    for named_by, home in _cann_homes(environ):
        # Several names and links lead to one installation.
        libraries = os.path.realpath(home / "lib64")
        if libraries not in seen and home.is_dir():
            seen.add(libraries)
            yield Cann(str(home), named_by, _cann_version(home))


def _cann_homes(environ: Mapping[str, str]) -> Iterator[tuple[str, Path]]:
    for folder in filter(None, environ.get("LD_LIBRARY_PATH", "").split(":")):
        if os.path.exists(os.path.join(folder, "libascendcl.so")):
            yield "LD_LIBRARY_PATH", Path(folder).parent
    for variable in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"):
        if environ.get(variable):
            yield variable, Path(environ[variable])
    yield "default location", Path("/usr/local/Ascend/ascend-toolkit/latest")
    yield "default location", Path("/usr/local/Ascend/cann")


def _cann_version(home: Path) -> str | None:
    if home.resolve() == _softnpu_folder():
        return "softnpu, the software device"
    install, info = "ascend_toolkit_install.info", "version.info"
    patterns = (install, f"*/{install}", info, f"*/{info}", f"share/info/*/{info}")
    for path in (path for pattern in patterns for path in sorted(home.glob(pattern))):
        try:
            match = re.search(r"^version=(\S+)", path.read_text(), re.MULTILINE | re.IGNORECASE)
        except OSError:
            continue
        if match:
            return match[1]
    return None


def _softnpu_folder() -> Path | None:
    """Where the distribution softnpu is installed; it is looked for, never imported."""
    spec = importlib.util.find_spec("softnpu")
    return Path(spec.origin).resolve().parent if spec and spec.origin else None


def diagnose(probes: Probes) -> tuple[Finding, ...]:
    """Judge the probes: what is fine, what is missing, and what to do."""
    return tuple(
        finding
        for rule in (
            _judge_host,
            _judge_torch_npu,
            _judge_autoload,
            _judge_cann,
            _judge_npus,
            _judge_folders,
        )
        for finding in rule(probes)
    )


def verdict(findings: tuple[Finding, ...], npus: int, software: bool = False) -> str:
    """One sentence over all findings; software: the NPUs are softnpu's."""
    kind = "software NPU(s)" if software else "NPU(s)"
    ready = f"ready for CPU and {npus} {kind}" if npus else "ready for CPU"
    counts = {state: sum(f.state == state for f in findings) for state in ("problem", "warning")}
    parts = [f"{count} {state}{'s' * (count > 1)}" for state, count in counts.items() if count]
    return "; ".join([ready, ", ".join(parts)] if parts else [ready])


def _judge_host(p: Probes) -> Iterator[Finding]:
    yield Finding("python", "ok", f"{p.python} on {p.machine}")
    yield Finding("cpu", "ok", " ".join(p.isa) or "no known vector extension")
    yield Finding("torch", "ok", p.torch)


def _judge_torch_npu(p: Probes) -> Iterator[Finding]:
    if p.torch_npu is None:
        advice = (
            f"for an Ascend NPU: {install_torch_npu(p.torch)}; "
            "without one: dsv4-ascend softnpu -- COMMAND"
        )
        yield Finding("torch_npu", "note", "not installed: CPU only", advice)
    elif _release(p.torch_npu) != _release(p.torch):
        found = f"{p.torch_npu} is built for torch {_release(p.torch_npu)}, but torch is {p.torch}"
        yield Finding("torch_npu", "problem", found, install_torch_npu(p.torch))
    elif p.backend_fault is None:
        yield Finding("torch_npu", "ok", p.torch_npu)
    if p.backend_fault is not None:
        subject = "torch_npu" if p.torch_npu is not None else " ".join(p.backends)
        yield Finding(
            subject,
            "problem",
            f"import fails: {p.backend_fault}",
            _backend_advice(p, p.backend_fault),
        )


def install_torch_npu(torch_version: str, options: str = "") -> str:
    """The command that installs the torch_npu of a torch."""
    return " ".join(filter(None, ["pip install", options, f"torch-npu=={_release(torch_version)}"]))


def _backend_advice(p: Probes, fault: str) -> str:
    if "cannot open shared object file" in fault:
        return (
            "install CANN, then in each shell: source <CANN folder>/set_env.sh "
            "(it sets LD_LIBRARY_PATH); without an NPU, run on the software device: dsv4-ascend "
            "softnpu -- COMMAND"
        )
    if p.torch_npu is None:
        return f"pip uninstall the package that registers {' '.join(p.backends)}, or repair it"
    return f"reinstall it for this torch: {install_torch_npu(p.torch)} --force-reinstall"


def _release(version: str) -> str:
    return ".".join(re.findall(r"\d+", version)[:3])


def _judge_autoload(p: Probes) -> Iterator[Finding]:
    if p.backend_fault is not None:
        found = "a plain `import torch` fails here, because torch autoloads the broken backend"
        advice = (
            "import dsv4_ascend before torch (it keeps the fault aside), or export "
            "TORCH_DEVICE_BACKEND_AUTOLOAD=0"
        )
        yield Finding("autoload", "warning", found, advice)
    elif p.autoload == "0" and p.torch_npu is not None:
        found = "TORCH_DEVICE_BACKEND_AUTOLOAD=0: torch_npu is not loaded"
        yield Finding(
            "autoload",
            "warning",
            found,
            "unset TORCH_DEVICE_BACKEND_AUTOLOAD, or import torch_npu yourself",
        )


def _judge_cann(p: Probes) -> Iterator[Finding]:
    if p.ascend_home_fault is not None:
        advice = "source the set_env.sh of an installed CANN, or unset ASCEND_HOME_PATH"
        yield Finding("CANN", "problem", p.ascend_home_fault, advice)
    for cann in p.cann:
        yield Finding(
            "CANN", "ok", f"{cann.version or 'unknown version'}, in {cann.home} ({cann.named_by})"
        )
    if len(p.cann) > 1:
        first = next((c for c in p.cann if c.named_by == "LD_LIBRARY_PATH"), p.cann[0])
        found = f"{len(p.cann)} installations; the loader picks {first.version or first.home}"
        yield Finding(
            "CANN", "warning", found, "source the set_env.sh of the one you mean, in a fresh shell"
        )
    if p.ascendcl_fault is None:
        yield Finding("libascendcl.so", "ok", "found by the loader")
        return
    needed = p.torch_npu is not None or bool(p.cann)
    advice = "source <CANN folder>/set_env.sh, so that LD_LIBRARY_PATH leads to libascendcl.so"
    yield Finding(
        "libascendcl.so",
        "problem" if needed else "note",
        p.ascendcl_fault,
        advice if needed else "",
    )


def _judge_npus(p: Probes) -> Iterator[Finding]:
    if p.npus:
        kind = "software device(s) of softnpu, no hardware" if p.npu_is_software else "device(s)"
        yield Finding("NPU", "ok", f"{p.npus} {kind}: {p.npu_name}, CANN {p.npu_cann}")
    elif p.torch_npu is not None and p.backend_fault is None and p.autoload != "0":
        yield Finding(
            "NPU", "warning", "torch_npu sees no device", "check `npu-smi info` and /dev/davinci*"
        )


def _judge_folders(p: Probes) -> Iterator[Finding]:
    if p.home_fault is not None:
        advice = (
            "set HOME to a writable folder, "
            "or TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR for torch.compile"
        )
        yield Finding("HOME", "warning", f"no file can be created in {p.home_fault}", advice)
    if p.cwd_fault is not None:
        advice = "give output options an absolute path in a writable folder"
        yield Finding(
            "current folder", "warning", f"no file can be created in {p.cwd_fault}", advice
        )
