"""A run on the software device is recorded there and judged in a process without one."""

import json

import pytest
from processes import execute

from softnpu import SOCS, environment
from softnpu.settings import settings

COMMAND = ["-c", "from dsv4_ascend.cli.main import main; main()"]
A3 = SOCS[1]


def plain(*arguments):
    return execute(
        [*COMMAND, *arguments], {"PATH": "/nowhere", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    )


def on_a3(*arguments, **options):
    return execute([*COMMAND, *arguments], environment(settings(soc=A3, cann="9.1.0", **options)))


@pytest.mark.parametrize("pattern", ["write_cache", "token_quant", "hc_head"])
def test_what_ran_on_the_device_is_judged_without_it(tmp_path, pattern):
    bundle = str(tmp_path / "b.safetensors")
    code, output = on_a3("parity", "--device", "npu", "-k", pattern, "--record", bundle)
    assert code == 0, output
    code, output = plain("parity", "--replay", bundle, "--json")
    assert code == 0, output
    report = json.loads(output)
    assert report["device"] == "npu"
    recorded = report["recorded"]
    assert (recorded["chip"], recorded["cann"], recorded["software"]) == (A3, "9.1.0", True)
    assert recorded["torch_npu"].startswith("2.13")
    ran = {r["implementation"] for row in report["operators"] for r in row["results"]}
    assert any("/aclnn" in name for name in ran)
    assert "reference" in ran
    totals = report["totals"]
    assert (totals["failed"], totals["unjudged"], totals["other_inputs"]) == (0, 0, 0)
    assert report["absent"] == []
    assert totals["left_out"] == (
        1 if pattern == "hc_head" else 0 if pattern != "write_cache" else totals["left_out"]
    )


def test_a_refused_launch_is_judged_as_one(tmp_path):
    bundle = str(tmp_path / "b.safetensors")
    code, output = on_a3(
        "parity", "--device", "npu", "-k", "rms_norm/ideal/3x7", "--record", bundle,
        fail="aclnnRmsNormGetWorkspaceSize:1:561002",
    )  # fmt: skip
    assert code == 1, output
    code, output = plain("parity", "--replay", bundle)
    assert code == 1, output
    (line,) = [line for line in output.splitlines() if line.startswith("FAIL")]
    assert line.startswith("FAIL rms_norm/ideal/3x7: rms_norm/aclnnRmsNorm: raised LaunchError: ")
    assert "561002" in line


def test_doctor_looks_up_every_function():
    code, output = on_a3("doctor", "--json")
    assert code == 0, output
    symbols = json.loads(output[output.index("{") : output.rindex("}") + 1])["symbols"]
    states = {one["symbol"]: one["state"] for one in symbols}
    assert states["aclnnRmsNorm"] == "found"
    assert states["aclnnMhcPre"] == "not of this chip"
    assert set(states.values()) == {"found", "not of this chip"}
    instead = {(one["operator"], one["symbol"]): one["instead"] for one in symbols}
    assert instead["hc_head", "aclnnMhcPre"] == "aclnnMatmul"
    assert instead["hc_pre", "aclnnMhcPre"] == "reference; `strict` refuses"
    assert all(
        (one["state"] == "found") == (not one["instead"]) or one["kind"] == "composite"
        for one in symbols
    )
