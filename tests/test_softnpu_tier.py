"""What the tests on the software device do where it is missing: a skip for a person,
a failure in CI.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tier

ROOT = Path(__file__).parents[1]
FILES = len(list((ROOT / "tests" / "softnpu").glob("test_*.py")))
PLUGINS = ["-p", "no:hypothesispytest", "-p", "no:xdist"]  # costly to import
RUN = "import pytest\nsys.exit(pytest.main(['-rs', *sys.argv[1:]]))"

MISSING = {
    "softnpu is not installed": "sys.modules['softnpu'] = None",
    "libno_such.so not in": "import softnpu.settings as s; s.LIBRARIES = "
    "(*s.LIBRARIES, 'libno_such.so')",
    "torch_npu is neither installed nor in /nowhere/npu": "sys.prefix = '/nowhere'",
}
"""What is said -> what makes it so."""


def pytest_run(prelude, *arguments, path=os.environ["PATH"], **variables):
    """(exit code, output) of a pytest with a world of its own."""
    environ = {name: value for name, value in os.environ.items() if name != tier.REQUIRED}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{prelude}\n{RUN}", *PLUGINS, *arguments],
        cwd=ROOT,
        env={**environ, **variables, "PATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


def needs(said):
    """What comes later in the list of MISSING can only be missed
    where the earlier things are there.
    """
    what = tier.missing()
    if what and said != next(iter(MISSING)):
        tier.lacking(what)


@pytest.mark.parametrize("said", MISSING)
def test_a_person_without_it_gets_skips(said):
    needs(said)
    code, output = pytest_run(MISSING[said], "tests/softnpu")
    assert (code, said in output, f"{FILES} skipped" in output) == (0, True, True), output


@pytest.mark.parametrize("said", MISSING)
def test_ci_without_it_fails_and_says_what_is_missing(said):
    needs(said)
    code, output = pytest_run(MISSING[said], "tests/softnpu", SOFTNPU_REQUIRED="1")
    assert (code, "skipped" in output) == (1, False), output
    assert (output.count(said), f"{FILES} failed" in output) == (FILES, True), output


@pytest.mark.parametrize("required", [{}, {tier.REQUIRED: "1"}])
@pytest.mark.parametrize("name", ["test_runtime.py", "test_communicators.py"])
def test_a_missing_compiler_is_one_more_thing(name, required):
    needs("g++")
    code, output = pytest_run(
        "", f"tests/softnpu/{name}", "-x", "--long", path="/nowhere", **required
    )
    assert (code, "g++ is not installed" in output) == (len(required), True), output


@pytest.mark.long
def test_documented_commands_are_of_this_tier():
    line = (
        "tests/test_documented_commands.py::test_a_documented_line_works[python -m softnpu --help]"
    )
    prelude = MISSING["softnpu is not installed"]
    assert pytest_run(prelude, line)[0] == 0
    code, output = pytest_run(prelude, line, SOFTNPU_REQUIRED="1")
    assert (code, "softnpu is not installed" in output) == (1, True), output


def test_tests_of_other_things_may_be_chosen_in_ci():
    """`ci/test -k rope` where the device is missing runs what was asked for."""
    code, output = pytest_run(
        MISSING["softnpu is not installed"],
        "tests/softnpu",
        "tests/test_setup.py",
        "-k",
        "renamed",
        SOFTNPU_REQUIRED="1",
    )
    assert code == 0, output


def test_ci_requires_it():
    assert re.search(
        rf"^export {tier.REQUIRED}=1\b", (ROOT / "ci" / "test").read_text(), re.MULTILINE
    )
