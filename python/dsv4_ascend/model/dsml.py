"""Tool calls, tool results and tool instructions as text (spec/v4.md 9.3, rules 5, 9 and 10)."""

from __future__ import annotations

import json
from collections.abc import Sequence

from dsv4_ascend.model.markers import DSML, END_THINK, THINK
from dsv4_ascend.model.messages import Message
from dsv4_ascend.model.release_texts import RESPONSE_FORMAT, TOOLS, ReleaseTexts
from dsv4_backend.errors import ArgumentError

Pieces = list[str]
"""Text in order; control tokens are pieces of type `Marker`."""


def tool_calls(calls: Sequence[Message], *, empty_line: bool) -> Pieces:
    """The block behind an answer's content. empty_line: a call without parameters has one."""
    pieces: Pieces = ["\n\n<", DSML, "tool_calls>\n"]
    for call in calls:
        pieces += _call(call["function"], empty_line)
    return [*pieces, "</", DSML, "tool_calls>"]


def _call(function: Message, empty_line: bool) -> Pieces:
    pieces: Pieces = ["<", DSML, f'invoke name="{function["name"]}">\n']
    parameters = _parameters(function["arguments"])
    for key, value in parameters.items():
        is_string = isinstance(value, str)
        pieces += ["<", DSML, f'parameter name="{key}" string="{"true" if is_string else "false"}">']
        pieces += [str(value) if is_string else to_json(value), "</", DSML, "parameter>\n"]
    if empty_line and not parameters:
        pieces.append("\n")
    return [*pieces, "</", DSML, "invoke>\n"]


def _parameters(arguments: str) -> Message:
    """The parameters by name; text that is no JSON object becomes the only parameter, `arguments`."""
    try:
        parsed = read_json(arguments)
    except ValueError:
        parsed = None
    return parsed if isinstance(parsed, dict) else {"arguments": arguments}


def tool_result(content: object) -> str:
    """One result; of a list of parts the texts, and for every other part a line that names its type."""
    if isinstance(content, list):
        parts = [p.get("text", "") if p.get("type") == "text" else f"[Unsupported {p.get('type')}]" for p in content]
        content = "\n\n".join(parts)
    return f"<tool_result>{content}</tool_result>"


def instructions(tools: Sequence[Message], schema: object, texts: ReleaseTexts) -> Pieces:
    """Tool instructions and response format behind a system or developer text; empty without both."""
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
        pieces += ["\n\n", *texts.fill(RESPONSE_FORMAT, "a response format", schema=to_json(schema))]
    return pieces


def read_json(text: str) -> object:
    """The value of a JSON text. ValueError if it is none: NaN and infinities, and nesting beyond Python's, count."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def to_json(value: object) -> str:
    """JSON with non-ASCII characters kept. ArgumentError when `value` has no JSON form."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(f"chat: found a {type(value).__name__} without JSON form: {error}") from error
