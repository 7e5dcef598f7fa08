"""Operators of other packages than CANN's own: vllm-ascend's, and those that a user builds."""

import os
import re
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from processes import HERE, execute, long, run, started

from softnpu import SOCS, VENDORS, environment, library_folder
from softnpu.errors import ArgumentError
from softnpu.settings import settings

A2, A3, A5 = SOCS
VLLM = VENDORS[0]
OWN_FACTOR = struct.pack("d", 772511.0)
PAGE = HERE.parents[1] / "csrc" / "softnpu" / "docs" / "operators.md"
LIBRARY = Path("op_api", "lib", "libcust_opapi.so")


@pytest.mark.parametrize("soc", SOCS)
def test_operators_of_vllm_ascend_equal_their_documents(soc):
    code, output = run("vendor_operators.py", soc=soc, vendor=VLLM)
    assert code == 0 and "vllm-ascend: 0 problems" in output, output


def packages(part, soc=A3, **options):
    code, output = run("packages.py", part, soc=soc, **options)
    assert code == 0, output
    return output


def test_both_packages_are_there_and_each_launcher_takes_its_own():
    output = packages("chosen", vendor=VLLM)
    assert "aclnnRmsNormDynamicQuant: builtin; aclnnMoeGatingTopKHash: vllm-ascend" in output
    assert "gate_topk: gate_topk/aclnnMoeGatingTopKHash\n" in output
    assert "gate_hash: gate_hash/aclnnMoeGatingTopKHash\n" in output


def test_without_the_package_the_gate_is_cann_s_own():
    output = packages("chosen")
    assert "aclnnMoeGatingTopKHash: nowhere" in output
    assert "gate_topk: gate_topk/aclnnMoeGatingTopKV2\n" in output


def test_a_call_with_the_arguments_of_the_other_package_is_refused():
    output = packages("wrong", vendor=VLLM)
    assert "vllm-ascend: aclnnRmsNormDynamicQuant, phase 1: " in output, output
    assert "CANN: aclnnRmsNormDynamicQuant, phase 1: " in output, output
    assert output.count("is no live aclTensor") == 2, output


@pytest.mark.parametrize(("vendor", "gate"), [(VLLM, "Hash"), pytest.param(None, "V2", marks=long)])
def test_the_shipped_model_says_the_same_with_either_gate(vendor, gate):
    output = packages("generated", vendor=vendor)
    said = dict(re.findall(r"^(cpu|npu): (\[.*\]) by ", output, re.MULTILINE))
    assert len(said["cpu"]) > 40 and said["cpu"] == said["npu"], output
    (ran,) = re.findall(r"^npu: .* by (.*)", output, re.MULTILINE)
    assert {name.partition("/")[2] for name in ran.split(", ")} == {f"aclnnMoeGatingTopK{gate}"}


def built(folder, *sources):
    """The folder, with a library of these sources in it, built as softnpu's page says."""
    library = folder / LIBRARY
    library.parent.mkdir(parents=True)
    flags = subprocess.check_output([sys.executable, "-m", "softnpu.flags"], text=True)
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    command = [*compiler, "-o", str(library), *map(str, sources), "-Wall", "-Wextra"]
    subprocess.run([*command, *shlex.split(flags)], check=True, cwd=folder, timeout=280)
    return folder


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """The folder of a library of the operators that softnpu's page on them shows, and of one more,
    built as the page says.
    """
    folder = tmp_path_factory.mktemp("outside")
    (example,) = re.findall(r"```cpp\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (folder / "example.cpp").write_text(example)
    return built(folder, folder / "example.cpp", HERE / "outside" / "operators.cpp")


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """The folder of a library that stands for cann-recipes-infer's: its gate is vllm-ascend's, by
    the definitions in both sources, and it has aclnnHcPre too.
    """
    gate = HERE.parents[1] / "csrc" / "softnpu" / "vendors" / VLLM / "gating.cpp"
    return str(built(tmp_path_factory.mktemp("recipes"), gate, HERE / "outside" / "recipes.cpp"))


@pytest.mark.parametrize("soc", [A3, pytest.param(A2, marks=long)])
def test_the_library_of_cann_recipes_is_known_and_its_gate_is_called(recipes, soc):
    output = packages("chosen", soc=soc, vendor=recipes)
    assert "aclnnRmsNormDynamicQuant: builtin; aclnnMoeGatingTopKHash: recipes" in output
    assert "gate_topk: gate_topk/aclnnMoeGatingTopKHash\n" in output, output
    assert "gate_hash: gate_hash/aclnnMoeGatingTopKHash\n" in output, output


@pytest.mark.parametrize("first", [0, pytest.param(1, marks=long)])
def test_three_packages_are_told_from_each_other_in_any_order(recipes, first):
    output = packages("chosen", vendor=[VLLM, recipes] if first == 0 else [recipes, VLLM])
    assert "aclnnRmsNormDynamicQuant: builtin; aclnnMoeGatingTopKHash: vllm-ascend" in output
    _, found = product(vendor=[recipes, VLLM])
    assert found == f"['builtin', '{VLLM}', 'recipes']"


def test_an_operator_library_from_outside_is_called(outside):
    code, output = run("outside.py", vendor=str(outside))
    assert code == 0, output
    tensor = "const aclTensor*"
    assert f"{tensor} x, double limit, aclTensor* y | {tensor}, aclTensor*\n" in output
    assert "[-1.0, 0.5, 1.0] [-6.0, 1.0, 4.0]" in output and "launched 1\n" in output, output


def with_factor(outside, folder, factor):
    """A vendor's folder whose aclnnMul multiplies by `factor` too."""
    library = folder / LIBRARY
    library.parent.mkdir(parents=True)
    built = (outside / LIBRARY).read_bytes()
    assert built.count(OWN_FACTOR) == 1
    library.write_bytes(built.replace(OWN_FACTOR, struct.pack("d", factor)))
    return str(folder)


def product(**given):
    """What torch_npu gives for 2 * 2, and the packages that launchers find."""
    product, found = re.findall(r"product (\S+) packages (.*)", packages("lookup", **given))[0]
    return float(product), found


@long
def test_libraries_are_asked_in_the_order_of_the_documents(outside, tmp_path):
    """ASCEND_CUSTOM_OPP_PATH, then load_priority in $ASCEND_OPP_PATH/vendors, then CANN's own."""
    first, second = (with_factor(outside, tmp_path / str(f), f) for f in (3.0, 5.0))
    opp = tmp_path / "opp"
    with_factor(outside, opp / "vendors" / "seven", 7.0)
    with_factor(outside, opp / "vendors" / "eleven", 11.0)
    (opp / "vendors" / VLLM).symlink_to(library_folder() / "vendors" / VLLM)
    installed = {"ASCEND_OPP_PATH": str(opp)}

    def prefer(*vendors):
        lines = f"load_priority={','.join(vendors)}\n"
        (opp / "vendors" / "config.ini").write_text(lines)
        started.cache_clear()  # those have read it

    assert product() == (4.0, "['builtin']")
    prefer("eleven", "seven")
    assert product(vendor=[first, second], variables=installed) == (12.0, "['builtin']")
    assert product(vendor=[second, first], variables=installed) == (20.0, "['builtin']")
    assert product(variables=installed) == (44.0, "['builtin']")
    prefer("seven", "eleven", VLLM)
    assert product(variables=installed) == (28.0, f"['builtin', '{VLLM}']")
    prefer(VLLM)  # it has no aclnnMul of its own
    assert product(variables=installed) == (4.0, f"['builtin', '{VLLM}']")


def test_a_vendor_that_is_not_there_is_refused_by_name(tmp_path):
    expected = "expected vllm-ascend or a folder that holds op_api/lib/libcust_opapi.so"
    for name in ("recipes", str(tmp_path)):
        with pytest.raises(ArgumentError, match=re.escape(f"found '{name}': {expected}")):
            settings(vendor=name)
    with pytest.raises(ArgumentError, match="vendor: found 'nowhere'"):
        environment({"SOFTNPU_VENDOR": "nowhere"})


def test_a_process_may_start_the_device_with_a_vendor():
    program = (
        f"import softnpu\nsoftnpu.start(soc='{A3}', vendor='{VLLM}')\n"
        "import torch, torch_npu\nfrom dsv4_backend import dispatch\n"
        "torch.ones(1).npu()\nprint(dispatch.npu_packages())\n"
        "softnpu.start(vendor='/nowhere')"
    )
    variables = {"PATH": os.environ["PATH"], "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    code, output = execute(["-c", program], variables)
    assert code == 1 and f"['builtin', '{VLLM}']" in output, output
    assert "vendor: found '/nowhere': expected vllm-ascend or a folder" in output, output


def test_vendors_stand_before_those_that_are_there(monkeypatch):
    vllm = str(library_folder() / "vendors" / VLLM)
    monkeypatch.setenv("ASCEND_CUSTOM_OPP_PATH", "/mine")
    given = environment(settings(vendor=VLLM))
    assert given["ASCEND_CUSTOM_OPP_PATH"] == f"{vllm}{os.pathsep}/mine"
    monkeypatch.setenv("SOFTNPU_VENDOR", VLLM)
    monkeypatch.setenv("ASCEND_CUSTOM_OPP_PATH", given["ASCEND_CUSTOM_OPP_PATH"])
    assert environment()["ASCEND_CUSTOM_OPP_PATH"] == given["ASCEND_CUSTOM_OPP_PATH"]
