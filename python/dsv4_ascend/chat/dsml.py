"""Tool calls, tool results and tool instructions as text (spec/v4.md 9.3, rules 5, 9 and 10)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence

from dsv4_ascend.chat.markers import DSML, END_THINK, THINK
from dsv4_ascend.chat.messages import Message
from dsv4_ascend.chat.release_texts import RESPONSE_FORMAT, TOOLS, ReleaseTexts
from dsv4_backend.errors import ArgumentError

Pieces = list[str]
"""Text in order; control tokens are pieces of type `Marker`."""


_ENDS_CALL_NAME = re.compile(DSML)
_ENDS_PARAMETER_NAME = re.compile(rf'{DSML}|" string="(?:true|false)">')
"""What a name cannot hold,
as it stands unescaped: who reads the text would see the name end there.
"""


def tool_calls(calls: Sequence[Message], *, empty_line: bool) -> Pieces:
    """The block behind an answer's content. empty_line: a call without parameters has one.

    ArgumentError for a name that would be read back as something else.
    """
    pieces: Pieces = ["\n\n<", DSML, "tool_calls>\n"]
    for call in calls:
        pieces += _call(call["function"], empty_line)
    return [*pieces, "</", DSML, "tool_calls>"]


def _call(function: Message, empty_line: bool) -> Pieces:
    name = _checked("function name", function["name"], _ENDS_CALL_NAME)
    pieces: Pieces = ["<", DSML, f'invoke name="{name}">\n']
    parameters = _parameters(function["arguments"])
    for key, value in parameters.items():
        is_string = isinstance(value, str)
        name = _checked("parameter name", key, _ENDS_PARAMETER_NAME)
        pieces += [
            "<",
            DSML,
            f'parameter name="{name}" string="{"true" if is_string else "false"}">',
        ]
        pieces += [str(value) if is_string else to_json(value), "</", DSML, "parameter>\n"]
    if empty_line and not parameters:
        pieces.append("\n")
    return [*pieces, "</", DSML, "invoke>\n"]


def _checked(what: str, name: str, ends: re.Pattern[str]) -> str:
    if found := ends.search(name):
        raise ArgumentError(
            f"chat: tool_calls: {what}: found {name!r:.80}, expected a name without {found[0]}"
        )
    return name


def _parameters(arguments: str) -> Message:
    """The parameters by name;
    text that is no JSON object becomes the only parameter, `arguments`.
    """
    try:
        parsed = read_json(arguments)
    except ValueError:
        parsed = None
    return parsed if isinstance(parsed, dict) else {"arguments": arguments}


def tool_result(content: object) -> str:
    """One result;
    of a list of parts the texts, and for every other part a line that names its type.
    """
    if isinstance(content, list):
        parts = [
            p.get("text", "") if p.get("type") == "text" else f"[Unsupported {p.get('type')}]"
            for p in content
        ]
        content = "\n\n".join(parts)
    return f"<tool_result>{content}</tool_result>"


def instructions(tools: Sequence[Message], schema: object, texts: ReleaseTexts) -> Pieces:
    """Tool instructions and response format behind a system or developer text;
    empty without both.
    """
    pieces: Pieces = []
    if tools:
        schemas = "\n".join(to_json(tool["function"]) for tool in tools)
        pieces += ["\n\n"]
        pieces += texts.fill(
            TOOLS,
            "a message with tools",
            dsml_token=DSML,
            thinking_start_token=THINK,
            thinking_end_token=END_THINK,
            tool_schemas=schemas,
        )
    if schema:
        pieces += [
            "\n\n",
            *texts.fill(RESPONSE_FORMAT, "a response format", schema=to_json(schema)),
        ]
    return pieces


def read_json(text: str) -> object:
    """The value of a JSON text. ValueError if it is none.

    NaN, what no number holds (1e999) and nesting beyond Python's are none.
    """
    try:
        return json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits:.40} is beyond the range of numbers")
    return value


def to_json(value: object) -> str:
    """JSON with non-ASCII characters kept.
    ArgumentError when `value` has no JSON form, as NaN has none.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(
            f"chat: found a {type(value).__name__} without JSON form: {error}"
        ) from error
