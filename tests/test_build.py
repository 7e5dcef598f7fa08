"""Building: a failure is loud, a broken device backend does not matter,
and packages are complete.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD_WHEEL = "import sys, setuptools.build_meta as backend; backend.build_wheel(sys.argv[1])"


@pytest.fixture
def tree(tmp_path):
    """The project without its C++ sources: a build of what a test puts there."""
    target = tmp_path / "tree"
    target.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    for name in ("backend", "python"):
        shutil.copytree(
            ROOT / name, target / name, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    (target / "csrc" / "cpu").mkdir(parents=True)
    (target / "csrc" / "bind").mkdir()
    (target / "csrc" / "bind" / "precompiled.h").touch()
    return target


def run(tree, *command, **environment):
    env = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, *command], cwd=tree, env=env, capture_output=True, text=True, timeout=300
    )


def build_wheel(tree, source, **environment):
    (tree / "csrc" / "cpu" / "kernel.cpp").write_text(source)
    done = run(tree, "-c", BUILD_WHEEL, str(tree), **environment)
    return done, list(tree.glob("*.whl"))


def test_a_kernel_that_does_not_compile_fails_the_build(tree):
    done, wheels = build_wheel(tree, "#error this kernel is broken\n")
    assert done.returncode != 0
    assert "this kernel is broken" in done.stdout + done.stderr
    assert not wheels


def test_the_only_library_of_the_wheel_is_the_extension(tree):
    """The software Ascend device is a distribution of its own,
    also where an older build left its libraries behind.
    """
    for folder in ("backend/dsv4_backend/softnpu/lib", "csrc/softnpu/python/softnpu/lib"):
        (tree / folder).mkdir(parents=True)
        (tree / folder / "libascendcl.so").touch()
    done, wheels = build_wheel(tree, "int sound;\n")
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(*wheels) as archive:
        names = archive.namelist()
    assert [re.sub(r"_C\..*", "_C", name) for name in names if ".so" in name] == ["dsv4_backend/_C"]
    assert not [
        name for name in names if "softnpu" in name and name != "dsv4_ascend/cli/softnpu.py"
    ]


def test_a_missing_compiler_fails_the_build(tree):
    done, wheels = build_wheel(tree, "int sound;\n", CXX="/nowhere/c++", CC="/nowhere/cc")
    assert done.returncode != 0
    assert "/nowhere/c" in done.stdout + done.stderr
    assert not wheels


def test_a_broken_device_backend_does_not_matter(tree):
    """As torch_npu without CANN: an entry point that torch imports with itself, and that raises."""
    metadata = tree / "site" / "broken_npu-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: broken_npu\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[torch.backends]\nbroken_npu = broken_npu:autoload\n"
    )
    (tree / "site" / "broken_npu.py").write_text(
        "raise ImportError('libascendcl.so: cannot open shared object file')\n"
    )
    world = {"PYTHONPATH": str(tree / "site"), "TORCH_DEVICE_BACKEND_AUTOLOAD": "1"}
    assert "libascendcl.so" in run(tree, "-c", "import torch", **world).stderr
    done = run(tree, "setup.py", "--version", **world)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", done.stdout.split()[-1])


def test_packages_are_complete(tree):
    done = run(tree, "setup.py", "--quiet", "build_py", "--build-lib", "packed")
    assert done.returncode == 0, done.stderr
    packed = {
        path.relative_to(tree / "packed") for path in (tree / "packed").rglob("*") if path.is_file()
    }
    tracked = subprocess.run(
        ["git", "ls-files", "backend", "python"], cwd=ROOT, capture_output=True, text=True
    )
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    wanted = {Path(*Path(line).parts[1:]) for line in tracked.stdout.splitlines()}
    assert packed >= wanted, sorted(map(str, wanted - packed))
