"""Literal prompt texts of a release (tool instructions, effort preambles),
read from the checkpoint, never invented.

The release ships them as string constants of `encoding/encoding_dsv4.py`. The file is parsed, not
executed: only module-level assignments of constant strings, and of dicts of them, are read.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dsv4_ascend.checkpoint.strict_json import read_regular
from dsv4_backend.errors import ArgumentError, CheckpointError

FOLDER = "encoding"
TOOLS = "TOOLS_TEMPLATE"
RESPONSE_FORMAT = "response_format_template"
EFFORT = "REASONING_EFFORT_"
EFFORTS, DEFAULT_EFFORT = "REASONING_EFFORT_PROMPTS", "DEFAULT_REASONING_EFFORT"
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class ReleaseTexts:
    """String constants by name, where they were looked for, and dicts of strings by name."""

    constants: Mapping[str, str] = field(default_factory=dict)
    source: str = "no checkpoint folder"
    tables: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @classmethod
    def from_folder(cls, folder: Path) -> ReleaseTexts:
        """Read `encoding/encoding_dsv4*.py` of a checkpoint, if it has any.
        CheckpointError if one is not Python.
        """
        constants: dict[str, str] = {}
        tables: dict[str, dict[str, str]] = {}
        for path in sorted((folder / FOLDER).glob("encoding_dsv4*.py")):
            try:
                tree = ast.parse(read_regular(path, _MAX_BYTES).decode("utf-8"))
            except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
                raise CheckpointError(f"{path}: not a Python file: {error}") from error
            for name, value in _assignments(tree):
                if (text := _string(value)) is not None:
                    constants[name] = text
                elif (table := _table(value)) is not None:
                    tables[name] = table
        return cls(constants, str(folder / FOLDER), tables)

    def text(self, name: str, purpose: str) -> str:
        """A text that is needed for `purpose`.
        CheckpointError when the release did not bring it.
        """
        if name not in self.constants:
            raise CheckpointError(
                f"{self.source}: no text {name}, which {purpose} needs; copy the release's "
                "encoding folder there"
            )
        return self.constants[name]

    def fill(self, name: str, purpose: str, **values: str) -> list[str]:
        """A template cut at its `{placeholders}`, with their values;
        nothing else, values least, is interpreted.
        """
        cut = re.split("({(?:" + "|".join(values) + ")})", self.text(name, purpose))
        return [values[part[1:-1]] if i % 2 else part for i, part in enumerate(cut)]

    def check_effort(self, effort: str | None, revision: str) -> None:
        """ArgumentError for a level that neither the release's script nor the revision knows."""
        known = {"recipe": ("low", "high", "xhigh", "max"), "preview": self._script_levels()}[
            revision
        ]
        if effort is not None and effort not in known:
            levels = f"{', '.join(known[:-1])} or {known[-1]}"
            raise ArgumentError(
                f"chat: reasoning effort {effort!r:.40}, expected {levels} ({self.source})"
            )

    def effort(self, effort: str | None, revision: str) -> str:
        """The text before a thinking conversation.
        CheckpointError when the release did not bring it.
        """
        if revision == "recipe":
            level = {None: "high", "xhigh": "high"}.get(effort, str(effort))
            return "" if level == "low" else self._table_effort(level)
        if EFFORTS in self.tables:
            level = effort or self.constants.get(DEFAULT_EFFORT, "low")
            return self.tables[EFFORTS].get(level, "")
        if effort == "max":
            return self.text(EFFORT + "MAX", "reasoning effort max")
        return self.constants.get(EFFORT + str(effort).upper(), "")

    def _script_levels(self) -> tuple[str, ...]:
        """Levels of the folder's table;
        without one, those of the preview's script and of further constants.
        """
        if self.tables.get(EFFORTS):
            return tuple(self.tables[EFFORTS])
        named = [level for level in ("low", "medium") if EFFORT + level.upper() in self.constants]
        return (*named, "high", "max")

    def _table_effort(self, level: str) -> str:
        table = self.tables.get(EFFORTS, {})
        if level not in table:
            raise CheckpointError(
                f"{self.source}: no text {EFFORTS}[{level!r}], which reasoning effort {level} "
                "needs with revision recipe; copy the encoding folder of a release from 0731 on "
                "there, or choose effort low"
            )
        return table[level]


def _assignments(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """Name and value of every module-level assignment."""
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((t.id, node.value) for t in targets if isinstance(t, ast.Name))


def _string(node: ast.expr | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _table(node: ast.expr) -> dict[str, str] | None:
    if not isinstance(node, ast.Dict):
        return None
    pairs = [
        (_string(key), _string(value)) for key, value in zip(node.keys, node.values, strict=True)
    ]
    table = {key: value for key, value in pairs if key is not None and value is not None}
    return table if len(table) == len(pairs) else None
