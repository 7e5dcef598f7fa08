"""`dsv4-ascend softnpu -- COMMAND`: handed over to the distribution softnpu,
whose options it has.
"""

from __future__ import annotations

import shlex
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[3] / "csrc" / "softnpu"
"""Of an editable installation; the packages of others lie elsewhere."""


def softnpu(arguments: list[str]) -> str:
    """Run a command on the software Ascend device in the place of this process.

    `arguments`: the command line behind `softnpu`. Returns what kept it from running; usage errors
    leave with code 2.
    """
    try:
        from softnpu.command import call
        from softnpu.errors import SoftnpuError
    except ImportError as error:
        # The latter: a folder that only has its name.
        missing = error.name in ("softnpu", "softnpu.command")
        return how_to_install() if missing else f"softnpu does not load: {error}; install it again"
    try:
        call(arguments, "dsv4-ascend softnpu")
    except SoftnpuError as error:
        return str(error)


def how_to_install() -> str:
    """What to type, in one sentence."""
    if (SOURCES / "pyproject.toml").is_file():
        where = f"pip install {shlex.quote(str(SOURCES))}"
    else:
        where = "pip install ./csrc/softnpu in a checkout of dsv4-ascend"
    return (
        f"softnpu, the software Ascend device, is not installed: {where} "
        "(it compiles for about five minutes)"
    )
