"""Every command line that the README files and docs/ show works as it stands;
model commands on cpu and on npu.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import tier
import typer

from dsv4_ascend.cli import main as command
from dsv4_ascend.parity.report import Selection
from dsv4_ascend.parity.runner import samples

ROOT = Path(__file__).parents[1]
SOFTNPU = ROOT / "csrc" / "softnpu"
FOLDERS = (ROOT / "docs", SOFTNPU / "docs")
PAGES = [
    ROOT / "README.md",
    SOFTNPU / "README.md",
    *sorted(p for folder in FOLDERS for p in folder.rglob("*.md")),
]
COMMAND = re.compile(
    r"(?:dsv4-ascend|softnpu|python3?|pip|torchrun|pytest) .+|(?:\./)?ci/\w+(?: .+)?"
)
SHELL = {"sh", "bash", "shell", "console"}
IN_A_COMMENT = re.compile(r"\((\./ci/[^)]+)\)")
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)

BUNDLE = "bundle.safetensors"
"""A file there that is no text."""

HARDWARE = "--device npu"
"""Lines with it, not under softnpu, are for a machine with a card."""

FILES = {
    "your_script.py": "import torch\nprint((torch.ones(3, device='npu') + 1).sum().item())\n",
    "ids.json": "[0, 259, 17, 4]",
}
"""What the folder holds in which a user types the lines."""

PLACEHOLDERS = {"COMMAND": "python your_script.py"}
MODEL_COMMANDS = {"generate": "", "logits": "", "parity": "-k rms_norm"}
"""Commands with --device, and what makes their run on npu a short one."""


class Elsewhere(NamedTuple):
    """Why a line is not run here, and the file that runs it, with the text that shows it."""

    reason: str
    file: str
    text: str


PYTEST_IN_CI = Elsewhere(
    "it runs this test's run", "ci/test", '-m pytest -n 2 --dist worksteal "$@"'
)
SCAFFOLD_TEST = "tests/python/test_new_operator.py"

LONG = (
    "dsv4-ascend parity --faults",  # the same faults: tests/backend/test_mutation_score.py
    "dsv4-ascend ops --docs docs/operators",  # the same pages: tests/python/test_operator_docs.py
    "dsv4-ascend bench --suite host",
    # The same on forks: tests/python/test_cli_ranks.py, tests/softnpu/test_several_ranks.py.
    "torchrun --standalone --nproc-per-node 2 -m dsv4_ascend logits --input-ids ids.json "
    "--output logits.safetensors --dp 2",
    "dsv4-ascend softnpu --devices 2 -- torchrun --standalone --nproc-per-node 2 -m dsv4_ascend "
    "generate --device npu --max-new-tokens 4",
)
"""Lines that work for many seconds: in the long tier."""

ELSEWHERE = {
    "./ci/demo": Elsewhere("it makes an environment", "ci/demo", ".venv/bin/dsv4-ascend generate"),
    "./ci/test": Elsewhere("it runs this test", ".ci/run", "/../ci/test"),
    "./ci/serve": Elsewhere("it makes an environment", "ci/test", "ci/serve --install"),
    "ci/aarch64": Elsewhere("it emulates a machine", "tests/test_aarch64.py", '"ci/aarch64"'),
    "./ci/test --long": PYTEST_IN_CI,
    "python -m vllm.entrypoints.openai.api_server --model FOLDER --enforce-eager "
    "--tool-call-parser deepseek_v4 --enable-auto-tool-choice --reasoning-parser deepseek_v4": (
        Elsewhere("it serves", "ci/serve", "-m vllm.entrypoints.openai.api_server --model")
    ),
    "./ci/test -k rope": PYTEST_IN_CI,
    "./ci/test tests/softnpu": PYTEST_IN_CI,
    "python -m pytest tests/backend -k markov_bias": PYTEST_IN_CI,
    "python -m pytest tests/backend/test_cpu_kernels.py -k rms_norm": PYTEST_IN_CI,
    "python -m pytest --long tests/backend/test_sanitized_kernels.py": PYTEST_IN_CI,
    "python -m pytest tests/softnpu/test_launchers.py": PYTEST_IN_CI,
    "python -m pytest tests/test_readme.py tests/test_citations.py "
    "tests/python/test_operator_docs.py": PYTEST_IN_CI,
    "dsv4-ascend ops new NAME": Elsewhere(
        "it writes into a checkout", SCAFFOLD_TEST, "def test_a_skeleton_is_clean"
    ),
    "dsv4-ascend ops new markov_bias --family dspark "
    '--schema "markov_bias(Tensor logits, Tensor previous, Tensor markov_w1, '
    'Tensor markov_w2) -> Tensor"': Elsewhere(
        "it writes into a checkout", SCAFFOLD_TEST, "def test_the_walk_through_prints_what_it_says"
    ),
    "./ci/setup test": Elsewhere("it makes this environment", "ci/test", "ci/setup test"),
    "pip install torch==2.13.0": Elsewhere("it installs", "pyproject.toml", '"torch==2.13.0"'),
    "pip install --no-build-isolation .": Elsewhere(
        "it installs", "ci/setup", "--no-build-isolation --editable"
    ),
    'pip install --no-deps --target "$VIRTUAL_ENV/npu" torch-npu==2.13.0': Elsewhere(
        "it installs", "ci/setup", '--no-deps --target .venv/npu "${npu[@]}"'
    ),
    "pip install ./csrc/softnpu": Elsewhere("it installs", "ci/setup", "--editable ./csrc/softnpu"),
    "python csrc/softnpu/softnpu_build.py": Elsewhere(
        "it builds", "csrc/softnpu/setup.py", "from softnpu_build import"
    ),
    **dict.fromkeys(
        (
            "softnpu -- python csrc/softnpu/tools/public_tests.py LIST results.tsv FOLDER "
            "cv4_a2 unskip_a2",
            "softnpu --soc Ascend950PR_9599 -- python csrc/softnpu/tools/public_tests.py "
            "LIST results.tsv FOLDER cv4_a5 unskip_a5",
        ),
        Elsewhere(
            "it needs others' repositories", "csrc/softnpu/docs/public-tests.md", "Unpack the three"
        ),
    ),
    "softnpu --vendor mine -- python your_script.py": Elsewhere(
        "it needs a library of yours", "tests/softnpu/test_vendors.py", "vendor=str(outside)"
    ),
    "pip install transformers==5.23.0 accelerate==1.15.0": Elsewhere(
        "it installs", "pyproject.toml", '"accelerate==1.15.0"'
    ),
    "dsv4-ascend bench --suite transformers --rounds 3": Elsewhere(
        "minutes of eager attention",
        "tests/python/integrations/test_transformers_folder.py",
        "transformers_models(2, TINY",
    ),
    "dsv4-ascend train-tiny": Elsewhere(
        "52 minutes", "tests/python/tiny/test_tiny.py", 'main(["train-tiny", *options])'
    ),
}


def shown_by(page: str) -> list[str]:
    """Command lines of a page: in fenced shell blocks, in the comments there, and in backticks."""
    blocks = [
        (language in SHELL, block)
        for language, block in FENCE.findall(page)
        if language in SHELL | {""}
    ]
    found = [line for shell, block in blocks for line in lines_of(block, shell)]
    return found + [
        text for text in re.findall(r"`([^`\n]+)`", FENCE.sub("", page)) if COMMAND.fullmatch(text)
    ]


def lines_of(block: str, shell: bool) -> list[str]:
    """What a block tells to type;
    in a block that names no language only what looks like a command.
    """
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        text, _, comment = line.strip().removeprefix("$ ").partition(" #")
        if text and (shell or COMMAND.fullmatch(text.strip())):
            found.append(text.strip())
        found += IN_A_COMMENT.findall(comment)
    return found


def documented() -> dict[str, list[str]]:
    """Every command line with the pages that show it."""
    lines: dict[str, list[str]] = {}
    for page in PAGES:
        for line in shown_by(page.read_text(encoding="utf-8")):
            lines.setdefault(line, []).append(page.name)
    return lines


DOCUMENTED = documented()
ON_HARDWARE = [
    line
    for line in DOCUMENTED
    if line.startswith("dsv4-ascend") and HARDWARE in line and "softnpu" not in line
]
RANKS_ON_HARDWARE = [
    line for line in DOCUMENTED if line.startswith("torchrun") and HARDWARE in line
]
HERE = sorted(set(DOCUMENTED) - {*ELSEWHERE, *ON_HARDWARE, *RANKS_ON_HARDWARE})
MODEL_LINES = [
    line
    for line in DOCUMENTED
    if line.split()[0] == "dsv4-ascend"
    and line.split()[1] in MODEL_COMMANDS
    and not {"--device", "--replay"} & set(line.split())
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    type_in(f"dsv4-ascend parity -k rms_norm/ --record {BUNDLE}", folder)
    type_in("dsv4-ascend convert tiny int8 --target a2a3-int8", folder)
    return folder


@functools.cache
def type_in(line: str, folder: Path) -> str:
    """What a line prints in a shell whose PATH leads to this environment; it must succeed."""
    if "softnpu" in line and (what := tier.missing()):
        tier.lacking(what)
    unset = ("PYTHONPATH", "LD_LIBRARY_PATH", "TORCH_DEVICE_BACKEND_AUTOLOAD")
    environ = {name: value for name, value in os.environ.items() if name not in unset}
    environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environ["PATH"]])
    shell = ["bash", "-c", line]
    done = subprocess.run(
        shell, cwd=folder, env=environ, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize(
    "line", [pytest.param(x, marks=pytest.mark.long) if x in LONG else x for x in HERE]
)
def test_a_documented_line_works(line: str, folder: Path) -> None:
    for placeholder, text in PLACEHOLDERS.items():
        line = line.replace(placeholder, text)
    printed = type_in(line, folder)
    assert printed or "--output" in line, line


@pytest.mark.parametrize("line", [*ON_HARDWARE, *RANKS_ON_HARDWARE])
def test_a_line_for_hardware_is_understood(line: str) -> None:
    """Its options are those of the command, and its pattern finds a case."""
    typed = re.sub(r"^(dsv4-ascend|torchrun .*-m dsv4_ascend) ", "", line)
    name, *options = shlex.split(typed)
    app = typer.Typer()
    app.command()(command._load(command.COMMANDS[name][0]))
    chosen = typer.main.get_command(app).make_context(name, options).params
    if name == "parity":
        selection = Selection(chosen["pattern"])
        assert any(
            next(samples(operator, pattern=selection.part), None)
            for operator in selection.operators()
        ), line


@pytest.mark.long
@pytest.mark.parametrize("soc", ["Ascend910_9391", "Ascend950PR_9599"])
def test_lines_for_hardware_work_on_the_software_device(soc: str, folder: Path) -> None:
    program = (
        "import shlex\nfrom dsv4_ascend.cli.main import main\n"
        f"for line in {ON_HARDWARE!r}:\n"
        "    try:\n        main(shlex.split(line)[1:])\n"
        "    except SystemExit as left:\n        assert left.code == 0, line\n"
    )
    assert type_in(f"softnpu --soc {soc} -- python -c {shlex.quote(program)}", folder)


@pytest.mark.parametrize(
    "line",
    # One of a command's lines says what its others do.
    [
        line
        if line == next(x for x in MODEL_LINES if x.split()[1] == line.split()[1])
        else pytest.param(line, marks=pytest.mark.long)
        for line in MODEL_LINES
    ],
)
def test_a_model_command_works_on_npu(line: str, folder: Path) -> None:
    short = MODEL_COMMANDS[line.split()[1]]
    printed = type_in(f"dsv4-ascend softnpu -- {line} --device npu {short}".strip(), folder)
    assert printed or "--output" in line, line


def test_every_line_that_runs_elsewhere_does() -> None:
    listed = {*ELSEWHERE, *LONG}
    assert listed <= set(DOCUMENTED), listed - set(DOCUMENTED)
    for line, (reason, file, text) in ELSEWHERE.items():
        assert reason
        assert text in (ROOT / file).read_text(encoding="utf-8"), (
            f"{line}: {file} no longer shows {text}"
        )


def test_model_commands_are_documented() -> None:
    assert {line.split()[1] for line in MODEL_LINES} == set(MODEL_COMMANDS)


@pytest.mark.parametrize(
    ("page", "lines"),
    [
        ("```\ndsv4-ascend a  # does b\nfile.txt\n```", ["dsv4-ascend a"]),
        ("```\n./ci/test    # or more (./ci/test -k x)\n```", ["./ci/test", "./ci/test -k x"]),
        ("```bash\n$ nonsense \\\n  --option\n```", ["nonsense    --option"]),
        ("```python\nprint('dsv4-ascend x')\n```", []),
        (
            "| `dsv4-ascend x --y` | says `python` |\nand `pip install z`",
            ["dsv4-ascend x --y", "pip install z"],
        ),
        ("`dsv4_ascend.load` of `ci/setup`", ["ci/setup"]),
    ],
)
def test_lines_are_found(page: str, lines: list[str]) -> None:
    assert shown_by(page) == lines
