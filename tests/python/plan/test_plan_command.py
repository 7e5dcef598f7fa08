"""`dsv4-ascend plan`: tables, JSON, explanations, exit codes."""

import json
import re
from io import StringIO

import pytest
from planned import DEFAULTS, planned
from rich.console import Console

from dsv4_ascend.checkpoint.config import DSpark, V4Config
from dsv4_ascend.checkpoint.config_file import config_to_dict
from dsv4_ascend.cli import main as command
from dsv4_ascend.cli import plan_tables
from dsv4_ascend.plan.as_json import as_json
from dsv4_ascend.plan.explain import explained
from dsv4_ascend.plan.numbers import KEYS
from dsv4_ascend.plan.report import headline, tables
from dsv4_ascend.plan.rules import RULES
from dsv4_ascend.tiny.release import SHIPPED

FLASH = "--model flash --device 910C --count 16 --context 8192"
SMALL = "--model flash --device 910B4 --count 8 --context 131072 --precision w8a8"
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


@pytest.fixture
def run(capsys, monkeypatch):
    for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)

    def call(line, *more):
        with pytest.raises(SystemExit) as left:
            command.main(["plan", *line.split(), *more])
        out, err = capsys.readouterr()
        return left.value.code, out, err

    return call


def test_the_answer_comes_first(run):
    code, out, err = run(FLASH)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[1].startswith("FITS")
    assert "decode step" in lines[2]
    assert lines[3].startswith("bottleneck: ")
    assert len(lines) < 90  # two screens
    out = re.sub(r" +\n", "\n", out)
    for words in ("  time\n", "  room\n", "operator time", "prefix", "compute / comm"):
        assert words in out


def test_a_device_without_a_preset_has_a_lower_bound(run):
    code, out, _ = run("--model flash --device H20 --count 8 --context 8192")
    assert code == 0
    assert "at best (no preset for H20: a lower bound)" in out.splitlines()[2]


def test_no_says_what_breaks_and_what_would_fit(run):
    code, out, _ = run(SMALL)
    assert code == 1
    lines = out.splitlines()
    assert re.match(r"NO: the weights \([\d.]+ GB\) exceed the budget by [\d.]+ GB", lines[1])
    assert lines[2].startswith("it fits with --")


def test_json_is_what_the_plan_says(run):
    code, out, _ = run(FLASH, "--json")
    assert code == 0
    found = json.loads(out)
    assert found == json.loads(json.dumps(as_json(planned())))
    classes = found["decode"]["preset"]["classes"]
    assert sum(one["seconds"] for one in classes.values()) == pytest.approx(
        found["decode"]["preset"]["seconds"]
    )
    assert found["decode"]["time"] == found["prefill"]["time"] == "operator time"
    explained_too = json.loads(run(FLASH, "--json", "--explain")[1])["explain"]
    assert {one["key"] for one in explained_too["numbers"]} <= set(KEYS)
    assert all(one["source"] and one["confidence"] for one in explained_too["numbers"])


@pytest.mark.parametrize(
    "options",
    [{}, {"device": "950DT", "batch": 64}, {"device": "910B4", "count": 8, "precision": "w8a8"},
     {"model": "pro", "count": 64, "precision": "w4a8", "context": 131072}],
)  # fmt: skip
def test_every_printed_number_has_a_rule_with_a_source(options):
    found = planned(**options)
    printed, rules, _, numbers = explained(found)[:4]
    told = "\n".join(" ".join(row.cells) for row in printed.rows)
    for row in printed.rows:
        assert row.cells[1], row
        assert set(row.cells[1].split(", ")) <= set(RULES), row
    for table in tables(found):
        for row in table.rows:
            for cell in row.cells[1:]:
                assert all(number in told for number in NUMBER.findall(cell)), (row, cell)
        assert all(note.text in told for note in table.notes)
    assert all(note.text in told for note in headline(found))
    assert {row.cells[0] for row in rules.rows} == set(RULES)
    assert all(row.cells[2] for row in rules.rows)
    named = {key for rule in RULES.values() for key in rule.keys}
    assert named <= set(KEYS)
    assert {row.cells[0] for row in numbers.rows} == set(found.question.numbers)
    assert all(row.cells[3] and row.cells[4] for row in numbers.rows)


@pytest.mark.parametrize("options", [{}, {"device": "910B3", "count": 32, "layout": "tp=2"}])
def test_explained_work_gives_the_printed_times(options):
    """A reader with --explain alone recomputes each class of the step."""
    found = planned(**options)
    numbers = dict(found.question.numbers)
    rates = {key: numbers[key] for key in numbers if "tflops" in key or "tops" in key}
    rates["hf32"] = numbers["bf16_tflops"] * numbers["hf32_share"]
    work = explained(found)[2]
    assert work.title.startswith("work")
    for label, flops, memory, fabric, behind, waits in (row.cells for row in work.rows):
        phase, name = label.split(": ")
        each = [part.split() for part in flops.split(", ") if part]
        compute = sum(float(n) / (rates[key] * 1e12 * numbers["eta_compute"]) for key, n in each)
        sizes = [float(cell or 0) for cell in (memory, fabric, behind)]
        speeds = [numbers["hbm_gbps"] * numbers["eta_hbm"]]
        speeds += [numbers[key] * numbers["eta_link"] for key in ("link_gbps", "far_gbps")]
        read, near, far = (size / speed for size, speed in zip(sizes, speeds, strict=True))
        wait = [part.split() for part in waits.split(", ") if part]
        waited = sum(float(count) * 1e-6 * numbers[key] for count, key in wait)
        step = found.chosen.decode if phase == "decode" else found.prefill
        expected = max(compute, read) + max(near, far) + waited
        assert step.of(name).seconds == pytest.approx(expected, rel=1e-3), label


def test_explain_prints_it(run):
    code, out, _ = run(FLASH, "--explain", "--set", "hbm_gbps=2x")
    assert code == 0
    assert "--set; was 1600 (SIM, CM384)" in " ".join(out.split())
    assert "docs/spec/deployments.md" in out


def test_a_folder_is_planned_by_its_own_config(run, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_to_dict(V4Config.pro())))
    options = ("--device", "910C", "--count", "64", "--context", "8192", "--json")
    ours = json.loads(run(f"--model {tmp_path}", *options)[1])
    theirs = json.loads(run("--model pro", *options)[1])
    assert {**ours, "question": 0} == {**theirs, "question": 0}


def test_a_folder_that_drafts_with_dspark(run, tmp_path):
    """Its drafter's weights count; the time of its drafts is not modelled, and is not invented."""
    dspark = DSpark(256, 3, target_layer_ids=(1, 20, 41), block_size=5, noise_token_id=3)
    config = V4Config.flash().with_drafts(3, dspark)
    (tmp_path / "config.json").write_text(json.dumps(config_to_dict(config)))
    options = ("--device", "910C", "--count", "16", "--context", "8192", "--json")
    code, out, _ = run(f"--model {tmp_path}", *options)
    found = json.loads(out)
    assert (code, found["question"]["draft_tokens"]) == (0, 0)
    assert found["memory"]["draft"] > planned().chosen.memory.draft
    code, _, err = run(f"--model {tmp_path} --draft-tokens 1", *options)
    assert code == 2
    assert "DSpark" in err


def test_a_folder_with_nonsense(run, tmp_path):
    raw = config_to_dict(V4Config.flash()) | {"hidden_size": -1}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    code, out, err = run(f"--model {tmp_path} --device 910C --count 16 --context 8192")
    assert (code, out) == (1, "")
    assert "hidden_size: found -1, expected a positive integer" in err


def test_the_shipped_small_model_fits_one_device(run):
    line = f"--model {SHIPPED} --device 910B3 --count 1 --context 4096"
    assert run(line)[0] == 0


def test_a_folder_without_a_model(run, tmp_path):
    line = f"--model {tmp_path} --device 910B3 --count 1 --context 4096"
    code, out, err = run(line)
    assert (code, out) == (1, "")
    assert "config.json" in err


@pytest.mark.parametrize(
    "changed",
    ["--count 0", "--count 999999", "--context 0", "--context 9999999", "--batch 0",
     "--device abacus", "--model llama", "--set speed=3", "--layout tp=3", "--precision mx",
     "--html /nowhere/page.html", "--memory 1", "--block-size 7", "--draft-tokens 9"],
)  # fmt: skip
def test_wrong_arguments_are_one_line(run, changed):
    name, value = changed.split()
    options = {f"--{key}": str(asked) for key, asked in DEFAULTS.items()} | {name: value}
    code, out, err = run(" ".join(f"{key} {asked}" for key, asked in options.items()))
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert name in err
    assert "expected" in err or "--count says" in err or "--explain" in err


@pytest.mark.parametrize("changed", ["--count many", "--context 1e5", "--memory big", "--nonsense"])
def test_words_that_are_no_numbers(run, changed):
    code, out, err = run(f"{FLASH} {changed}")
    assert (code, out) == (2, "")
    assert "Error" in err


def test_a_narrow_terminal_breaks_no_word():
    found = planned(model="pro", device="950DT", context=131072)
    for table in tables(found):
        out = StringIO()
        plan_tables._print(Console(width=80, file=out, highlight=False), table)
        printed = out.getvalue()
        assert all(len(line) <= 80 for line in printed.splitlines())
        head = printed[: printed.index("\n" + table.rows[0].cells[0])]
        words = [word for name in table.columns for word in name.split()]
        assert all(re.search(rf"(?<!\S){re.escape(word)}(?!\S)", head) for word in words), head
