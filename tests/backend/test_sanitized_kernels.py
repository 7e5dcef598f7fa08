"""All contract cases on kernels built with AddressSanitizer and UndefinedBehaviorSanitizer, and
with ThreadSanitizer.

Only csrc/cpu is built again; the rest of the extension is linked as it was built. Long tier.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.utils.cpp_extension import library_paths

ROOT = Path(__file__).parents[2]
CASES = Path(__file__).parent / "sanitized_cases.py"


class Sanitizer(NamedTuple):
    """library: what the interpreter loads first; sources: linked in place of the extension's."""

    library: str
    flags: tuple[str, ...]
    options: dict[str, str]
    sources: tuple[Path, ...] = ()


MEMORY = Sanitizer(
    "libasan.so",
    # Alignment: rows of a view begin where they begin; unaligned loads are what vectors use.
    ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-sanitize=alignment"),
    {"ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"},
)
THREADS = Sanitizer(
    "libtsan.so",
    ("-fsanitize=thread",),
    {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1", "OMP_NUM_THREADS": "1"},
    (Path(__file__).parent / "threads.cpp",),
)
COMPILE = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fopenmp"]
# A kernel that reads one row of the weight too many.
BEYOND = "product_rows.h", "last(call.n - 1)", "last(call.n)"
# Threads that share what each has to have for itself.
SHARED = "product.cpp", "thread_local ThreadBuffer sums_of_thread;", "ThreadBuffer sums_of_thread;"

pytestmark = pytest.mark.long


def runtime(sanitizer):
    found = subprocess.run(
        ["g++", f"-print-file-name={sanitizer.library}"], capture_output=True, text=True, check=True
    )
    path = Path(found.stdout.strip())
    if not path.is_absolute():
        pytest.skip(f"g++ has no {sanitizer.library} here")
    return path.resolve()


def build(folder, sanitizer, planted=None):
    """A backend folder whose extension has sanitized kernels."""
    kernels = folder / "csrc" / "cpu"
    shutil.copytree(ROOT / "csrc" / "cpu", kernels)
    for source in sanitizer.sources:
        shutil.copy(source, kernels)
    if planted is not None:
        name, right, wrong = planted
        text = (kernels / name).read_text()
        assert text.count(right) == 1
        (kernels / name).write_text(text.replace(right, wrong))
    backend = folder / "backend"
    shutil.copytree(ROOT / "backend", backend, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    sources = sorted(kernels.glob("*.cpp"))
    compiler = ["g++", *COMPILE, *sanitizer.flags, f"-I{folder / 'csrc'}", f"-I{ROOT / 'csrc'}"]

    def compile_one(source):
        target = source.with_suffix(".o")
        subprocess.run([*compiler, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    tree = next(ROOT.glob(f"build/*{sys.implementation.cache_tag}-torch{torch.__version__}"))
    others = [path for path in tree.glob("csrc/*/*.o") if path.parent.name not in ("cpu", "bind")]
    others += tree.rglob("bind_*.o")
    libraries = [f"-L{path}" for path in library_paths()]
    libraries += [f"-l{name}" for name in ("c10", "torch", "torch_cpu", "torch_python")]
    extension = backend / "dsv4_backend" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    # The first definition counts: of parallel_for that of the sanitizer's sources.
    link = ["g++", "-shared", "-Wl,--allow-multiple-definition", *sanitizer.flags]
    subprocess.run([*link, *objects, *others, *libraries, "-o", extension], check=True)
    return backend


def run(folder, sanitizer, *operators, planted=None):
    """The cases of all operators, or of these, on sanitized kernels."""
    library = runtime(sanitizer)
    backend = build(folder, sanitizer, planted)
    environment = os.environ | sanitizer.options
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(backend), str(ROOT / "python")]),
        "LD_PRELOAD": str(library),
    }
    return subprocess.run(
        [sys.executable, CASES, *operators],
        env=environment, capture_output=True, text=True, timeout=1500,
    )  # fmt: skip


@pytest.mark.parametrize("sanitizer", [MEMORY, THREADS], ids=lambda s: s.library)
def test_no_case_is_reported(tmp_path, sanitizer):
    done = run(tmp_path, sanitizer)
    assert done.returncode == 0, done.stderr[-6000:]
    assert "operators in" in done.stdout


@pytest.mark.parametrize(
    ("sanitizer", "planted", "report"),
    [
        (MEMORY, BEYOND, "AddressSanitizer: heap-buffer-overflow"),
        (THREADS, SHARED, "ThreadSanitizer: data race"),
    ],
    ids=["memory", "threads"],
)
def test_a_planted_fault_is_seen(tmp_path, sanitizer, planted, report):
    done = run(tmp_path, sanitizer, "linear", planted=planted)
    assert done.returncode != 0
    assert report in done.stderr
