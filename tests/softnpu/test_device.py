"""torch_npu on the software device: models, operators, guards, faults, chaos."""

import json
import os
import re

import pytest
from processes import execute, long, run

from softnpu import SOCS

A2, A3, A5 = SOCS


def on(soc, *others):
    """One chip for what all chips have alike; the others in the long tier."""
    return pytest.mark.parametrize("soc", [soc, *(pytest.param(o, marks=long) for o in others)])


@long
@pytest.mark.parametrize("soc", SOCS)
def test_models_equal_the_cpu(soc):
    code, output = run("models.py", soc=soc)
    assert code == 0 and "models good" in output, output


@pytest.mark.parametrize(
    ("soc", "more"),
    [
        (A3, []),
        (A5, []),
        *(pytest.param(*one, marks=long) for one in ((A2, []), (A2, ["more"]))),
    ],
)
def test_first_commands_give_the_tokens_of_the_cpu(soc, more, tmp_path):
    code, output = run("first_commands.py", tmp_path, *more, soc=soc)
    assert code == 0 and "first commands: 0 problems" in output, output
    assert (
        output.count("as every operator without a kernel, runs as its PyTorch reference on npu")
        == 1
    ), output


@pytest.mark.parametrize(
    ("soc", "calls"),
    [
        (A5, 2100),
        *(pytest.param(soc, 2100, marks=long) for soc in (A2, A3)),
        pytest.param(A2, 12000, marks=long),
    ],
)
def test_random_calls_equal_the_cpu(soc, calls):
    code, output = run("differential.py", calls, soc=soc)
    assert code == 0 and f"{calls} distinct calls, 0 differ, 0 refused" in output, output


SAME_VALUES = {
    "PYTEST_CURRENT_TEST": "tests/softnpu/test_device.py::"
    f"test_fused_operators_equal_their_documents[{A5}-9.2.0] (call)"
}
"""The seeds of that test: what is compared then differs by the workspace alone."""


@pytest.mark.parametrize(
    ("soc", "program"), [(A5, "fused.py"), pytest.param(A2, "models.py", marks=long)]
)
def test_every_operator_asks_for_a_workspace(soc, program):
    """It is checked when given and overwritten before each run:
    whose memory it was would be spoilt.
    """
    code, output = run(
        program, soc=soc, cann="9.2.0", variables={"SOFTNPU_WORKSPACE": "5000", **SAME_VALUES}
    )
    assert code == 0, output


@on(A3, A2, A5)
def test_modules_of_torch_equal_the_cpu(soc):
    code, output = run("modules.py", soc=soc)
    assert code == 0, output


@on(A5, A2, A3)
def test_training_equals_the_cpu(soc):
    code, output = run("training.py", soc=soc)
    assert code == 0, output


@pytest.mark.parametrize(
    ("soc", "dtype", "share", "shares"),
    [
        (A2, "float32", 0, 8),
        *(
            pytest.param(soc, dtype, 0, 1, marks=long)
            for soc in SOCS
            for dtype in ("float32", "bfloat16", "int64", "bool")
        ),
    ],
)
def test_samples_of_torch_equal_the_cpu(soc, dtype, share, shares):
    """All of torch's operators, but for the table in samples_known.py."""
    code, output = run(
        "samples.py", dtype, share, shares, soc=soc, variables={"TASK_QUEUE_ENABLE": "0"}
    )
    assert code == 0 and " 0 problems" in output, output


@long
@pytest.mark.parametrize("soc", SOCS)
def test_popular_models_equal_the_cpu(soc):
    code, output = run("popular.py", soc=soc)
    assert code == 0, output


@pytest.mark.parametrize(
    ("soc", "cann"),
    [
        (A5, "9.2.0"),
        *(pytest.param(soc, "9.2.0", marks=long) for soc in (A2, A3)),
        pytest.param(A2, "8.5.0", marks=long),
        pytest.param(A3, "8.5.0", marks=long),
        pytest.param(A5, "9.0.0", marks=long),
    ],
)
def test_fused_operators_equal_their_documents(soc, cann):
    """With the newest CANN, which has most of them, and with the one that the chip came with."""
    code, output = run("fused.py", soc=soc, cann=cann)
    assert code == 0, output


@pytest.mark.parametrize(
    "case", ["fresh", "memory", "kernel", "inject", "graph", "events", "leak", "travel"]
)
def test_guard(case):
    code, output = run("guards.py", case, memory="256M", variables={"TASK_QUEUE_ENABLE": "0"})
    assert code == 0 and "caught" in output, output


@pytest.mark.parametrize(
    ("soc", "queue"),
    [
        (A5, "1"),
        *(
            pytest.param(soc, queue, marks=long)
            for soc in SOCS
            for queue in "01"
            if (soc, queue) != (A5, "1")
        ),
    ],
)
def test_the_rest_of_torch(soc, queue):
    code, output = run("runtime.py", soc=soc, memory="256M", variables={"TASK_QUEUE_ENABLE": queue})
    assert code == 0 and "runtime good" in output, output


@pytest.mark.parametrize("case", ["idle", "storage"])
def test_faulty_launch(case):
    code, output = run("guards.py", case, variables={"TASK_QUEUE_ENABLE": "0"})
    assert code == 0 and "caught" in output, output
    assert ("launch of aclnnMul wrote none of its outputs" in output) == (case == "idle"), output


@pytest.mark.parametrize("queue", ["1", pytest.param("0", marks=long)])
def test_forked_child_is_refused(queue):
    code, output = run("guards.py", "fork", variables={"TASK_QUEUE_ENABLE": queue}, timeout=120)
    assert code == 0 and "caught" in output, output


def test_dropped_launches_are_named_when_the_process_ends():
    _, output = run("guards.py", "unlaunched", variables={"TASK_QUEUE_ENABLE": "1"})
    assert "caught" in output and "never launched: " in output and "1 of aclnnAdd" in output, output


def test_expandable_segments():
    variables = {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True", "TASK_QUEUE_ENABLE": "0"}
    code, output = run("guards.py", "segments", memory="256M", variables=variables)
    assert code == 0 and "caught" in output, output


def test_fixture(tmp_path):
    """In a user's own tests: the device starts in process,
    and a test that leaves an idle launch behind fails.
    """
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["softnpu.pytest_plugin"]\n')
    (tmp_path / "test_it.py").write_text(
        "import torch\n\n\ndef test_good(softnpu):\n    assert "
        "torch.ones(3, device='npu').sum().item() == 3\n"
        "    assert softnpu.launches()['aclnnReduceSum'] == 1\n\n\n"
        "def test_idle(softnpu):\n    softnpu.inject('aclnnMul@idle:1:1')\n    x = "
        "torch.ones(3, device='npu')\n"
        "    (x * x).cpu()\n\n\n"
        "def test_unfired(softnpu):\n    softnpu.inject('aclnnAtan2:1:5,aclnnMuls@idle:2:1')\n"
        "    (torch.ones(3, device='npu') * 2).cpu()\n\n\n"
        "def test_in_flight(softnpu):\n    x = torch.ones(9, device='npu')\n    for _ in "
        "range(50):\n        x = x * 2\n"
    )
    autoload_off = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    code, output = execute(["-m", "pytest", str(tmp_path), "-p", "no:cacheprovider"], autoload_off)
    assert code == 1 and "4 passed, 2 errors" in output, output
    assert "idle launches in this test: {'aclnnMul': 1}" in output
    assert "never fired in this test: ['aclnnAtan2:1:5', 'aclnnMuls@idle:2:1']" in output


@pytest.mark.parametrize(
    ("operator", "soc"), [("aclStft", A5), pytest.param("YoloBoxesEncode", A2, marks=long)]
)
def test_unknown_operator_is_named(operator, soc):
    code, output = run(
        "guards.py", "unknown", operator, soc=soc, variables={"TASK_QUEUE_ENABLE": "0"}
    )
    assert code == 0 and "caught" in output, output


def test_over_write_of_one_byte_is_found():
    code, output = run("guards.py", "over-write", variables={"PYTORCH_NO_NPU_MEMORY_CACHING": "1"})
    assert code == 0 and "caught" in output, output


def test_dereference_on_the_host_names_the_pointer():
    code, output = run("guards.py", "dereference")
    (pointer,) = re.findall(r"^0x[0-9a-f]+$", output, re.MULTILINE)
    assert code < 0 and f"dereferenced the device pointer {pointer}" in output, output


def test_trace_is_chrome_json(tmp_path):
    path = tmp_path / "trace.json"
    code, output = run("guards.py", "trace", path, trace=path)
    assert code == 0, output
    trace = json.loads(path.read_text())
    muls = [event for event in trace["traceEvents"] if event["name"] == "aclnnMuls"]
    assert len(muls) == 1 and "FLOAT[8]" in muls[0]["args"]["arguments"]
    assert trace["summary"]["aclnnReduceSum"]["launches"] == 1


@pytest.mark.parametrize("seeds", [200, pytest.param(3000, marks=long)])
def test_chaos_changes_nothing_and_finds_a_missing_wait(seeds):
    code, output = run("chaos.py", seeds)
    assert code == 0, output


@pytest.mark.parametrize(
    ("model", "stride", "soc"),
    [
        ("deepseek-v4", 40, A5),
        pytest.param("qwen3-moe", 1, A2, marks=long),
        *(pytest.param("deepseek-v4", 1, soc, marks=long) for soc in SOCS),
    ],
)
@pytest.mark.timeout(2100)
def test_every_call_of_a_decode_step_fails_once(model, stride, soc):
    code, output = run(
        "sweep.py", model, stride, soc=soc, timeout=2000, variables={"TASK_QUEUE_ENABLE": "0"}
    )
    assert code == 0, output
