"""The rules of DeepSeek's later request library for V4;
`ChatMode` lists what differs from the releases' script.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dsv4_ascend.chat.dsml import Pieces, instructions, tool_calls, tool_result
from dsv4_ascend.chat.markers import ASSISTANT, END_THINK, EOS, REMINDER, THINK, USER
from dsv4_ascend.chat.messages import Message, call_order
from dsv4_ascend.chat.release_texts import ReleaseTexts
from dsv4_backend.errors import ArgumentError


def render(
    messages: Sequence[Message], thinking: bool, effort: str | None, texts: ReleaseTexts
) -> Pieces:
    """What follows bos. ArgumentError for what this revision does not know."""
    for i, message in enumerate(messages):
        _check(i, message)
    tools = [tool for message in messages for tool in message.get("tools") or ()]
    formats = [message["response_format"] for message in messages if message.get("response_format")]
    pieces: Pieces = [texts.effort(effort, "recipe")] if thinking else []
    pieces.append(_joined(m.get("content") for m in messages if m["role"] == "system"))
    pieces += instructions(tools, formats[-1] if formats else None, texts)
    turns = [message for message in messages if message["role"] != "system"]
    for i, turn in enumerate(turns):
        if turn["role"] == "latest_reminder":
            pieces += [REMINDER, str(turn["content"])]
        elif turn["role"] == "assistant":
            pieces += _answer(turn, thinking, has_tools=bool(tools), last=i + 1 == len(turns))
        elif turn["role"] == "tool" and not _continues(turns, i, "tool"):
            pieces += [USER, *_results(turns, i)]
        elif turn["role"] == "user" and not _continues(turns, i, "user"):
            pieces += [
                "\n\n" if _continues(turns, i, "tool") else USER,
                _joined(t["content"] for t in _run(turns, i)),
            ]
    if not (turns and _is_open(turns[-1])):
        pieces += [ASSISTANT, THINK if thinking else END_THINK]
    return pieces


def _check(i: int, message: Message) -> None:
    if message["role"] == "developer" or message.get("task") is not None:
        found = "role developer" if message["role"] == "developer" else f"task {message['task']}"
        raise ArgumentError(
            f"chat: message {i}: found {found}, expected neither with revision recipe; use preview"
        )
    form = message.get("response_format")
    if isinstance(form, dict) and form.get("type") == "json_object":
        raise ArgumentError(
            f"chat: message {i}: response_format: found type json_object, expected a JSON schema: "
            "the release's folder has no text for it"
        )


def _joined(texts: Iterable[str | None]) -> str:
    return "\n\n".join(str(text) for text in texts if text)


def _run(turns: Sequence[Message], start: int) -> list[Message]:
    """The messages of one role that begin at `start`."""
    end = start
    while end < len(turns) and turns[end]["role"] == turns[start]["role"]:
        end += 1
    return list(turns[start:end])


def _continues(turns: Sequence[Message], i: int, role: str) -> bool:
    return i > 0 and turns[i - 1]["role"] == role


def _results(turns: Sequence[Message], start: int) -> Pieces:
    """A run of tool results, in the order of the calls of the last assistant turn before it."""
    before = [
        turn for turn in turns[:start] if turn["role"] == "assistant" and turn.get("tool_calls")
    ]
    order = call_order(before[-1]) if before else {}
    results = sorted(
        _run(turns, start), key=lambda message: order.get(message.get("tool_call_id") or "", 0)
    )
    return ["\n\n".join(tool_result(message["content"]) for message in results)]


def _is_open(turn: Message) -> bool:
    return turn["role"] == "assistant" and bool(turn.get("prefix") or turn.get("wo_eos"))


def _answer(turn: Message, thinking: bool, *, has_tools: bool, last: bool) -> Pieces:
    content, prefix = turn.get("content") or "", _is_open(turn)
    reasoning = turn.get("reasoning_content") if has_tools or prefix else None
    pieces: Pieces = [ASSISTANT]
    if reasoning is not None:
        pieces += [THINK, str(reasoning)]
    if not (prefix and thinking and not content):
        # Such an answer is continued inside its reasoning.
        pieces.append(END_THINK)
    pieces.append(str(content))
    if calls := turn.get("tool_calls"):
        pieces += tool_calls(calls, empty_line=False)
    return pieces if prefix and last else [*pieces, EOS]
