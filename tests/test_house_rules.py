"""The rules of the house that no linter knows: sizes, C++ include directions,
and what must never be called.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
SOFTNPU = CSRC / "softnpu"
PACKAGES = (ROOT / "backend", ROOT / "python", SOFTNPU / "python")
CODE = sorted(path for folder in PACKAGES for path in folder.rglob("*.py"))
BUILDS = [ROOT / "setup.py", SOFTNPU / "setup.py", SOFTNPU / "softnpu_build.py"]
PYTHON = [*CODE, *sorted((ROOT / "tests").rglob("*.py")), *BUILDS]
INSTALLED = SOFTNPU / "python" / "softnpu" / "lib"  # copies of headers among them
CPP = sorted(
    path
    for path in CSRC.rglob("*")
    if path.suffix in {".h", ".hpp", ".cpp"} and not path.is_relative_to(INSTALLED)
)
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

PYTHON_HEADER = re.compile(r"^(torch|pybind11)/|^Python\.h$")
TORCH_HEADER = re.compile(r"^(ATen|c10)/")
# Folder -> the project's own folders that it may include besides itself.
MAY_INCLUDE = {
    "common": set(),
    "cpu": {"common"},
    "npu": {"common"},
    "softnpu": set(),
    "bind": {"common", "cpu", "npu"},
}
# The software device computes with torch's own kernels; its runtime and its collectives do not
# know torch.
MAY_SEE_TORCH = ("bind/", "softnpu/opapi/", "softnpu/vendors/")

# Calls that execute what they are given, or open formats that can.
BANNED_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "marshal",
    "shelve",
    "joblib",
    "yaml",
}
BANNED_BUILTINS = {"eval", "exec", "compile", "__import__"}
BANNED_CALLS = {
    "torch.load",
    "torch.save",
    "torch.jit.load",
    "torch.hub.load",
    "numpy.load",
    "np.load",
    "os.system",
}


def relative(path):
    return str(path.relative_to(ROOT))


def parse(path):
    return ast.parse(path.read_text(), filename=str(path))


def dotted(node):
    """`a.b.c` of an attribute chain, or an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    prefix = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{prefix}.{node.attr}" if prefix else ""


def includes(text):
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', text, re.MULTILINE)


def banned(tree):
    """Line and name of everything that BANNED_* forbids."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [
                alias.name for alias in node.names if alias.name.split(".")[0] in BANNED_MODULES
            ]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names]
            found = (
                [module]
                if module.split(".")[0] in BANNED_MODULES
                else [n for n in names if n in BANNED_CALLS]
            )
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            found = [name] if name in BANNED_BUILTINS | BANNED_CALLS else []
            found += [f"{name}({k.arg}=True)" for k in node.keywords if allows_code(k)]
        else:
            found = []
        yield from ((node.lineno, name) for name in found)


def allows_code(keyword):
    return keyword.arg in {"trust_remote_code", "allow_pickle", "shell"} and not (
        isinstance(keyword.value, ast.Constant) and keyword.value.value is False
    )


def test_files_are_short():
    long = {
        relative(p): n
        for p in [*PYTHON, *CPP]
        if (n := len(p.read_text().splitlines())) > MAX_FILE_LINES
    }
    assert not long


def test_functions_are_short():
    long = [
        f"{relative(path)}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for path in PYTHON
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert not long


# What it compiles is the project's own source with one edit, never data.
MAY_COMPILE = {"python/dsv4_ascend/parity/mutants.py": {"exec", "compile"}}


def test_nothing_that_executes_data_is_called():
    found = [
        f"{relative(path)}:{line} {name}"
        for path in CODE
        for line, name in banned(parse(path))
        if name not in MAY_COMPILE.get(relative(path), ())
    ]
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import yaml",
        "torch.load(path)",
        "from torch import load",
        "eval(text)",
        "exec(text)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(command, shell=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=flag)",
    ],
)
def test_the_ban_sees(code):
    assert list(banned(ast.parse(code)))


def may_include(place, header):
    """Whether the file at `place` in csrc may include `header`."""
    if PYTHON_HEADER.search(header):
        return place.startswith("bind/")
    if TORCH_HEADER.search(header):
        return place.startswith(MAY_SEE_TORCH)
    folder, target = place.split("/")[0], header.split("/")[0]
    if target == "..":
        return False
    return target not in MAY_INCLUDE or target == folder or target in MAY_INCLUDE[folder]


SEEDED = {"manual_seed", "Random", "default_rng", "Draw", "seed", "RandomState"}


def constant_seeds(tree):
    """Lines that seed a source of random numbers with a constant."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in SEEDED and isinstance(node.args[0].value, int):
                yield node.lineno


def test_seeds_of_tests_come_from_names():
    """tests/seeds.py and tests/softnpu/programs/seeds.py: no test owes its success to a constant.

    A source that is looked at twice is numbered there: `generator(3)`.
    """
    tests = [path for path in PYTHON if path.is_relative_to(ROOT / "tests")]
    assert not [f"{relative(p)}:{line}" for p in tests for line in constant_seeds(parse(p))]


@pytest.mark.parametrize(
    ("code", "seen"),
    [
        ("torch.manual_seed(7)", [1]),
        ("random.Random(0).sample(x, 1)", [1]),
        ("x = torch.Generator().manual_seed(seed_of(__name__))", []),
        ("np.random.default_rng(seed('x'))", []),
        ("generator(3)", []),
    ],
)
def test_what_is_a_constant_seed(code, seen):
    assert list(constant_seeds(ast.parse(code))) == seen


def test_include_directions():
    places = {path: path.relative_to(CSRC).as_posix() for path in CPP}
    pairs = [
        (place, header) for path, place in places.items() for header in includes(path.read_text())
    ]
    wrong = [
        f"{place} includes {header}" for place, header in pairs if not may_include(place, header)
    ]
    assert not wrong


def test_every_folder_of_csrc_has_a_rule():
    assert {path.relative_to(CSRC).parts[0] for path in CPP} <= set(MAY_INCLUDE)


def test_softnpu_does_not_know_the_project():
    code = {
        p: re.sub(r"//.*", "", p.read_text()) for p in [*CPP, *PYTHON] if p.is_relative_to(SOFTNPU)
    }
    assert not [relative(path) for path, text in code.items() if "dsv4" in text]


def test_the_umbrella_header_is_never_included():
    heavy = {"torch/all.h", "torch/torch.h", "torch/extension.h", "ATen/ATen.h", "ATen/Functions.h"}
    assert not [relative(p) for p in CPP if heavy & set(includes(p.read_text()))]
