"""The README's tour runs as printed, and every command it names exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from dsv4_ascend.cli.main import COMMANDS

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_tour_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "Support(native=True" in done.stdout
    difference = float(re.search(r"tensor\(([\d.e+-]+)\)", done.stdout)[1])
    assert difference < 1e-4
    assert len(code.splitlines()) <= 22


def test_named_commands_exist() -> None:
    named = set(re.findall(r"`dsv4-ascend ([a-z-]+)", README))
    assert named
    assert named <= set(COMMANDS)
