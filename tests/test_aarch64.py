"""The CPU kernels on Arm, where most Ascend hosts are: under qemu-user, in the long tier."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    not (shutil.which("qemu-aarch64") and shutil.which("aarch64-linux-gnu-g++")),
    reason="no qemu-aarch64 or no aarch64-linux-gnu-g++: see ci/aarch64",
)
def test_kernels_and_parity_on_arm():
    ran = subprocess.run([ROOT / "ci/aarch64"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    assert ", 0 failed" in ran.stdout
