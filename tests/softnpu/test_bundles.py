"""A run on the software device is recorded there and judged in a process without one."""

import json

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
    given = settings(soc=A3, cann="9.1.0", **options)
    return execute([*COMMAND, *arguments], environment(given))


def test_what_ran_on_the_device_is_judged_without_it(tmp_path):
    """Caches before and after, fused and composite launchers, references, cases left out."""
    bundle = str(tmp_path / "b.safetensors")
    code, output = on_a3("parity", "--device", "npu", "-k", "write_cache", "--record", bundle)
    assert code == 0, output
    code, output = plain("parity", "--replay", bundle, "--json")
    assert code == 0, output
    report = json.loads(output)
    recorded, totals = report["recorded"], report["totals"]
    assert report["device"] == recorded["device"] == "npu"
    assert (recorded["chip"], recorded["cann"], recorded["software"]) == (A3, "9.1.0", True)
    assert recorded["torch_npu"].startswith("2.13")
    ran = {r["implementation"] for row in report["operators"] for r in row["results"]}
    assert ran == {
        "reference",
        "write_cache/aclnnScatterPaKvCache",
        "write_caches/aclnnScatterPaKvCache",
        "write_cache_indexer_int8/aclnnScatterPaKvCache",
    }
    assert (totals["failed"], totals["unjudged"], totals["other_inputs"]) == (0, 0, 0)
    assert totals["cases"] > 100
    assert totals["left_out"] > 0
    assert report["absent"] == []


def test_doctor_looks_up_every_function():
    code, output = on_a3("doctor", "--json")
    assert code == 0, output
    symbols = json.loads(output[output.index("{") : output.rindex("}") + 1])["symbols"]
    states = {one["symbol"]: one["state"] for one in symbols}
    assert states["aclnnRmsNorm"] == "found"
    assert states["aclnnMhcPre"] == "not of this chip"
    assert states["aclnnMoeGatingTopKHash"] == "package not here"
    assert set(states.values()) == {"found", "not of this chip", "package not here"}
    instead = {(one["operator"], one["symbol"]): one["instead"] for one in symbols}
    assert instead["hc_head", "aclnnMhcPre"] == "aclnnMatmul"
    assert instead["hc_pre", "aclnnMhcPre"] == "reference; `strict` refuses"
    assert all(
        (one["state"] == "found") == (not one["instead"]) or one["kind"] == "composite"
        for one in symbols
    )


def test_doctor_names_the_package_of_each_function():
    code, output = on_a3("doctor", "--json", vendor="vllm-ascend")
    assert code == 0, output
    symbols = json.loads(output[output.index("{") : output.rindex("}") + 1])["symbols"]
    found = {one["symbol"]: (one["state"], one["package"]) for one in symbols}
    assert found["aclnnMoeGatingTopKHash"] == ("found", "vllm-ascend")
    assert found["aclnnRmsNormDynamicQuant"] == ("found", "builtin")
