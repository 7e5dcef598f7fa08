"""ci/setup installs what changed, and nothing else; softnpu only for tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE, SOFTNPU = "--editable .", "--editable ./csrc/softnpu"
FILES = (
    *("setup.py", "csrc/cpu/kernel.h", "csrc/bind/kernel.cpp"),
    *(f"csrc/softnpu/{name}" for name in ("setup.py", "pyproject.toml", "softnpu_build.py")),
    *(f"csrc/softnpu/{folder}/part.cpp" for folder in ("acl", "hccl", "opapi", "vendors")),
)
"""A change of one of them is a reason to install its distribution again."""

BUILT = ("backend/dsv4_backend/_C.x.so", "csrc/softnpu/python/softnpu/lib/libopapi.so")
IGNORED = (
    *BUILT,
    *(f"csrc/softnpu/{name}" for name in ("README.md", "python/softnpu/device.py", "build/part.o")),
)


class Checkout:
    """Sources, and an environment whose Python writes down what pip is asked for."""

    def __init__(self, root):
        self.root = root
        (root / "ci").mkdir()
        shutil.copy(ROOT / "ci" / "setup", root / "ci")
        shutil.copy(ROOT / "pyproject.toml", root)
        for name in (*FILES, *IGNORED):
            self.change(name)
        python = root / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(
            f'#!/bin/sh\n[ "$1" = - ] && exec "{sys.executable}" "$@"\necho "$@" >>"{root}/calls"\n'
            'case "$*" in *"$FAILING") exit 1 ;; esac\n'
        )
        python.chmod(0o755)

    def change(self, name):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write("changed\n")

    def setup(self, *extras, failing="nothing"):
        """What `ci/setup EXTRAS` installs, in order."""
        (self.root / "calls").write_text("")
        environ = {**os.environ, "FAILING": failing}
        done = subprocess.run(
            [self.root / "ci" / "setup", *extras], env=environ, capture_output=True, text=True
        )
        assert (done.returncode == 0) == (failing == "nothing"), done.stderr
        calls = (self.root / "calls").read_text().splitlines()
        return [call[call.index("--editable") :] for call in calls if "--editable" in call]


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def test_softnpu_is_for_tests_only(checkout):
    assert checkout.setup() == [PACKAGE]
    assert checkout.setup() == []
    assert checkout.setup("test") == [f"{PACKAGE}[test]", SOFTNPU]
    assert checkout.setup("test") == checkout.setup() == []


def test_only_what_changed_is_installed_again(checkout):
    checkout.setup("test")
    for name in (*FILES, *IGNORED):
        checkout.change(name)
        changed = SOFTNPU if name.startswith("csrc/softnpu/") else f"{PACKAGE}[test]"
        assert checkout.setup("test") == ([] if name in IGNORED else [changed]), name
        assert checkout.setup("test") == [], name


def test_a_renamed_source_is_a_change(checkout):
    checkout.setup("test")
    source = checkout.root / "csrc" / "softnpu" / "opapi" / "part.cpp"
    source.rename(source.with_name("other.cpp"))
    assert checkout.setup("test") == [SOFTNPU]


@pytest.mark.parametrize(
    ("gone", "installed"), [(BUILT[0], [f"{PACKAGE}[test]"]), (BUILT[1], [SOFTNPU])]
)
def test_a_library_that_is_gone_is_built_again(checkout, gone, installed):
    checkout.setup("test")
    (checkout.root / gone).unlink()
    assert checkout.setup("test") == installed


@pytest.mark.parametrize("failing", [f"{PACKAGE}[test]", SOFTNPU])
def test_what_failed_is_tried_again(checkout, failing):
    checkout.setup("test", failing=failing)
    again = checkout.setup("test")
    assert again == ([SOFTNPU] if failing == SOFTNPU else [f"{PACKAGE}[test]", SOFTNPU])
