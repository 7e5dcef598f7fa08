"""devices.toml and formats.toml as they stand."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Table = Mapping[str, Any]


def _load(name: str) -> Table:
    text = (Path(__file__).parent / name).read_text(encoding="utf-8")
    return tomllib.loads(text)


DEVICES = _load("devices.toml")
"""`devices`, `presets`, `common`."""
FORMATS = _load("formats.toml")
"""`precisions`, `caches`, `blocks`, `exchange`."""
