"""Broken environments: importing works, the CPU works, and doctor names the fault."""

import importlib.machinery
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import dsv4_backend

TORCH = torch.__version__.split("+")[0]
EXTENSION = f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"
NO_CANN = """
import os
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # as torch_npu does
raise ImportError("libascendcl.so: cannot open shared object file: No such file or directory")
"""
OTHER_TORCH = "raise ImportError('libtorch_npu.so: undefined symbol: _ZN3c1010TensorImplE')\n"

PROGRAM = """
import os, sys
before = dict(os.environ)
import dsv4_ascend, dsv4_ascend.parity, dsv4_ascend.model
import torch
normed = torch.ops.dsv4.rms_norm(torch.full((2, 4), 3.0), torch.ones(4), 0.0)
assert torch.equal(normed, torch.ones(2, 4))
assert dict(os.environ) == before
from dsv4_ascend.cli.main import main
main(["doctor", "--json"])
"""


@dataclass
class World:
    """A place to start Python in."""

    site: Path
    environ: dict[str, str] = field(default_factory=dict)
    cwd: Path | None = None

    def install_torch_npu(self, version, init):
        """A fake wheel with torch_npu's autoload entry point."""
        package = self.site / "torch_npu"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(init)
        metadata = self.site / f"torch_npu-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: torch-npu\nVersion: {version}\n"
        )
        (metadata / "entry_points.txt").write_text(
            "[torch.backends]\ntorch_npu = torch_npu:_autoload\n"
        )
        return package

    def install_cann(self, name, version):
        """A folder as CANN's installer leaves it, with a library that loads;
        returns its folder of libraries.
        """
        home = self.site / name
        (home / "lib64").mkdir(parents=True)
        (home / "version.info").write_text(f"Version={version}\n")
        shutil.copy(importlib.util.find_spec("_ctypes").origin, home / "lib64" / "libascendcl.so")
        return home / "lib64"

    def run(self, program):
        environ = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("ASCEND", "TORCH_DEVICE", "LD_LIBRARY"))
        }
        environ |= {"PYTHONPATH": str(self.site)} | self.environ
        command = [sys.executable, "-c", program]
        return subprocess.run(
            command, cwd=self.cwd, env=environ, capture_output=True, text=True, timeout=120
        )

    def doctor(self):
        """Exit code and findings of doctor, after imports and an operator have worked."""
        done = self.run(PROGRAM)
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout)["findings"]


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "site")


def found(findings, subject, state):
    """The only finding of a subject in a state, as one text."""
    texts = [
        f"{f['found']} {f['advice']}"
        for f in findings
        if (f["subject"], f["state"]) == (subject, state)
    ]
    assert len(texts) == 1, findings
    return texts[0]


def test_no_torch_npu(world):
    code, findings = world.doctor()
    assert code == 0
    assert f"pip install torch-npu=={TORCH}" in found(findings, "torch_npu", "note")


def test_torch_npu_without_cann(world):
    world.install_torch_npu(TORCH, NO_CANN)
    code, findings = world.doctor()
    assert code == 1
    text = found(findings, "torch_npu", "problem")
    assert "libascendcl.so: cannot open shared object file" in text
    assert "set_env.sh" in text
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in found(findings, "autoload", "warning")
    assert "LD_LIBRARY_PATH" in found(findings, "libascendcl.so", "problem")


def test_wrong_torch_npu(world):
    world.install_torch_npu("2.9.0.post1", "def _autoload(): pass\n")
    code, findings = world.doctor()
    assert code == 1
    text = found(findings, "torch_npu", "problem")
    assert "built for torch 2.9.0" in text
    assert f"pip install torch-npu=={TORCH}" in text


def test_torch_npu_with_corrupt_library(world):
    package = world.install_torch_npu(TORCH, "from torch_npu import _C\n")
    (package / EXTENSION).write_bytes(b"\x7fELF")
    code, findings = world.doctor()
    assert code == 1
    text = found(findings, "torch_npu", "problem")
    assert "file too short" in text
    assert "--force-reinstall" in text


def test_torch_npu_for_another_torch(world):
    world.install_torch_npu(TORCH, OTHER_TORCH)
    code, findings = world.doctor()
    assert code == 1
    text = found(findings, "torch_npu", "problem")
    assert "undefined symbol" in text
    assert "--force-reinstall" in text


def test_own_library_corrupt(world):
    package = Path(dsv4_backend.__file__).parent
    shutil.copytree(
        package, world.site / "dsv4_backend", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    (world.site / "dsv4_backend" / EXTENSION).write_bytes(b"\x7fELF")
    done = world.run(PROGRAM)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "dsv4_backend._C does not load" in last
    assert "file too short" in last
    assert "pip install --force-reinstall" in last


@pytest.mark.parametrize(
    "older",
    [
        "_C.TensorRule = _C.ScalarRule",  # takes other arguments
        "del _C.ScalarRule",
        *(
            pytest.param(change, marks=pytest.mark.long)
            for change in ("del _C.Policy", "_C.define = _C.forget_ran")
        ),
    ],
)
@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("import dsv4_backend", 1),
        ("sys.argv[0] = 'dsv4-ascend'; from dsv4_ascend.cli.main import main; main(['ops'])", 3),
    ],
)
def test_own_library_of_another_commit(older, program, code):
    """A library that is loaded already, as an older commit might have built it."""
    load = (
        "import importlib.util, sys, torch\n"
        "package = importlib.util.find_spec('dsv4_backend')\n"
        "sys.modules['dsv4_backend'] = importlib.util.module_from_spec(package)\n"
        "import dsv4_backend._C as _C\n"
        "del sys.modules['dsv4_backend']\n"
    )
    command = [sys.executable, "-c", f"{load}{older}\n{program}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert code == 1 or len(done.stderr.splitlines()) == 1
    last = done.stderr.strip().splitlines()[-1]
    assert f"dsv4_backend._C is stale: {dsv4_backend._C.__file__} was built from other" in last
    assert "./ci/setup, or pip install --no-build-isolation -e ." in last
    assert "force-reinstall" not in last


def test_home_is_no_folder(world):
    world.environ["HOME"] = "/dev/null/home"
    code, findings = world.doctor()
    assert code == 0
    assert "/dev/null/home" in found(findings, "HOME", "warning")


def test_current_folder_is_read_only(world):
    world.cwd = Path("/proc/self")
    code, findings = world.doctor()
    assert code == 0
    assert "absolute path" in found(findings, "current folder", "warning")


def test_two_cann_versions(world):
    first, second = (
        world.install_cann("cann-9.1.0", "9.1.0"),
        world.install_cann("cann-8.5.0", "8.5.0"),
    )
    world.environ = {"LD_LIBRARY_PATH": f"{first}:{second}", "ASCEND_HOME_PATH": str(second.parent)}
    code, findings = world.doctor()
    assert code == 0
    text = found(findings, "CANN", "warning")
    assert "2 installations; the loader picks 9.1.0" in text
    assert "set_env.sh" in text
    assert found(findings, "libascendcl.so", "ok")


def test_cann_home_that_does_not_exist(world):
    world.environ["ASCEND_HOME_PATH"] = "/nowhere/cann"
    code, findings = world.doctor()
    assert code == 1
    assert "ASCEND_HOME_PATH=/nowhere/cann is not a folder" in found(findings, "CANN", "problem")


def test_autoload_switched_off(world):
    world.install_torch_npu(TORCH, NO_CANN)
    world.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    _, findings = world.doctor()
    assert "torch_npu is not loaded" in found(findings, "autoload", "warning")
