"""`dsv4-ascend ops new`: the skeleton loads, fails honestly, and overwrites nothing;
its walk-through is true.
"""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dsv4_ascend.cli.main import COMMANDS, main
from dsv4_backend import OPERATORS
from dsv4_backend.ops.dspark import markov_bias

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "adding-an-operator.md").read_text(encoding="utf-8")
FAMILIES = ("backend/dsv4_backend/ops", "backend/dsv4_backend/proofs")
SCHEMAS = {
    "plain": "new_op(Tensor x) -> Tensor",
    "every type": "new_op(Tensor x, Tensor? w, int k, float eps=1e-6, int? n=None, bool f=False,"
    " str kind='a') -> (Tensor, Tensor)",
    "written": "new_op(Tensor(a!) cache, Tensor rows) -> ()",
    "long": f"new_op({', '.join(f'Tensor argument_number_{i}' for i in range(9))}) -> Tensor",
    "no list": "new_op(Tensor a, float b) -> (Tensor, Tensor, Tensor)",
}


@pytest.fixture
def root(tmp_path):
    for folder in FAMILIES:
        (tmp_path / folder).mkdir(parents=True)
    return tmp_path


@pytest.fixture
def new(root, capsys):
    """Runs `ops new` in an empty checkout; gives (exit code, standard output, standard error)."""

    def call(*arguments):
        with pytest.raises(SystemExit) as left:
            main(["ops", "new", *arguments, "--root", str(root)])
        out, err = capsys.readouterr()
        return left.value.code, out, " ".join(err.replace("│", " ").split())

    return call


@pytest.fixture
def checkout(tmp_path):
    """A copy of the backend without the family `dspark`, and a command in it."""
    lib = shutil.ignore_patterns("lib", "__pycache__", "dspark.py")
    shutil.copytree(ROOT / "backend", tmp_path / "copy" / "backend", ignore=lib)

    def call(*command):
        env = {**os.environ, "PYTHONPATH": str(tmp_path / "copy" / "backend")}
        program = [sys.executable, "-c", "from dsv4_ascend.cli.main import main; main()", *command]
        return subprocess.run(
            program, cwd=tmp_path / "copy", env=env, capture_output=True, text=True, timeout=120
        )

    return call


def commands():
    """(command, printed lines) of every `$` line of the guide."""
    for block in re.findall(r"```\n(\$.*?)```", GUIDE, re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, printed = part.partition("\n")
            yield command, printed.strip("\n")


@pytest.mark.parametrize("kind", SCHEMAS)
def test_a_skeleton_is_clean_code(new, root, kind):
    code, out, _ = new("new_op", "--schema", SCHEMAS[kind], "--family", "fresh")
    assert code == 0
    assert (
        "wrote backend/dsv4_backend/ops/fresh.py\nwrote backend/dsv4_backend/proofs/fresh.py\n"
        in out
    )
    contract, proof = ((root / folder / "fresh.py").read_text() for folder in FAMILIES)
    declared = next(n for n in ast.walk(ast.parse(contract)) if isinstance(n, ast.FunctionDef))
    assert declared.decorator_list[0].args[0].value == SCHEMAS[kind]
    shutil.copy(ROOT / "pyproject.toml", root)
    for module in ("contract", "proofs/numerics"):  # ruff looks for what is imported
        (root / "backend" / "dsv4_backend" / f"{module}.py").write_text('"""Here."""\n')
    for check in (["check"], ["format", "--check"]):
        done = subprocess.run(["ruff", *check, "backend"], cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "new_op.wrong_arguments(" in proof


def test_a_skeleton_repeats_the_defaults_of_its_schema(new, root):
    new("new_op", "--schema", SCHEMAS["every type"])
    text = (root / FAMILIES[0] / "new_op.py").read_text()
    found = re.findall(r"^    (\w+): .* = (.*),$", text, re.MULTILINE)
    assert found == [("eps", "1e-06"), ("n", "None"), ("f", "False"), ("kind", '"a"')]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("rms_norm",), "dsv4::rms_norm is an operator already"),
        (("NewOp",), "'NewOp' is no name"),
        (("lambda",), "'lambda' is no name"),
        (("../escape",), "'../escape' is no name"),
        (("new_op", "--family", "../escape"), "'../escape' is no name"),
        (("new_op", "--schema", "new_op(Tensor x"), "expected ) but found"),
        (("new_op", "--schema", "new_op(Tensr x) -> Tensor"), "Tensr"),
        (("new_op", "--schema", "other(Tensor x) -> Tensor"), "it names 'other', not 'new_op'"),
        (("new_op", "--schema", "new_op.out(Tensor x) -> Tensor"), "it names 'new_op'"),
        (("new_op", "--schema", "new_op(int k) -> Tensor"), "no argument is a Tensor"),
        (("new_op", "--schema", "new_op(Tensor x, *, int k) -> Tensor"), "no '*'"),
        (
            ("new_op", "--schema", "new_op(Tensor x, Dict(str, int) d) -> Tensor"),
            "is not one of the types",
        ),
        (("new_op", "--schema", "new_op(Tensor lambda) -> Tensor"), "'lambda' is a word of Python"),
    ],
)
def test_what_is_no_operator_is_a_usage_error(new, root, arguments, reason):
    code, out, err = new(*arguments)
    assert (code, out) == (2, "")
    assert reason in err
    assert not list(root.rglob("*.py"))


@pytest.mark.parametrize("there", FAMILIES)
def test_nothing_is_overwritten(new, root, there):
    mine = root / there / "new_op.py"
    mine.write_text("mine")
    code, _, err = new("new_op")
    assert code == 2
    assert "exists: choose another --family" in err
    assert [path.read_text() for path in root.rglob("*.py")] == ["mine"]


def test_a_root_that_is_no_checkout(new, root):
    shutil.rmtree(root / FAMILIES[1])
    code, _, err = new("new_op")
    assert code == 2
    assert "name a checkout" in err
    assert not list(root.rglob("*.py"))


def test_the_walk_through_prints_what_it_says(checkout):
    """Scaffold, then the first failing parity run,
    in a copy where the operator is not there yet.
    """
    steps = [(command, printed) for command, printed in commands() if printed][:2]
    assert "ops new markov_bias" in steps[0][0]
    scaffold, first = (checkout(*shlex.split(command)[1:]) for command, _ in steps)
    assert scaffold.returncode == 0, scaffold.stderr
    assert scaffold.stdout.strip() == steps[0][1]
    assert first.returncode == 1, first.stderr
    assert steps[1][1] in first.stdout


@pytest.mark.parametrize(
    ("there", "not_there", "missing"),
    [
        ("@swiglu.oracle", "def _unused(function: object) -> None: ...\n\n\n", "@swiglu.oracle"),
        ("@swiglu_quant.cases", "", "@swiglu_quant.cases"),
        ("swiglu.oracle", "swiglu_quant.oracle", "@swiglu.oracle"),
    ],
)
def test_an_operator_that_is_not_proved_stops_parity(checkout, tmp_path, there, not_there, missing):
    proof = tmp_path / "copy" / FAMILIES[1] / "swiglu.py"
    text = proof.read_text()
    assert there in text
    proof.write_text(text.replace(there, not_there, 1))
    done = checkout("parity", "-k", "swiglu")
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        f"is not proved: no {missing} in backend/dsv4_backend/proofs/swiglu.py; write it as docs/"
        in done.stderr
    )


def test_the_walk_through_shows_the_score(capsys):
    (shown,) = (
        printed
        for command, printed in commands()
        if "--faults" in command and printed.startswith("1 op")
    )
    cases, faults = len(list(markov_bias.iterate_cases())), len(markov_bias.faults)
    score = f"{faults} of {faults} faults killed, mutation score 100.0 %"
    assert shown == f"1 operators, {cases} cases, 0 failed; {score}"


def test_the_walk_through_names_commands_that_exist():
    found = [shlex.split(command) for command, _ in commands()]
    named = {words[1] for words in found if words[0] == "dsv4-ascend"}
    assert {"ops", "parity"} <= named <= set(COMMANDS)
    files = [
        word for words in found for word in words if word.startswith(("tests", "./ci", "docs"))
    ]
    assert len(files) >= 5
    assert not [name for name in files if not (ROOT / name).exists()]
    assert "markov_bias" in OPERATORS


def test_the_walk_through_shows_the_real_code():
    sources = [(ROOT / folder / "dspark.py").read_text() for folder in FAMILIES]
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    assert len(blocks) >= 7
    assert not [block for block in blocks if not any(block in source for source in sources)]
    links = re.findall(r"\]\(([^)]+)\)", GUIDE)
    assert not [link for link in links if not (ROOT / "docs" / link).exists()]


def test_a_family_is_found_by_its_file():
    """Neither ops/__init__.py nor pyproject.toml names a family."""
    families = [path.stem for path in (ROOT / FAMILIES[0]).glob("*.py") if path.stem != "__init__"]
    text = (ROOT / FAMILIES[0] / "__init__.py").read_text() + (ROOT / "pyproject.toml").read_text()
    assert "dspark" in families
    assert not [name for name in families if re.search(rf'"{name}"|\b{name},', text)]
