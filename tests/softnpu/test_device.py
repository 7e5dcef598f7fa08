"""torch_npu on the software device: models, operators, guards, faults, chaos."""

import json

import pytest
from conftest import SOCS, long


@pytest.mark.parametrize("soc", [SOCS[2], *(pytest.param(soc, marks=long) for soc in SOCS[:2])])
def test_models_equal_the_cpu(run, soc):
    code, output = run("models.py", soc=soc)
    assert code == 0 and "models good" in output, output


@pytest.mark.parametrize("soc", [SOCS[0], *(pytest.param(soc, marks=long) for soc in SOCS[1:])])
def test_random_calls_equal_the_cpu(run, soc):
    code, output = run("differential.py", 2100, 7, soc=soc)
    assert code == 0 and "2100 distinct calls, 0 differ, 0 refused" in output, output


@pytest.mark.parametrize("soc", SOCS)
def test_fused_operators_equal_their_documents(run, soc):
    code, output = run("fused.py", soc=soc, cann="9.0.0" if soc.startswith("Ascend950") else None)
    assert code == 0, output


@pytest.mark.parametrize("case", ["fresh", "memory", "kernel", "inject", "graph", "events", "leak"])
def test_guard(run, case):
    code, output = run("guards.py", case, memory="256M", variables={"TASK_QUEUE_ENABLE": "0"})
    assert code == 0 and "caught" in output, output


def test_unknown_operator_is_named(run):
    code, output = run("guards.py", "unknown", "CTCLossV2", soc=SOCS[0], variables={"TASK_QUEUE_ENABLE": "0"})
    assert code == 0 and "caught" in output, output
    code, output = run("guards.py", "unknown", "aclnnCtcLoss", soc=SOCS[2], variables={"TASK_QUEUE_ENABLE": "0"})
    assert code == 0 and "caught" in output, output


def test_over_write_of_one_byte_is_found(run):
    code, output = run("guards.py", "over-write", variables={"PYTORCH_NO_NPU_MEMORY_CACHING": "1"})
    assert code == 0 and "caught" in output, output


def test_dereference_on_the_host_names_the_pointer(run):
    code, output = run("guards.py", "dereference")
    assert code < 0
    assert (
        f"dereferenced the device pointer {output.split()[0]}" in output
        or "dereferenced the device pointer 0x" in output
    )


def test_trace_is_chrome_json(run, tmp_path):
    path = tmp_path / "trace.json"
    code, output = run("guards.py", "trace", path, trace=path)
    assert code == 0, output
    trace = json.loads(path.read_text())
    muls = [event for event in trace["traceEvents"] if event["name"] == "aclnnMuls"]
    assert len(muls) == 1 and "FLOAT[8]" in muls[0]["args"]["arguments"]
    assert trace["summary"]["aclnnReduceSum"]["launches"] == 1


@pytest.mark.parametrize("seeds", [20, pytest.param(200, marks=long)])
def test_chaos_changes_nothing_and_finds_a_missing_wait(run, seeds):
    code, output = run("chaos.py", seeds)
    assert code == 0, output


@long
def test_every_call_of_a_decode_step_fails_once(run):
    code, output = run("sweep.py", variables={"TASK_QUEUE_ENABLE": "0"})
    assert code == 0, output
