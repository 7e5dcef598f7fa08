"""The distribution softnpu: what its build calls, what it leaves alone, what is in its wheel."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOFTNPU = ROOT / "csrc" / "softnpu"
SOURCES = {
    "acl/part.h": "#pragma once\ninline int part() { return 1; }\n",
    "acl/part.cpp": '#include "part.h"\nint acl_part() { return part(); }\n',
    "hccl/part.cpp": "int hccl_part() { return 2; }\n",
    "opapi/part.cpp": '#include "softnpu/acl/part.h"\nint opapi_part() { return part(); }\n',
    "vendors/other/ops.cpp": "int other_part() { return 3; }\n",
}
SHIMS = ("hcomm", "nnopbase", "graph", "ge_runner", "acl_op_compiler", "acl_tdt_channel")
LIBRARIES = {f"lib{name}.so" for name in ("ascendcl", "opapi", "hccl", *SHIMS)}
VENDOR, VENDOR_PARTS = "libcust_opapi.so", {"other/ops.o", "libcust_opapi.so"}
BESIDE = {f"vendors/other/op_api/lib/{VENDOR}", "include/softnpu/acl/part.h"}
RECORDER = '#!/bin/sh\necho "$@" >>"$(dirname "$0")/calls"\nexec "$@"\n'
BUILD_WHEEL = "import sys, setuptools.build_meta as b; getattr(b, sys.argv[1])(sys.argv[2])"


class Tree:
    """The distribution in a folder of another name, with small sources;
    a compiler that writes down its calls.
    """

    def __init__(self, root):
        self.root = root
        root.mkdir()
        for name in ("setup.py", "softnpu_build.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(SOFTNPU / name, root)
        shutil.copytree(
            SOFTNPU / "python",
            root / "python",
            ignore=shutil.ignore_patterns("lib", "__pycache__", "*.egg*"),
        )
        for name, text in SOURCES.items():
            self.write(name, text)
        (root / "record").write_text(RECORDER)
        (root / "record").chmod(0o755)

    def write(self, name, text):
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(text)

    def cxx(self, *arguments):
        return " ".join([f"'{self.root}/record'", "g++", *arguments])

    def calls(self):
        """Lines of the compiler since the last time this was asked."""
        path = self.root / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    def build(self):
        """What a build compiles and links."""
        spec = importlib.util.spec_from_file_location(
            "softnpu_build", self.root / "softnpu_build.py"
        )
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.build()
        return {re.search(r"-o .*?(\w+/\w+\.o|lib\w+\.so)", line)[1] for line in self.calls()}

    def run(self, *command, **environment):
        env = {**os.environ, "CXX": self.cxx(), **environment}
        return subprocess.run(
            [sys.executable, *command],
            cwd=self.root,
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )


@pytest.fixture
def tree(tmp_path, monkeypatch):
    tree = Tree(tmp_path / "odd $name")
    monkeypatch.setenv("CXX", tree.cxx())
    # The build sets it: for this test only.
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    return tree


def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_has_libraries_and_package_and_is_for_every_python(tree):
    done = tree.run("-c", BUILD_WHEEL, "build_wheel", ".")
    assert done.returncode == 0, done.stderr
    (wheel,) = tree.root.glob("*.whl")
    assert re.fullmatch(r"softnpu-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    package = {
        str(path.relative_to(SOFTNPU / "python"))
        for path in (SOFTNPU / "python" / "softnpu").glob("*.py")
    }
    folders = {f"softnpu/{folder}/README" for folder in ("compiler", "runtime")}
    assert names(wheel) == package | folders | {"softnpu/py.typed"} | {
        f"softnpu/lib/{name}" for name in LIBRARIES | BESIDE
    }


def test_an_editable_installation_builds_beside_the_sources(tree):
    done = tree.run("-c", BUILD_WHEEL, "build_editable", ".")
    assert done.returncode == 0, done.stderr
    library = tree.root / "python" / "softnpu" / "lib"
    found = {str(path.relative_to(library)) for path in library.rglob("*") if path.is_file()}
    assert found == LIBRARIES | BESIDE
    (wheel,) = tree.root.glob("*.whl")
    assert not [name for name in names(wheel) if name.endswith(".so")]


def test_only_what_changed_is_built_again(tree):
    parts = {"acl/part.o", "hccl/part.o", "opapi/part.o"}
    assert tree.build() == parts | LIBRARIES | VENDOR_PARTS
    assert tree.build() == set()
    tree.write("opapi/part.cpp", "int opapi_part() { return 3; }\n")
    assert tree.build() == {"opapi/part.o", "libopapi.so", VENDOR}
    tree.write("vendors/other/ops.cpp", "int other_part() { return 4; }\n")
    assert tree.build() == VENDOR_PARTS
    tree.write("hccl/part.cpp", '#include "softnpu/acl/part.h"\n')
    assert {"hccl/part.o", "libhccl.so"} <= tree.build()
    tree.write("acl/part.h", "#pragma once\ninline int part() { return 4; }\n")
    built = tree.build()
    assert {"acl/part.o", "hccl/part.o"} <= built
    assert "opapi/part.o" not in built
    (tree.root / "python" / "softnpu" / "lib" / "libgraph.so").unlink()
    assert tree.build() == {"libgraph.so"}


def test_compiler_and_flags_of_the_environment_are_used(tree, monkeypatch):
    monkeypatch.setenv("CXX", tree.cxx("-DMINE=1"))
    monkeypatch.setenv("CXXFLAGS", "-DALSO='\"$5\"'")
    monkeypatch.setenv("LDFLAGS", "-Wl,--defsym=softnpu_mine=5")
    tree.write(
        "acl/part.cpp",
        "static_assert(MINE == 1 && sizeof(ALSO) == 3 && ALSO[0] == '$', \"flags\");\n",
    )
    assert tree.build() >= LIBRARIES
    libraries = [tree.root / "python" / "softnpu" / "lib" / name for name in LIBRARIES]
    assert all(b"softnpu_mine" in path.read_bytes() for path in libraries)


@pytest.mark.parametrize(
    "compiler", ["/nowhere/c++", "no-such-compiler -O1", "'/no where/g++' -m64"]
)
def test_a_missing_compiler_is_named(tree, monkeypatch, compiler):
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(
        SystemExit, match=r"compiler not found: (/nowhere/c|no-such-compiler|/no where/g).*CXX"
    ):
        tree.build()


def test_a_source_that_does_not_compile_fails_the_build(tree, capfd):
    tree.write("hccl/part.cpp", "#error this one is broken\n")
    with pytest.raises(subprocess.CalledProcessError):
        tree.build()
    printed = capfd.readouterr()
    assert "this one is broken" in printed.out + printed.err
    assert not (tree.root / "python" / "softnpu" / "lib" / "libhccl.so").exists()


def test_both_distributions_are_built_with_one_torch():
    """The libraries are linked against torch's; ours run with older ones too, built for them."""
    pins = [
        re.findall(r'"(torch[=><][^"]+)"', (folder / "pyproject.toml").read_text())
        for folder in (ROOT, SOFTNPU)
    ]
    builds, runs = zip(*pins, strict=True)
    assert len(set(builds)) == 1
    assert [run.partition(",")[2] for run in runs] == ["<2.14", "<2.14"]
