"""The commands ops, doctor and parity: tables, JSON, exit codes, manners."""

import json
import os
import shlex
import stat
import subprocess
import sys

import pytest

from dsv4_ascend.cli import main as command
from dsv4_ascend.cli import parity as parity_command
from dsv4_ascend.cli import symbols
from dsv4_backend import OPERATORS, dispatch, support
from dsv4_backend.ops.norm import rms_norm


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(capsys):
    """Runs a command line in this process; gives (exit code, standard output, standard error)."""

    def call(*arguments):
        with pytest.raises(SystemExit) as left:
            command.main(arguments)
        out, err = capsys.readouterr()
        return left.value.code, out, err

    return call


@pytest.fixture
def wrong_norm(monkeypatch):
    """rms_norm as if its reference were wrong, and as if one fault were no fault."""
    original = rms_norm.reference
    monkeypatch.setattr(rms_norm, "reference", lambda x, weight, eps: 2 * original(x, weight, eps))
    monkeypatch.setitem(rms_norm._faults, "none at all", original)


def test_help_lists_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(name in out for name in command.COMMANDS)


def test_version(run):
    code, out, _ = run("--version")
    assert (code, out.strip()) == (0, "0.1.0")


@pytest.mark.parametrize("name", command.COMMANDS)
def test_every_command_loads_and_has_help(run, name):
    code, out, _ = run(name, "--help")
    assert code == 0
    assert "Usage" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("ops", "--nonsense"),
        ("parity", "--profile", "fast"),
        ("parity", "--device", "abacus"),
        ("parity", "-k", "no such case"),
    ],
)
def test_usage_errors_are_2(run, arguments):
    code, out, err = run(*arguments)
    assert code == 2
    assert not out
    assert "Error" in err


@pytest.mark.parametrize("where", ["/dev/null", ".", "no/such/folder/file"])
def test_logits_replace_no_device_and_no_folder(run, where):
    code, out, err = run("logits", "--input-ids", "ids.json", "--output", where)
    assert (code, out) == (2, "")
    assert f"--output: found {where}, expected a file in an existing folder" in err
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_missing_device_is_3(run, monkeypatch):
    monkeypatch.setattr(parity_command, "npu_fault", lambda: "torch_npu is not loaded")
    code, out, err = run("parity", "--device", "npu")
    assert code == 3
    assert not out
    assert err == (
        "dsv4-ascend: no NPU to run on: torch_npu is not loaded. `dsv4-ascend doctor` looks at the "
        "whole environment\n"
    )


def test_a_command_that_does_not_load_is_3(run, monkeypatch):
    monkeypatch.setitem(command.COMMANDS, "ops", ("dsv4_ascend.cli.absent:ops", ""))
    code, _, err = run("ops")
    assert code == 3
    assert "ops does not load: No module named 'dsv4_ascend.cli.absent'" in err
    assert "pip install" in err


def test_ops_names_every_operator_and_reason(run):
    code, out, _ = run("ops", "--json")
    rows = {row["name"]: row for row in json.loads(out)["operators"]}
    assert code == 0
    assert set(rows) == set(OPERATORS)
    assert rows["rms_norm"]["devices"]["cpu"]["name"].startswith("rms_norm/")
    assert rows["bf16_moe"]["devices"]["cpu"] == {
        "name": "reference",
        "reason": "no kernel for this device in this build",
    }
    assert all(answer["reason"] for row in rows.values() for answer in row["devices"].values())
    spec_rows = [row["spec_rows"] for row in rows.values()]
    assert spec_rows == sorted(spec_rows)


def test_ops_answers_for_chips_that_are_not_here(run):
    code, out, _ = run("ops", "--chip", "A2", "--chip", "Ascend950PR_9599", "--json")
    devices = {row["name"]: row["devices"] for row in json.loads(out)["operators"]}
    assert code == 0
    assert devices["hc_pre"]["A2"]["name"] == "reference"
    assert "A5 from CANN 9.0" in devices["hc_pre"]["A2"]["reason"]
    assert devices["hc_pre"]["Ascend950PR_9599"]["name"] == "hc_pre/aclnnMhcPre"
    assert devices["act_qdq"]["A2"] == {
        "name": "reference",
        "reason": "no kernel for this device in this build",
    }


def test_ops_asks_with_the_cann_and_the_packages_given(run):
    _, out, _ = run("ops", "--chip", "A3", "--cann", "9.0.0", "--package", "builtin", "--json")
    (post,) = [row for row in json.loads(out)["operators"] if row["name"] == "hc_post"]
    assert "A2, A3 from CANN 9.1" in post["devices"]["A3"]["reason"]
    _, out, _ = run("ops", "--chip", "A3", "--package", "recipes", "--json")
    (norm,) = [row for row in json.loads(out)["operators"] if row["name"] == "rms_norm"]
    assert norm["devices"]["A3"]["name"] == "reference"


def test_ops_shows_the_gate_of_vllm_ascend_where_it_saves_launches(run):
    packages = "--package", "builtin", "--package", "vllm-ascend"
    _, out, _ = run("ops", "--chip", "A2", "--chip", "A3", "--chip", "A5", *packages, "--json")
    devices = {row["name"]: row["devices"] for row in json.loads(out)["operators"]}
    for gate in ("gate_topk", "gate_hash"):
        names = [devices[gate][chip]["name"].partition("/")[2] for chip in ("A2", "A3", "A5")]
        assert names == [*["aclnnMoeGatingTopKHash"] * 2, "aclnnMoeGatingTopKV2"]
        assert devices[f"{gate}_folded"]["A3"]["name"] == f"{gate}_folded/aclnnMoeGatingTopKV2"


def test_ops_tells_fused_from_composite_and_refused_side_by_side(run):
    _, out, _ = run("ops", "--json")
    kinds = {row["name"]: row["kinds"] for row in json.loads(out)["operators"]}
    assert all(set(of) == {"cpu", "npu", "A2", "A3", "A5"} for of in kinds.values())
    asked = {
        name: [of["A2"], of["A3"], of["A5"]]
        for name, of in kinds.items()
        if name in ("rms_norm", "hc_pre", "compress", "hadamard", "fp8_gemm", "act_qdq")
    }
    assert asked == {
        "rms_norm": ["fused", "fused", "fused"],
        "hc_pre": ["refused", "refused", "composite"],
        "compress": ["refused", "composite", "composite"],
        "hadamard": ["composite", "composite", "composite"],
        "fp8_gemm": ["refused", "refused", "composite"],
        "act_qdq": ["reference", "reference", "reference"],
    }
    assert kinds["rms_norm"]["cpu"] == "kernel"
    assert kinds["act_qdq"]["npu"] == "none"
    _, out, _ = run("ops", "--chip", "A3", "--cann", "9.0.0", "--package", "builtin", "--json")
    (post,) = [row for row in json.loads(out)["operators"] if row["name"] == "hc_post"]
    assert post["kinds"] == {"A3": "refused"}


def test_every_candidate_says_what_it_is_made_of():
    for one in dispatch.launchers():
        assert (one.kind == "kernel") == (not one.symbols) == (one.device == "cpu"), one
        assert one.kind != "fused" or len(one.symbols) == 1, one
        assert not one.symbols or one.name == f"{one.operator}/{one.symbols[0]}", one


@pytest.mark.parametrize(
    "options", [("--chip", "H100"), ("--chip", "A2", "--package", "cuda"), ("--chip", "")]
)
def test_ops_refuses_other_chips_and_packages(run, options):
    code, _, err = run("ops", *options)
    assert code == 2
    assert options[-2] in err


def test_ops_table(run):
    code, out, _ = run("ops")
    assert code == 0
    assert all(name in out for name in OPERATORS)


def test_doctor(run):
    code, out, _ = run("doctor", "--json")
    report = json.loads(out)
    problems = [f for f in report["findings"] if f["state"] == "problem"]
    assert code == (1 if problems else 0)
    assert all(f["advice"] for f in problems)
    assert {"python", "cpu", "torch", "torch_npu", "operators"} <= {
        f["subject"] for f in report["findings"]
    }
    assert report["verdict"].startswith("ready for CPU")
    assert report["probes"]["torch"].startswith("2.13")


def test_doctor_without_cann_says_so_in_a_line(run):
    _, out, _ = run("doctor")
    (line,) = [line for line in out.splitlines() if "functions" in line and "no CANN" in line]
    assert "`dsv4-ascend doctor --symbols` lists them" in line
    assert "aclnnRmsNorm" not in out
    _, out, _ = run("doctor", "--symbols")
    rows = [line.split() for line in out.splitlines() if "aclnn" in line]
    assert ["rms_norm", "fused", "aclnnRmsNorm", "not", "found"] in [row[:5] for row in rows]
    assert len(rows) == sum(len(one.symbols) for one in dispatch.launchers())
    others = set(OPERATORS) - {one.operator for one in dispatch.launchers() if one.symbols}
    assert f"without a launcher: {', '.join(sorted(others))}" in out


# What the libraries of a machine have -> (state, what runs instead) of hc_head's two candidates.
LIBRARIES = [
    ({"aclnnMhcPre", "aclnnMatmul"}, [("found", ""), ("found", "")]),
    ({"aclnnMatmul"}, [("missing", "aclnnMatmul"), ("found", "")]),
    ({"aclnnMhcPre"}, [("found", ""), ("missing", "aclnnMhcPre")]),
    (set(), [("missing", "reference; `strict` refuses")] * 2),
]


@pytest.mark.parametrize(("there", "said"), LIBRARIES)
def test_doctor_says_what_runs_where_a_function_is_missing(monkeypatch, there, said):
    def functions():
        return [
            dispatch.NpuFunction(one.symbol, "", "", "builtin", "builtin" * (one.symbol in there))
            for one in dispatch.npu_functions()
        ]

    monkeypatch.setattr(symbols, "npu_functions", functions)
    monkeypatch.setattr(symbols, "npu_packages", lambda: ["builtin"])
    found = symbols.symbols(on_npu=True)
    assert [(s.state, s.instead) for s in found if s.operator == "hc_head"] == said
    (pre, sinkhorn) = [s for s in found if s.operator == "hc_pre"]
    assert pre.instead == sinkhorn.instead == "reference; `strict` refuses"
    judged = symbols.judge(found, on_npu=True)
    assert judged.state == "warning"
    assert f"{len(there)} of {len(functions())} found" in judged.found
    assert "aclnnAdd, " in judged.found
    assert judged.advice


def test_doctor_in_json_has_every_function(run):
    _, out, _ = run("doctor", "--json")
    listed = json.loads(out)["symbols"]
    assert {one["state"] for one in listed} == {"not found"}
    assert {one["symbol"] for one in listed} == {one.symbol for one in dispatch.npu_functions()}


def test_doctor_table_says_what_to_do(run, monkeypatch):
    monkeypatch.setattr(
        support._torch, "backend_fault", ImportError("libhccl.so: cannot open shared object file")
    )
    monkeypatch.setattr(support, "_installed", lambda name: "2.13.0")
    code, out, _ = run("doctor")
    assert code == 1
    assert "libhccl.so" in out
    assert "-> install CANN" in out
    assert "verdict" in out


def test_parity_table(run):
    code, out, err = run("parity", "-k", "hadamard", "--faults")
    assert code == 0
    assert "mutation score 100.0 %" in out
    assert f"{len(OPERATORS['hadamard'].faults)}/{len(OPERATORS['hadamard'].faults)}" in out
    assert "\x1b" not in out
    assert not err


def test_parity_json(run):
    code, out, _ = run("parity", "-k", "rms_norm/ideal", "--profile", "ideal", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["complete"]
    assert [row["operator"] for row in report["operators"]] == ["rms_norm"]
    assert report["totals"]["failed"] == 0
    assert {r["profile"] for r in report["operators"][0]["results"]} == {"ideal"}
    assert {r["implementation"] for r in report["operators"][0]["results"]} >= {"reference"}


def test_findings_are_1_and_end_with_the_command_that_repeats_them(run, wrong_norm):
    code, out, _ = run("parity", "-k", "rms_norm/", "--faults")
    failing = [line for line in out.splitlines() if line.startswith("FAIL")]
    assert code == 1
    assert any("survives" in line for line in failing)
    assert any("worst at [" in line for line in failing)
    for line in (failing[0], failing[-1]):
        again = shlex.split(line.split("  $ ")[1])
        assert again[0] == "dsv4-ascend"
        code, out, _ = run(*again[1:])
        assert code == 1
        assert line.split(": ")[0] in out


def test_findings_in_json(run, wrong_norm):
    code, out, _ = run("parity", "-k", "rms_norm/", "--faults", "--json")
    report = json.loads(out)
    assert code == 1
    assert report["totals"]["failed"] > 0
    assert report["totals"]["faults_survived"] >= 1
    assert report["totals"]["mutation_score"] < 1


def test_mutants_of_the_reference_are_reported(run):
    code, out, _ = run("parity", "-k", "rms_norm/eps", "--mutants", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["totals"]["mutants"] >= 1
    assert report["totals"]["reference_mutation_score"] == 1
    assert all(
        m["killed"] and "eps" in m["fault"]
        for op in report["operators"]
        for m in op["mutant_results"]
    )


def test_interrupt_is_130_with_a_valid_partial_report(run, monkeypatch):
    measure = parity_command.measure

    def interrupted(operator, selection):
        if operator.name == "hc_post":
            raise KeyboardInterrupt
        return measure(operator, selection)

    monkeypatch.setattr(parity_command, "measure", interrupted)
    code, out, _ = run("parity", "--json")
    report = json.loads(out)
    assert code == 130
    assert not report["complete"]
    done = [row["operator"] for row in report["operators"]]
    assert done == ["embed_streams", "hc_pre", "hc_pre_hf32"]


def test_a_closed_pipe_is_no_traceback():
    script = "from dsv4_ascend.cli.main import main; main(['ops'])"
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ,
    )
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    process.wait()
