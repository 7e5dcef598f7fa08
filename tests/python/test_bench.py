"""`dsv4-ascend bench`: what it reports, with made-up clocks where numbers matter.
No test here times anything.
"""

import itertools
import json

import pytest
import torch
from typer.testing import CliRunner

from dsv4_ascend.bench import timing
from dsv4_ascend.bench.host import BASELINE, host
from dsv4_ascend.bench.timing import interleaved
from dsv4_backend import OPERATORS, dispatch


class Clock:
    """A clock that only the calls move."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.order = []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def call(self, name, *seconds):
        """A call that takes `seconds`, in turn."""
        durations = itertools.cycle(seconds)

        def run():
            self.order.append(name)
            self.now += next(durations)

        return run


def test_medians_and_quartiles_of_calls_longer_than_a_block(monkeypatch):
    clock = Clock(monkeypatch)
    # The first of five is the one that finds the block's length.
    found = interleaved({"slow": clock.call("slow", 9, 1, 2, 3, 4)}, rounds=4)["slow"]
    assert (found.low, found.median, found.high) == (1.25, 2.5, 3.75)


def test_short_calls_are_timed_in_blocks(monkeypatch):
    clock = Clock(monkeypatch)
    found = interleaved({"short": clock.call("short", 1e-5)}, rounds=3)["short"]
    assert found.median == pytest.approx(1e-5)
    assert len(clock.order) >= 3 * timing.BLOCK_SECONDS / 1e-5


def test_rounds_take_turns(monkeypatch):
    clock = Clock(monkeypatch)
    interleaved({"a": clock.call("a", 1), "b": clock.call("b", 1)}, rounds=3)
    assert "".join(clock.order[2:]) == "ababab"


def test_every_operator_has_a_row_and_says_what_ran():
    rows = host("norm", rounds=2)
    norms = {op.name: len(op.specs) for op in OPERATORS.values() if "norm" in op.name}
    assert rows[0].name == BASELINE
    assert {row.name for row in rows[1:]} == set(norms)
    native = {op for op, device in dispatch.native_kernels() if device == "cpu"}
    for row in rows[1:]:
        assert (row.ran != "reference") == (row.name in native), row
        assert row.arguments == norms[row.name]
        assert row.ratio == pytest.approx(row.timing.median / rows[0].timing.median)


def run(*arguments):
    import typer

    from dsv4_ascend.cli.bench import bench

    app = typer.Typer()
    app.command()(bench)
    return CliRunner().invoke(app, list(arguments))


def test_json_and_table_name_the_machine():
    found = json.loads(run("-k", "rms_norm", "--rounds", "2", "--json").stdout)
    assert found["torch"] == torch.__version__
    assert {call["name"] for call in found["suites"]["host"]["calls"]} == {
        BASELINE,
        *(name for name in OPERATORS if "rms_norm" in name),
    }
    table = run("-k", "rms_norm", "--rounds", "2").stdout
    assert "times aten.add" in table
    assert f"torch {torch.__version__}" in table


@pytest.mark.parametrize(
    "arguments", [["--suite", "decode!"], ["--rounds", "1"], ["-k", "no such operator"]]
)
def test_bad_options_are_usage_errors(arguments):
    assert run(*arguments).exit_code == 2
