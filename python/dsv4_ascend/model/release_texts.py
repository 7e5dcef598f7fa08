"""Literal prompt texts of a release (tool instructions, effort preambles), read from the checkpoint, never invented.

The release ships them as string constants of `encoding/encoding_dsv4.py`. The file is parsed, not executed: only
module-level assignments of constant strings are read.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dsv4_ascend.model.strict_json import read_regular
from dsv4_backend.errors import CheckpointError

FOLDER = "encoding"
TOOLS = "TOOLS_TEMPLATE"
RESPONSE_FORMAT = "response_format_template"
EFFORT = "REASONING_EFFORT_"
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class ReleaseTexts:
    """String constants by name, and where they were looked for."""

    constants: Mapping[str, str] = field(default_factory=dict)
    source: str = "no checkpoint folder"

    @classmethod
    def from_folder(cls, folder: Path) -> ReleaseTexts:
        """Read `encoding/encoding_dsv4*.py` of a checkpoint, if it has any. CheckpointError if one is not Python."""
        constants: dict[str, str] = {}
        for path in sorted((folder / FOLDER).glob("encoding_dsv4*.py")):
            try:
                tree = ast.parse(read_regular(path, _MAX_BYTES).decode("utf-8"))
            except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
                raise CheckpointError(f"{path}: not a Python file: {error}") from error
            constants.update(_string_constants(tree))
        return cls(constants, str(folder / FOLDER))

    def text(self, name: str, purpose: str) -> str:
        """A text that is needed for `purpose`. CheckpointError when the release did not bring it."""
        if name not in self.constants:
            raise CheckpointError(
                f"{self.source}: no text {name}, which {purpose} needs; copy the release's encoding folder there"
            )
        return self.constants[name]

    def fill(self, name: str, purpose: str, **values: str) -> str:
        """A template with its `{placeholders}` replaced, and nothing else interpreted."""
        text = self.text(name, purpose)
        for key, value in values.items():
            text = text.replace("{" + key + "}", value)
        return text


def _string_constants(tree: ast.Module) -> dict[str, str]:
    found = {}
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found.update({t.id: node.value.value for t in targets if isinstance(t, ast.Name)})
    return found
