"""What a measurement was made on: the machine, its limits, and the versions."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

import dsv4_ascend
from dsv4_ascend.bench.timing import Timing
from dsv4_backend import _C

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNKNOWN_CACHE = 32 << 20
SIDE = 1024
"""Rows and columns of the product that measures multiply-adds."""
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Limits:
    """What torch reached in the same run: bytes read and fp32 operations per second.

    A kernel may pass them: torch's loops are no bound of the machine's.
    """

    bytes_per_second: float
    flops_per_second: float

    def seconds(self, traffic: int, flops: int) -> float:
        """The least time for bytes that are moved and operations."""
        return max(traffic / self.bytes_per_second, flops / self.flops_per_second)


class LimitProbe:
    """Two calls that take part in a run: a sum over more than the caches hold, and an fp32 product.

    side: of the square matrices; read: bytes, by default twice the last-level cache, at least
    256 MiB.
    """

    def __init__(self, side: int = SIDE, read: int | None = None) -> None:
        read = max(2 * last_level_cache(), 256 << 20) if read is None else read
        long, square = torch.ones(read // 4), torch.ones(side, side)
        self.calls: dict[str, Callable[[], torch.Tensor]] = {
            "read": lambda: long.sum(),
            "multiply-add": lambda: square @ square,
        }
        self._bytes, self._flops = 4 * long.numel(), 2 * side**3

    def limits(self, timings: dict[str, Timing]) -> Limits:
        """What the calls reached, from their timings by the same names."""
        read, product = timings["read"].median, timings["multiply-add"].median
        return Limits(self._bytes / read, self._flops / product)


def facts() -> dict[str, str | int]:
    """The machine in words: processor, cores, caches, memory, instruction set of our kernels."""
    found: dict[str, str | int] = {
        "processor": _processor(),
        "machine": platform.machine(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "caches": ", ".join(f"{name} {size >> 10} KiB" for name, size in _cache_sizes().items()),
        "memory": f"{memory('MemTotal') / 1e9:.0f} GB",
        "isa": _C.isa(),
    }
    return {name: value for name, value in found.items() if value != ""}


def load() -> float:
    """Processes that wanted a core in the last minute, this one too."""
    return os.getloadavg()[0]


def versions() -> dict[str, str]:
    """Of Python, torch and this project."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "revision": _revision(Path(dsv4_ascend.__file__).parents[2]),
    }


def last_level_cache() -> int:
    """Bytes of the largest cache, 32 MiB where the system does not say."""
    return max([0, *_cache_sizes().values()]) or _UNKNOWN_CACHE


def memory(field: str, path: str = "/proc/meminfo") -> int:
    """Bytes of a field of a file of the system's, 0 where it has none."""
    try:
        text = Path(path).read_text()
    except OSError:
        return 0
    found = re.search(rf"^{field}:\s*(\d+) kB", text, re.MULTILINE)
    return int(found[1]) << 10 if found else 0


@cache
def _cache_sizes() -> dict[str, int]:
    """Name -> bytes of the caches that the first core sees."""
    sizes = {}
    for folder in sorted(_CACHES.glob("index*")):
        level, kind, size = (
            (folder / name).read_text().strip() for name in ("level", "type", "size")
        )
        if kind != "Instruction":
            letter = "d" if kind == "Data" else ""
            sizes[f"L{level}{letter}"] = int(size.rstrip("KMG")) * _UNITS.get(size[-1], 1)
    return sizes


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    found = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1] if found else platform.processor()


def _revision(root: Path) -> str:
    """The commit of a checkout of ours, with "changed" where files differ from it."""
    if not (root / ".git").exists():
        return "no checkout"

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + (", changed" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "git does not answer"
