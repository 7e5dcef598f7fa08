"""The command line: one module per command, plus the few helpers they share."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

GOOD, FINDINGS, USAGE, ENVIRONMENT, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit codes."""

_PIPED_WIDTH = 160


def console(stderr: bool = False) -> Console:
    """A console that colours on a terminal only
    and does not squeeze tables into 80 columns when piped.
    """
    from rich.console import Console

    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, highlight=False, width=None if terminal else _PIPED_WIDTH)


def print_json(data: dict[str, Any]) -> None:
    """Print one JSON object on standard output."""
    print(json.dumps(data, indent=2, allow_nan=False))
