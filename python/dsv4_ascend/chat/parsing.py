"""A completion's text back to a message: reasoning, content,
tool calls (spec/v4.md 9.3, last paragraph). Strict.
"""

from __future__ import annotations

import re

from dsv4_ascend.arguments import flag
from dsv4_ascend.chat.dsml import read_json, to_json
from dsv4_ascend.chat.markers import BOS, DSML, END_THINK, EOS, THINK
from dsv4_ascend.chat.messages import Message
from dsv4_backend.errors import ArgumentError, Dsv4Error

_CALLS = f"\n\n<{DSML}tool_calls>\n"
_END_CALLS = f"</{DSML}tool_calls>"
_END_CALL = f"</{DSML}invoke>"
_END_PARAMETER = f"</{DSML}parameter"
_NO_DSML = f"(?:(?!{DSML}).)*"
_CALL = re.compile(rf'<{DSML}invoke name="({_NO_DSML})">\n(?:\n(?={_END_CALL}))?', re.DOTALL)
_PARAMETER = re.compile(rf'<{DSML}parameter name="({_NO_DSML}?)" string="(true|false)">', re.DOTALL)


class CompletionError(Dsv4Error, ValueError):
    """A completion that does not follow the release's grammar."""


def parse_completion(text: str, *, thinking: bool = False) -> Message:
    """An assistant message with `content`, `reasoning_content` and `tool_calls` (OpenAI's form).

    A call's name ends at the last quote before its parameters, a parameter's at the first quote
    that its `string` follows, a value at its first closing tag, whatever stands between. thinking:
    the prompt ended with `<think>`. CompletionError names what was expected and what stands there;
    ArgumentError for arguments of another type.
    """
    if not isinstance(text, str):
        raise ArgumentError(f"completion: found {text!r:.40}, expected a string")
    text = text.removesuffix(EOS)
    reasoning = ""
    if flag("completion: thinking", thinking):
        reasoning, found, text = text.partition(END_THINK)
        if not found:
            raise CompletionError(
                f"completion: no {END_THINK} after the reasoning {_excerpt(reasoning)}"
            )
    content, calls, rest = text.partition(_CALLS)
    for token in (BOS, EOS, THINK, END_THINK, DSML):
        if token in reasoning or token in content:
            raise CompletionError(
                f"completion: {token} in the middle of the text {_excerpt(reasoning + content)}"
            )
    return {
        "role": "assistant",
        "content": content,
        "reasoning_content": reasoning,
        "tool_calls": _tool_calls(rest) if calls else [],
    }


def _tool_calls(text: str) -> list[Message]:
    calls: list[Message] = []
    at = 0
    while match := _CALL.match(text, at):
        name = match[1]
        arguments, at = _arguments(name, text, match.end())
        at = _after(
            text, at, f"{_END_CALL}\n", f"call {name!r:.40}: expected a parameter or {_END_CALL}"
        )
        calls.append({"type": "function", "function": {"name": name, "arguments": arguments}})
    if text[at:] != _END_CALLS or not calls:
        raise CompletionError(
            f"completion: expected a call or {_END_CALLS}, found {_excerpt(text[at:])}"
        )
    return calls


def _arguments(call: str, text: str, at: int) -> tuple[str, int]:
    """(JSON object of the parameters that begin at `at`, where they end)."""
    fields: dict[str, str] = {}
    while match := _PARAMETER.match(text, at):
        name, is_string = match.groups()
        where = f"call {call!r:.40}: parameter {name!r:.40}"
        end = text.find(_END_PARAMETER, match.end())
        if end < 0:
            raise CompletionError(
                f"completion: {where}: no {_END_PARAMETER} after {_excerpt(text[match.end() :])}"
            )
        if name in fields:
            raise CompletionError(f"completion: call {call!r:.40} has parameter {name!r:.40} twice")
        value = text[match.end() : end]
        fields[name] = to_json(value) if is_string == "true" else _literal(where, value)
        at = _after(
            text,
            end + len(_END_PARAMETER),
            ">\n",
            f"{where}: expected '>' and a newline after {_END_PARAMETER}",
        )
    return "{" + ", ".join(f"{to_json(name)}: {value}" for name, value in fields.items()) + "}", at


def _after(text: str, at: int, expected: str, problem: str) -> int:
    """Where the text goes on behind `expected`, which must stand at `at`."""
    if not text.startswith(expected, at):
        raise CompletionError(f"completion: {problem}, found {_excerpt(text[at : at + 60])}")
    return at + len(expected)


def _literal(where: str, value: str) -> str:
    try:
        read_json(value)
    except ValueError as error:
        raise CompletionError(f"completion: {where} is not JSON: {_excerpt(value)}") from error
    return value


def _excerpt(text: str) -> str:
    return repr(text[:60])
