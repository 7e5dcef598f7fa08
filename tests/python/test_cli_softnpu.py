"""`dsv4-ascend softnpu` hands over to the distribution of that name,
and says how to install it where it is missing.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from dsv4_ascend.cli import softnpu as handover

ROOT = Path(__file__).parents[2]
MAIN = "sys.argv[0] = 'dsv4-ascend'\nfrom dsv4_ascend.cli.main import main\nmain(sys.argv[1:])"
FAKE = """
from softnpu.errors import SoftnpuError
def call(arguments, name):
    print(name, arguments)
    if arguments == ["fails"]:
        raise SoftnpuError("no such thing")
    raise SystemExit(7)
"""


def run(prelude, *arguments, path=""):
    command = [sys.executable, "-c", f"import sys\n{prelude}\n{MAIN}", *arguments]
    done = subprocess.run(
        command, cwd="/", env={"PYTHONPATH": str(path)}, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def fake(tmp_path):
    """A package softnpu that writes down what it gets;
    torch must not be imported before it does.
    """
    folder = tmp_path / "softnpu"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "errors.py").write_text("class SoftnpuError(Exception):\n    pass\n")
    (folder / "command.py").write_text(f"import sys\nassert 'torch' not in sys.modules\n{FAKE}")
    return folder


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["--soc", "X", "--", "python", "--help"], ["ls", "--", "-l"]]
)
def test_everything_is_handed_over(fake, arguments):
    code, out, err = run("", "softnpu", *arguments, path=fake.parent)
    assert (code, out, err) == (7, f"dsv4-ascend softnpu {arguments}\n", "")


def test_what_softnpu_complains_about_is_an_environment_fault(fake):
    code, _, err = run("", "softnpu", "fails", path=fake.parent)
    assert code == 3
    assert (
        err == "dsv4-ascend: no such thing. `dsv4-ascend doctor` looks at the whole environment\n"
    )


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--", "python", "x.py"]])
def test_without_softnpu_it_says_how_to_install_it(arguments):
    code, out, err = run("sys.modules['softnpu'] = None", "softnpu", *arguments)
    assert (code, out) == (3, "")
    assert f"is not installed: pip install {ROOT}/csrc/softnpu (" in err
    assert len(err.splitlines()) == 1


def test_a_folder_of_that_name_is_not_softnpu():
    prelude = (
        "import types\nsys.modules['softnpu'] = "
        "types.ModuleType('softnpu')\nsys.modules['softnpu'].__path__ = []"
    )
    code, _, err = run(prelude, "softnpu", "ls")
    assert code == 3
    assert "is not installed: pip install" in err


def test_away_from_a_checkout_the_advice_names_one(monkeypatch, tmp_path):
    monkeypatch.setattr(handover, "SOURCES", tmp_path)
    assert "pip install ./csrc/softnpu in a checkout of dsv4-ascend" in handover.how_to_install()
    spaced = tmp_path / "my checkout"
    spaced.mkdir()
    (spaced / "pyproject.toml").touch()
    monkeypatch.setattr(handover, "SOURCES", spaced)
    assert f"pip install '{spaced}' (" in handover.how_to_install()


def test_a_broken_softnpu_is_said(fake):
    (fake / "command.py").write_text("import no_such_module_of_softnpu\n")
    code, _, err = run("", "softnpu", "ls", path=fake.parent)
    assert code == 3
    assert "softnpu does not load: No module named 'no_such_module_of_softnpu'" in err
    assert "Traceback" not in err


def test_options_before_it_are_those_of_dsv4_ascend():
    code, out, _ = run("sys.modules['softnpu'] = None", "--help", "softnpu")
    assert code == 0
    assert "train-tiny" in out
