"""A completion's text back to a message: reasoning, content, tool calls (spec/v4.md 9.3, last paragraph). Strict."""

from __future__ import annotations

import re

from dsv4_ascend.model.chat import BOS, DSML, END_THINK, EOS, THINK, read_json, to_json
from dsv4_ascend.model.messages import Message
from dsv4_backend.errors import Dsv4Error

_CALLS = f"\n\n<{DSML}tool_calls>\n"
_END_CALLS = f"</{DSML}tool_calls>"
_INVOKE = re.compile(rf'<{DSML}invoke name="([^"\n]*)">\n(.*?)</{DSML}invoke>\n', re.DOTALL)
_PARAMETER = re.compile(
    rf'<{DSML}parameter name="([^"\n]*)" string="(true|false)">(.*?)</{DSML}parameter>\n', re.DOTALL
)


class CompletionError(Dsv4Error, ValueError):
    """A completion that does not follow the release's grammar."""


def parse_completion(text: str, *, thinking: bool = False) -> Message:
    """An assistant message with `content`, `reasoning_content` and `tool_calls` (OpenAI's form).

    thinking: the prompt ended with `<think>`. CompletionError names what was expected and what stands there.
    """
    text = text.removesuffix(EOS)
    reasoning = ""
    if thinking:
        reasoning, found, text = text.partition(END_THINK)
        if not found:
            raise CompletionError(f"completion: no {END_THINK} after the reasoning {_excerpt(reasoning)}")
    content, calls, rest = text.partition(_CALLS)
    for token in (BOS, EOS, THINK, END_THINK, DSML):
        if token in reasoning or token in content:
            raise CompletionError(f"completion: {token} in the middle of the text {_excerpt(reasoning + content)}")
    return {
        "role": "assistant",
        "content": content,
        "reasoning_content": reasoning,
        "tool_calls": _tool_calls(rest) if calls else [],
    }


def _tool_calls(text: str) -> list[Message]:
    calls, at = [], 0
    while match := _INVOKE.match(text, at):
        arguments = _arguments(match[1], match[2])
        calls.append({"type": "function", "function": {"name": match[1], "arguments": arguments}})
        at = match.end()
    if text[at:] != _END_CALLS or not calls:
        raise CompletionError(f"completion: expected a call or {_END_CALLS}, found {_excerpt(text[at:])}")
    return calls


def _arguments(call: str, text: str) -> str:
    """The JSON object of one call's parameters."""
    fields: dict[str, str] = {}
    at = len(text) if text == "\n" else 0  # a call without parameters has an empty line
    while match := _PARAMETER.match(text, at):
        name, is_string, value = match.groups()
        if name in fields:
            raise CompletionError(f"completion: call {call!r} has parameter {name!r} twice")
        fields[name] = to_json(value) if is_string == "true" else _literal(call, name, value)
        at = match.end()
    if at != len(text):
        raise CompletionError(f"completion: call {call!r}: expected a parameter, found {_excerpt(text[at:])}")
    return "{" + ", ".join(f"{to_json(name)}: {value}" for name, value in fields.items()) + "}"


def _literal(call: str, name: str, value: str) -> str:
    try:
        read_json(value)
    except ValueError as error:
        raise CompletionError(
            f"completion: call {call!r}: parameter {name!r} is not JSON: {_excerpt(value)}"
        ) from error
    return value


def _excerpt(text: str) -> str:
    return repr(text[:60])
