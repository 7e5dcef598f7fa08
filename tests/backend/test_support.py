"""Diagnosis of made-up machines."""

import sys
from dataclasses import replace

import pytest

from dsv4_backend.support import Cann, Probes, diagnose, find_cann, verdict

HEALTHY = Probes(
    python="3.11.7",
    machine="aarch64",
    isa=("asimd", "sve"),
    torch="2.13.0+cpu",
    torch_npu="2.13.0",
    backends=("torch_npu",),
    backend_fault=None,
    autoload=None,
    npus=8,
    npu_name="Ascend910B3",
    npu_cann="9.1.0",
    npu_is_software=False,
    cann=(Cann("/usr/local/Ascend/cann", "default location", "9.1.0"),),
    ascend_home_fault=None,
    ascendcl_fault=None,
    home_fault=None,
    cwd_fault=None,
)


def states(probes):
    return {(f.subject, f.state) for f in diagnose(probes)}


def test_a_healthy_machine_has_nothing_to_do():
    findings = diagnose(HEALTHY)
    assert {f.state for f in findings} == {"ok"}
    assert not any(f.advice for f in findings)
    assert verdict(findings, 8) == "ready for CPU and 8 NPU(s)"


def test_a_laptop_has_no_problem():
    no_npu = {"npus": 0, "npu_name": None, "npu_cann": None}
    laptop = replace(
        HEALTHY, **no_npu, torch_npu=None, backends=(), cann=(), ascendcl_fault="OSError: not found"
    )
    findings = diagnose(laptop)
    assert {f.state for f in findings} == {"ok", "note"}
    assert verdict(findings, 0) == "ready for CPU"


@pytest.mark.parametrize("software", [False, True])
def test_a_device_is_named_and_a_software_one_is_no_hardware(software):
    probes = replace(HEALTHY, npu_is_software=software)
    (npu,) = [f.found for f in diagnose(probes) if f.subject == "NPU"]
    assert npu.endswith(": Ascend910B3, CANN 9.1.0")
    assert ("softnpu, no hardware" in npu) == software
    assert ("8 software NPU(s)" in verdict((), probes.npus, probes.npu_is_software)) == software


@pytest.mark.parametrize(
    ("change", "subject", "state"),
    [
        ({"torch_npu": "2.9.0"}, "torch_npu", "problem"),
        ({"backend_fault": "ImportError: x.so: file too short"}, "torch_npu", "problem"),
        ({"backend_fault": "ImportError: x.so: file too short"}, "autoload", "warning"),
        ({"autoload": "0"}, "autoload", "warning"),
        ({"npus": 0}, "NPU", "warning"),
        ({"ascendcl_fault": "OSError: not found"}, "libascendcl.so", "problem"),
        ({"ascend_home_fault": "ASCEND_HOME_PATH=/x is not a folder"}, "CANN", "problem"),
        (
            {"cann": (*HEALTHY.cann, Cann("/opt/cann", "ASCEND_HOME_PATH", "8.5.0"))},
            "CANN",
            "warning",
        ),
        ({"home_fault": "/root: Permission denied"}, "HOME", "warning"),
        ({"cwd_fault": ".: Read-only file system"}, "current folder", "warning"),
        (
            {"torch_npu": None, "backends": ("gaudi",), "backend_fault": "ImportError: no"},
            "gaudi",
            "problem",
        ),
    ],
)
def test_one_fault_gives_one_finding_with_advice(change, subject, state):
    findings = [
        f for f in diagnose(replace(HEALTHY, **change)) if (f.subject, f.state) == (subject, state)
    ]
    assert len(findings) == 1
    assert findings[0].advice


@pytest.mark.parametrize("torch_npu", ["2.13.0", "2.13.0.post2", "2.13.0rc1+abc"])
def test_releases_of_torch_npu_that_fit(torch_npu):
    assert ("torch_npu", "ok") in states(replace(HEALTHY, torch_npu=torch_npu))


def test_verdict_counts():
    probes = replace(HEALTHY, npus=0, torch_npu="2.9.0", cwd_fault="x", home_fault="y")
    assert verdict(diagnose(probes), 0) == "ready for CPU; 1 problem, 3 warnings"


def test_cann_is_found_once_with_its_version(tmp_path):
    home = tmp_path / "cann"
    (home / "x86_64-linux" / "lib64").mkdir(parents=True)
    (home / "lib64").symlink_to(home / "x86_64-linux" / "lib64")
    (home / "lib64" / "libascendcl.so").touch()
    (home / "x86_64-linux" / "ascend_toolkit_install.info").write_text(
        "package_name=x\nversion=8.3.RC1\n"
    )
    (tmp_path / "latest").symlink_to(home)
    found = list(
        find_cann({"ASCEND_HOME_PATH": str(tmp_path / "latest"), "ASCEND_TOOLKIT_HOME": str(home)})
    )
    assert found == [Cann(str(tmp_path / "latest"), "ASCEND_HOME_PATH", "8.3.RC1")]


def test_the_same_cann_by_library_path_and_home_is_one(tmp_path):
    libraries = tmp_path / "cann" / "x86_64-linux" / "lib64"
    libraries.mkdir(parents=True)
    (libraries / "libascendcl.so").touch()
    (tmp_path / "cann" / "lib64").symlink_to(libraries)
    home = str(tmp_path / "cann")
    assert len(list(find_cann({"LD_LIBRARY_PATH": f"{home}/lib64", "ASCEND_HOME_PATH": home}))) == 1


@pytest.fixture
def softnpu_folder(tmp_path, monkeypatch):
    """An installed package of that name, which fails when it is imported: probing must not."""
    folder = tmp_path / "softnpu"
    (folder / "lib").mkdir(parents=True)
    (folder / "lib" / "libascendcl.so").touch()
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "softnpu", raising=False)
    return folder


@pytest.mark.parametrize("named_by", ["ASCEND_HOME_PATH", "LD_LIBRARY_PATH"])
def test_softnpu_is_named_in_whole_words(softnpu_folder, named_by):
    path = {"ASCEND_HOME_PATH": softnpu_folder, "LD_LIBRARY_PATH": softnpu_folder / "lib"}[named_by]
    (cann, *_) = find_cann({named_by: str(path)})
    assert cann.version == "softnpu, the software device"
    (line,) = [f.found for f in diagnose(replace(HEALTHY, cann=(cann,))) if f.subject == "CANN"]
    assert line == f"softnpu, the software device, in {softnpu_folder} ({named_by})"


@pytest.mark.parametrize(
    "what", ["nothing", "a folder that is no package", "a module that must not be imported"]
)
def test_without_softnpu_a_cann_is_a_cann(softnpu_folder, monkeypatch, what):
    (softnpu_folder / "__init__.py").unlink()
    if what == "nothing":
        monkeypatch.setattr(sys, "path", [])
    if what == "a module that must not be imported":
        monkeypatch.setitem(sys.modules, "softnpu", None)
    (cann, *_) = find_cann({"ASCEND_HOME_PATH": str(softnpu_folder)})
    assert cann.version is None
