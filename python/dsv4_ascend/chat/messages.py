"""Chat messages in OpenAI's form:
which fields the encoding reads and what they may hold (spec/v4.md 9).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsv4_ascend.chat.markers import TASKS
from dsv4_backend.errors import ArgumentError

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "tool", "assistant", "latest_reminder")


def check_messages(messages: Sequence[Message]) -> None:
    """ArgumentError for the first message that the encoding could not read,
    with its number, field and content.
    """
    _expect(isinstance(messages, list | tuple), "messages", messages, "a list of dicts")
    for i, message in enumerate(messages):
        where = f"message {i}"
        _expect(isinstance(message, dict), where, message, "a dict")
        role = message.get("role")
        _expect(role in ROLES, f"{where}: role", role, f"one of {', '.join(ROLES)}")
        task = message.get("task")
        _expect(task in (None, *TASKS), f"{where}: task", task, f"one of {', '.join(TASKS)}")
        _check_content(f"{where} ({role}): content", message)
        for field in ("reasoning_content", "tool_call_id"):
            value = message.get(field)
            _expect(value is None or isinstance(value, str), f"{where}: {field}", value, "a string")
        _check_tools(where, message)


def _check_content(where: str, message: Message) -> None:
    content = message.get("content")
    match message["role"]:
        case "assistant":
            _expect(content is None or isinstance(content, str), where, content, "a string or None")
        case "system" if message.get("tools") or message.get("response_format"):
            _expect(content is None or isinstance(content, str), where, content, "a string or None")
        case "developer":
            _expect(
                isinstance(content, str) and content != "",
                where,
                content,
                "a string that is not empty",
            )
        case "tool" if isinstance(content, list):
            for part in content:
                readable = isinstance(part, dict) and isinstance(part.get("type"), str)
                _expect(readable, where, part, "parts with a type")
                _expect(
                    part["type"] != "text" or isinstance(part.get("text"), str),
                    where,
                    part,
                    "text in a text part",
                )
        case _:
            _expect(isinstance(content, str), where, content, "a string")


def _check_tools(where: str, message: Message) -> None:
    for field in ("tools", "tool_calls"):
        entries = message.get(field)
        _expect(
            entries is None or isinstance(entries, list | tuple),
            f"{where}: {field}",
            entries,
            "a list",
        )
        for j, entry in enumerate(entries or ()):
            function = entry.get("function") if isinstance(entry, dict) else None
            _expect(
                isinstance(function, dict),
                f"{where}: {field}[{j}]",
                entry,
                "a dict with the dict 'function'",
            )
    for j, call in enumerate(message.get("tool_calls") or ()):
        at = f"{where}: tool_calls[{j}]"
        for holder, name in ((call, "id"), (call["function"], "function id")):
            _expect(
                isinstance(holder.get("id"), str | None),
                f"{at}: {name}",
                holder.get("id"),
                "a string",
            )
        for field in ("name", "arguments"):
            value = call["function"].get(field)
            _expect(isinstance(value, str), f"{at}: function {field}", value, "a string")


def call_order(answer: Message) -> dict[str, int]:
    """Number of every tool call of an assistant's answer by its id,
    which stands beside the function or in it.
    """
    ids = (call.get("id") or call["function"].get("id") for call in answer["tool_calls"])
    return {identity: number for number, identity in enumerate(ids) if identity}


def _expect(good: bool, where: str, found: object, expected: str) -> None:
    if not good:
        raise ArgumentError(f"chat: {where}: found {_short(found)}, expected {expected}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
