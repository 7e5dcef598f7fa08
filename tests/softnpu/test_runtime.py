"""The runtime without torch, under ThreadSanitizer, with a planted race as the canary."""

import shutil
import subprocess

import pytest
from processes import HERE
from tier import lacking

pytestmark = pytest.mark.long  # the sanitizer's build takes minutes
ROOT = HERE.parents[1]


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    if shutil.which("g++") is None:
        lacking("g++ is not installed")
    path = tmp_path_factory.mktemp("softnpu") / "runtime_test"
    sources = [
        HERE / "runtime_test.cpp",
        HERE / "runtime_refusals.cpp",
        *sorted((ROOT / "csrc" / "softnpu" / "acl").glob("*.cpp")),
    ]
    flags = [
        "-std=c++20",
        "-g",
        "-O1",
        "-fsanitize=thread",
        f"-I{ROOT / 'csrc'}",
        "-DSOFTNPU_WINDOW_BYTES=(size_t{4}<<30)",
    ]
    subprocess.run(["g++", *flags, *map(str, sources), "-o", str(path), "-lpthread"], check=True)
    return path


def test_runtime_has_no_race(binary):
    done = subprocess.run([binary], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "runtime good" in done.stdout, done.stderr
    assert "ThreadSanitizer" not in done.stderr


def test_planted_race_is_reported(binary):
    done = subprocess.run([binary, "race"], capture_output=True, text=True, timeout=120)
    assert "ThreadSanitizer: data race" in done.stderr
