"""The README's tour runs as printed, every command it names exists,
and its counts are the right ones.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

from dsv4_ascend.cli.main import COMMANDS
from dsv4_ascend.convert.comparison import compare
from dsv4_ascend.convert.job import convert
from dsv4_ascend.convert.targets import TARGETS
from dsv4_ascend.tiny.release import SHIPPED
from dsv4_backend import OPERATORS
from dsv4_backend.dispatch import native_kernels

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_tour_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Support(native=True" in done.stdout
    difference = float(re.search(r"tensor\(([\d.e+-]+)\)", done.stdout)[1])
    assert difference < 1e-4
    assert len(code.splitlines()) <= 22


def test_named_commands_exist() -> None:
    named = set(re.findall(r"`dsv4-ascend ([a-z-]+)", README))
    assert named
    assert named == set(COMMANDS)


def conversions():
    """How far converted folders of the small model are from it (docs/converting.md)."""
    with tempfile.TemporaryDirectory() as base:
        errors, back = {}, Path(base) / "official"
        for name in ("a2a3-int8", "a2a3-w4a8", "bf16"):
            convert(SHIPPED, Path(base) / name, TARGETS[name])
            errors[name] = 100 * compare(SHIPPED, Path(base) / name).by_class["experts"].rms
        convert(Path(base) / "bf16", back, TARGETS["official"])
        return errors, compare(SHIPPED, back)


@cache
def counts():
    """Words of the README with `#` for their number -> the right number,
    as the README writes it.
    """
    errors, back = conversions()
    perplexity = json.loads((Path(SHIPPED) / "perplexity.json").read_text())
    on_cpu = [name for name, device in native_kernels() if device == "cpu"]
    rows = {row for op in OPERATORS.values() for row in op.rows}
    cases = sum(len(list(op.iterate_cases())) for op in OPERATORS.values())
    return {
        "# contracts": f"{len(OPERATORS):,}",
        "rows 1 to # of the inventory": f"{len(rows):,}"
        if rows == set(range(1, len(rows) + 1))
        else "a gap",
        "# parity cases": f"{cases:,}",
        "# operators have CPU kernels": f"{len(on_cpu):,}",
        "# named faults, every one caught": f"{sum(len(op.faults) for op in OPERATORS.values()):,}",
        "per token over # tokens": f"{perplexity['tokens']:,}",
        "# trained in fp32": f"{perplexity['trained_fp32']:.2f}",
        "# quantised (`ideal`)": f"{perplexity['quantised_ideal']:.2f}",
        "# quantised (`official`)": f"{perplexity['quantised_official']:.2f}",
        "# in bf16 throughout (`bf16`)": f"{perplexity['deployed_bf16']:.2f}",
        "# as Ascend A2 and A3 (`a2a3-int8`)": f"{perplexity['deployed_a2a3_int8']:.2f}",
        "# with experts of 4 bits (`a2a3-w4a8`)": f"{perplexity['deployed_a2a3_w4a8']:.2f}",
        "# as A5 (`a5-mx`)": f"{perplexity['deployed_a5_mx']:.2f}",
        "rms error of experts # % in int8": f"{errors['a2a3-int8']:.2f}",
        "# % in int4": f"{errors['a2a3-w4a8']:.1f}",
        "# of 383 weights the same bytes": f"{back.same}",
        "unigram #": f"{perplexity['unigram']:.0f}",
        "bigram #": f"{perplexity['bigram']:.1f}",
    }


def wrong_counts(readme):
    """What to correct in a README, in words; every count must stand there at least once."""
    problems = []
    for words, right in counts().items():
        pattern = re.escape(words).replace(r"\#", r"(\d[\d,.]*\d|\d)")
        found = re.findall(pattern, readme)
        if not found:
            problems.append(f"write {words.replace('#', right)!r} somewhere")
        problems += [
            f"{words.replace('#', n)!r} is now {words.replace('#', right)!r}"
            for n in found
            if n != right
        ]
    return problems


def test_counts_are_right():
    problems = wrong_counts(README)
    assert not problems, f"README.md: {'; '.join(problems)}"


@pytest.mark.parametrize("words", counts())
def test_a_wrong_count_is_seen(words):
    readme = "; ".join(each.replace("#", right) for each, right in counts().items())
    right = words.replace("#", counts()[words])
    wrong = words.replace("#", "7")
    assert wrong_counts(readme) == []
    assert wrong_counts(readme.replace(right, wrong)) == [f"{wrong!r} is now {right!r}"]
    assert wrong_counts(readme.replace(right, "")) == [f"write {right!r} somewhere"]
