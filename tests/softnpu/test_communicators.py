"""Communicators without torch, under ThreadSanitizer with a planted race as the canary,
and under AddressSanitizer.
"""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from processes import HERE
from tier import lacking

pytestmark = pytest.mark.long  # the sanitizers' builds take minutes
ROOT = HERE.parents[1]
SOURCES = [
    HERE / "collectives_test.cpp",
    *(
        ROOT / "csrc/softnpu/acl" / f"{name}.cpp"
        for name in ("report", "faults", "fork", "config", "memory")
    ),
    *(
        path
        for path in sorted((ROOT / "csrc/softnpu/hccl").glob("*.cpp"))
        if not path.name.startswith("api")
    ),
]


@pytest.fixture(scope="module", params=["thread", "address"])
def binary(request, tmp_path_factory):
    if shutil.which("g++") is None:
        lacking("g++ is not installed")
    folder = tmp_path_factory.mktemp("communicators")
    compile_ = [
        "g++",
        "-std=c++20",
        "-g",
        "-O1",
        f"-fsanitize={request.param}",
        f"-I{ROOT / 'csrc'}",
    ]
    objects = {source: folder / f"{source.stem}.o" for source in SOURCES}
    with ThreadPoolExecutor(2) as pool:
        list(
            pool.map(
                lambda pair: subprocess.run([*compile_, "-c", pair[0], "-o", pair[1]], check=True),
                objects.items(),
            )
        )
    subprocess.run(
        [*compile_, *objects.values(), "-o", folder / "test", "-lpthread", "-lrt"], check=True
    )
    return folder / "test"


def execute(*command):
    first_report_ends_it = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run(
        command, env=first_report_ends_it, capture_output=True, text=True, timeout=240
    )


def test_communicators_have_no_fault(binary):
    done = execute(binary)
    assert (
        done.returncode == 0
        and "collectives good" in done.stdout
        and "Sanitizer" not in done.stderr
    ), done.stderr


@pytest.mark.parametrize("binary", ["thread"], indirect=True)
def test_planted_race_is_reported(binary):
    done = execute(binary, "race")
    assert "ThreadSanitizer: data race" in done.stderr, done.stderr
