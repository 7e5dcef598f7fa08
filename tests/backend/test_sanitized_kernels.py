"""All contract cases on kernels built with AddressSanitizer and UndefinedBehaviorSanitizer.

Only csrc/cpu is built again; the rest of the extension is linked as it was built. Long tier.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import library_paths

ROOT = Path(__file__).parents[2]
CASES = Path(__file__).parent / "sanitized_cases.py"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# Alignment: rows of a view begin where they begin; unaligned loads are what vectors use.
COMPILE = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fopenmp", *SANITIZE, "-fno-sanitize=alignment"]
# A kernel that reads one row of the weight too many.
PLANTED = "product_rows.h", "const int64_t last = call.n - 1;", "const int64_t last = call.n;"

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def runtime():
    found = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    path = Path(found.stdout.strip())
    if not path.is_absolute():
        pytest.skip("g++ has no AddressSanitizer here")
    return path.resolve()


def build(folder, planted=None):
    """A backend folder whose extension has sanitized kernels."""
    kernels = folder / "csrc" / "cpu"
    shutil.copytree(ROOT / "csrc" / "cpu", kernels)
    if planted is not None:
        name, right, wrong = planted
        text = (kernels / name).read_text()
        assert text.count(right) == 1
        (kernels / name).write_text(text.replace(right, wrong))
    backend = folder / "backend"
    shutil.copytree(ROOT / "backend", backend, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    sources = sorted(kernels.glob("*.cpp"))
    include = [f"-I{folder / 'csrc'}", f"-I{ROOT / 'csrc'}"]

    def compile_one(source):
        target = source.with_suffix(".o")
        subprocess.run(["g++", *COMPILE, *include, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    tree = next(ROOT.glob(f"build/*{sys.implementation.cache_tag}-torch{torch.__version__}"))
    others = [path for path in tree.glob("csrc/*/*.o") if path.parent.name not in ("cpu", "bind")]
    others += tree.rglob("bind_*.o")
    libraries = [f"-L{path}" for path in library_paths()]
    libraries += [f"-l{name}" for name in ("c10", "torch", "torch_cpu", "torch_python")]
    extension = backend / "dsv4_backend" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(
        ["g++", "-shared", *SANITIZE, *objects, *others, *libraries, "-o", extension], check=True
    )
    return backend


def run(backend, runtime, *operators):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(backend), str(ROOT / "python")]),
        "LD_PRELOAD": str(runtime),
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "2",
    }
    return subprocess.run(
        [sys.executable, CASES, *operators],
        env=environment, capture_output=True, text=True, timeout=1500,
    )  # fmt: skip


def test_no_case_reads_or_writes_beyond_its_tensors(tmp_path, runtime):
    done = run(build(tmp_path), runtime)
    assert done.returncode == 0, done.stderr[-6000:]
    assert "operators in" in done.stdout


def test_a_planted_fault_is_seen(tmp_path, runtime):
    done = run(build(tmp_path, PLANTED), runtime, "linear")
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
