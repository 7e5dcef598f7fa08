"""devices.toml and formats.toml: every number has a source and a confidence; --set changes one."""

import math

import pytest
from planned import planned, question

from dsv4_ascend.plan.numbers import CONFIDENCES, KEYS
from dsv4_ascend.plan.question import MOST_DEVICES
from dsv4_ascend.plan.tables import DEVICES, FORMATS
from dsv4_backend.errors import ArgumentError

CHIPS = {"A2", "A3", "A5", "CUDA"}


def sourced(row):
    return bool(row.get("source")) and row.get("confidence") in CONFIDENCES


def unsourced(table, above=False, path=""):
    """Paths of numbers without a source and a confidence, of their own or of a table above."""
    if isinstance(table, dict):
        above = above or sourced(table)
        for name, value in table.items():
            yield from unsourced(value, above, f"{path}.{name}")
    elif isinstance(table, list):
        for i, value in enumerate(table):
            yield from unsourced(value, above, f"{path}[{i}]")
    elif isinstance(table, int | float) and not above:
        yield path


@pytest.mark.parametrize("table", [DEVICES, FORMATS], ids=["devices", "formats"])
def test_every_number_has_a_source_and_a_confidence(table):
    assert list(unsourced(table)) == []


def test_numbers_without_a_source_are_seen():
    row = {"value": 3, "source": "SIM"}
    assert list(unsourced({"a": {"hbm_gbps": row}})) == [".a.hbm_gbps.value"]
    assert not list(unsourced({"a": {"hbm_gbps": row | {"confidence": "fit"}}}))


@pytest.mark.parametrize("device", DEVICES["devices"])
def test_devices_are_complete(device):
    row = DEVICES["devices"][device]
    assert row["chip"] in CHIPS
    assert row["preset"] in DEVICES["presets"]
    assert row["precision"] in FORMATS["precisions"]
    assert row["chip"] in FORMATS["caches"][row["cache"]]["chips"]
    words = {"title", "chip", "preset", "precision", "cache", "memory"}
    assert set(row) - words <= set(KEYS)
    sizes = [variant["size_gb"] for variant in row["memory"]]
    assert sizes == sorted(set(sizes))
    asked = question(device=device, count=1)
    lacking = set(KEYS) - set(asked.numbers)
    assert lacking <= {"int8_tops", "fp8_tflops", "mxfp4_tflops"}
    for key in asked.numbers:
        assert KEYS[key].low <= asked.numbers[key] <= KEYS[key].high, key


def test_presets_have_the_same_numbers():
    names = [set(row) for row in DEVICES["presets"].values()]
    assert all(one == names[0] for one in names)
    assert names[0] - {"note"} <= set(KEYS)
    assert set(DEVICES["common"]) <= set(KEYS)


def test_rates_follow_from_cores():
    """Cube cores x GHz x 16^3 x 2 (docs/spec/planner.md 1)."""
    cores = {"910B1": (24, 1.85), "910B2": (24, 1.8), "910B3": (20, 1.8), "910B4": (20, 1.5),
             "910C": (24, 1.8), "950PR": (28, 1.7), "950DT": (32, 1.7)}  # fmt: skip
    for device, (count, clock) in cores.items():
        row = DEVICES["devices"][device]
        peak = count * clock * 16**3 * 2 / 1e3
        assert row["bf16_tflops"]["value"] == pytest.approx(peak, rel=0.001), device
        double = row.get("int8_tops") or row["fp8_tflops"]
        assert double["value"] == pytest.approx(2 * peak, rel=0.001), device


def test_a_number_is_changed_and_says_so():
    asked = question(changes=["hbm_gbps=3200", "link_gbps=0.5x"])
    assert (asked.numbers["hbm_gbps"], asked.numbers["link_gbps"]) == (3200, 98)
    one = asked.numbers.of("hbm_gbps")
    assert (one.confidence, one.source) == ("yours", "--set; was 1600 (SIM, CM384)")
    assert asked.roofline["hbm_gbps"] == 3200
    assert question(changes=["eta_hbm=0.9"]).roofline["eta_hbm"] == 1


def test_twice_the_bandwidth_halves_what_waits_for_memory():
    before, after = planned(), planned(changes=["hbm_gbps=2x"])
    dense = [found.chosen.decode.of("dense").seconds for found in (before, after)]
    assert before.chosen.layout == after.chosen.layout
    assert dense[1] == pytest.approx(dense[0] / 2)
    expected = next(one for one in before.what_ifs if "bandwidth" in one.name)
    assert after.chosen.decode.seconds == pytest.approx(expected.step.seconds)


def test_without_a_graph_every_kernel_waits_longer():
    graph, eager = planned(), planned(graph=False)
    launches = [found.chosen.decode.of("launch").seconds for found in (graph, eager)]
    assert launches[1] / launches[0] == pytest.approx(15 / 4)
    assert "--no-graph" in eager.question.numbers.of("gap_us").source


def test_a_rate_that_no_source_gives_can_be_given():
    with pytest.raises(ArgumentError, match="--set int8_tops=VALUE"):
        question(device="950DT", precision="w8a8")
    assert (
        question(device="950DT", precision="w8a8", changes=["int8_tops=900"]).numbers["int8_tops"]
        == 900
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("hbm_gbps", "KEY=VALUE"), ("hbm_gbps=", "KEY=VALUE"), ("=3", "unknown key"),
        ("hbm=3", "hbm_gbps"), ("colour=3", "expected one of visible_gb"),
        ("hbm_gbps=fast", "expected a number"), ("hbm_gbps=0", "expected a number"),
        ("hbm_gbps=-1", "expected a number"), ("hbm_gbps=nan", "expected a number"),
        ("hbm_gbps=inf", "expected a number"), ("hbm_gbps=1e12", "expected a number"),
        ("eta_hbm=1.5", "expected a number"), ("head_tp=1.5", "a whole number"),
        ("fp8_tflops=2x", "expected a number"),
    ],
)  # fmt: skip
def test_changes_that_cannot_be(change, words):
    with pytest.raises(ArgumentError, match=f"--set.*{words}"):
        question(changes=[change])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"count": 0}, r"--count .*\[1, 8192\]"), ({"count": -4}, "--count"),
        ({"count": MOST_DEVICES + 1}, "--count"), ({"context": 0}, "--context"),
        ({"context": 2**20 + 1}, r"--context \(tokens; flash is made for 1,048,576\)"),
        ({"batch": 0}, "--batch"), ({"batch": 10**30}, "--batch"),
        ({"device": "910"}, "--device: found '910', expected one of 910B1"),
        ({"model": "v5"}, "--model: .* folder"), ({"model": ""}, "--model"),
        ({"precision": "int2"}, "--precision: .* expected one of official"),
        ({"precision": "mx"}, "--precision: mx needs the rate fp8_tflops"),
        ({"cache": "c8-640"}, "--cache: .* expected c16"), ({"cache": "x"}, "--cache"),
        ({"block_size": 100}, "--block-size: found 100, expected one of 128, 64, 32"),
        ({"memory": 80.0}, "--memory: .* --set visible_gb=VALUE"),
        ({"draft_tokens": 4}, "--draft-tokens"), ({"draft_tokens": -1}, "--draft-tokens"),
        ({"layout": "tp=3"}, "--layout: .* --count says 16"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_be(options, words):
    with pytest.raises(ArgumentError, match=words):
        question(**options)


def test_a_layout_that_operators_forbid_is_an_error_with_others():
    with pytest.raises(ArgumentError, match=r"--layout: .*64 or 128 .*expected tp=1,dp=8,ep=8"):
        planned(device="950DT", count=8, layout="tp=2")


def test_memory_is_an_input_where_sources_disagree():
    small, large = planned(device="950DT"), planned(device="950DT", memory=144)
    assert (small.question.size_gb, large.question.size_gb) == (96, 144)
    assert large.chosen.memory.free - small.chosen.memory.free == pytest.approx(0.9 * 47e9)
    assert any("--memory 144" in text for _, text in small.notes)
    assert any("--memory 96" in text for _, text in large.notes)
    assert not any("--memory" in text for _, text in planned().notes)


def test_doubtful_numbers_are_named():
    (text,) = (
        text for rule, text in planned(device="910B4", context=1024).notes if rule == "doubt"
    )
    assert "hbm_gbps 800 (or 960 in another table)" in text


def test_every_number_is_finite_in_every_device():
    for device in DEVICES["devices"]:
        assert math.isfinite(planned(device=device).chosen.decode.seconds)
