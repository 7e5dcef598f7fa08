"""The rules of the script in the releases' encoding folder, turn by turn (spec/v4.md 9.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsv4_ascend.chat.dsml import Pieces, instructions, tool_calls, tool_result
from dsv4_ascend.chat.markers import ASSISTANT, END_THINK, EOS, REMINDER, TASKS, THINK, USER
from dsv4_ascend.chat.messages import Message, call_order
from dsv4_ascend.chat.release_texts import ReleaseTexts

_ASKING = ("user", "developer")


@dataclass(frozen=True)
class _Mode:
    thinking: bool
    drop_thinking: bool


def render(
    messages: Sequence[Message],
    earlier: Sequence[Message],
    thinking: bool,
    effort: str | None,
    drop_thinking: bool,
    texts: ReleaseTexts,
) -> Pieces:
    """What follows bos: the effort's text before the first turn, then the turns of `messages`."""
    old = _join_turns(earlier)
    turns = _order_tool_results(old + _join_turns(messages))
    done, mode = len(old), _Mode(thinking, drop_thinking)
    if thinking and drop_thinking:
        turns, done = _without_old_reasoning(turns, done)
    pieces: Pieces = []
    if turns and not earlier and thinking:
        pieces.append(texts.effort(effort, "preview"))
    for i in range(done, len(turns)):
        pieces += _render(turns, i, mode, texts)
    return pieces


def _join_turns(messages: Sequence[Message]) -> list[Message]:
    """Tool results become blocks of user turns;
    neighbouring user and tool messages share one turn.
    """
    turns: list[Message] = []
    for message in messages:
        if message["role"] not in ("user", "tool"):
            turns.append(dict(message))
            continue
        block = {"type": "text", "text": message.get("content") or ""}
        if message["role"] == "tool":
            block = {
                "type": "tool_result",
                "id": message.get("tool_call_id", ""),
                "content": message.get("content", ""),
            }
        last = turns[-1] if turns else {}
        if last.get("role") == "user" and (message["role"] == "tool" or last.get("task") is None):
            last["blocks"].append(block)
            continue
        turns.append({"role": "user", "blocks": [block], "task": message.get("task")})
    return turns


def _order_tool_results(turns: list[Message]) -> list[Message]:
    """Tool results in the order of the calls of the assistant turn before them."""
    order: dict[str, int] = {}
    for turn in turns:
        if turn["role"] == "assistant" and turn.get("tool_calls"):
            order = call_order(turn)
        elif turn["role"] == "user":
            results = iter(
                sorted(
                    (b for b in turn["blocks"] if b["type"] == "tool_result"),
                    key=lambda b: order.get(b["id"], 0),
                )
            )
            turn["blocks"] = [
                next(results) if b["type"] == "tool_result" else b for b in turn["blocks"]
            ]
    return turns


def _last_question(turns: Sequence[Message]) -> int:
    return max((i for i, turn in enumerate(turns) if turn["role"] in _ASKING), default=-1)


def _without_old_reasoning(turns: list[Message], done: int) -> tuple[list[Message], int]:
    """Before the last question: no reasoning of the assistant and no developer turns.
    `done` turns stay encoded.
    """
    last = _last_question(turns)
    dropped = [i for i, turn in enumerate(turns) if i < last and turn["role"] == "developer"]
    kept = [
        {**turn, "reasoning_content": None} if i < last and turn["role"] == "assistant" else turn
        for i, turn in enumerate(turns)
        if i not in dropped
    ]
    return kept, done - sum(i < done for i in dropped)


def _render(turns: list[Message], i: int, mode: _Mode, texts: ReleaseTexts) -> Pieces:
    """One turn and what opens the next."""
    turn, last = turns[i], _last_question(turns)
    task_before = i > 0 and turns[i - 1].get("task") is not None
    content = str(turn.get("content") or "")
    match turn["role"]:
        case "system":
            body = [content, *_extras(turn, texts)]
        case "developer":
            body = [USER, content, *_extras(turn, texts)]
        case "user":
            body = [USER, "\n\n".join(_block(b) for b in turn["blocks"])]
        case "latest_reminder":
            body = [REMINDER, content]
        case _:
            body = _answer(
                turn, mode, keep=not task_before and (not mode.drop_thinking or i > last)
            )
    following = turns[i + 1]["role"] if i + 1 < len(turns) else None
    if following not in (None, "assistant", "latest_reminder"):
        return body
    return body + _opening(turn, mode, reason=not mode.drop_thinking or i >= last)


def _extras(turn: Message, texts: ReleaseTexts) -> Pieces:
    return instructions(turn.get("tools") or (), turn.get("response_format"), texts)


def _opening(turn: Message, mode: _Mode, *, reason: bool) -> Pieces:
    """What follows a turn when the assistant (or nothing yet) comes next."""
    task = turn.get("task")
    if task == "action":
        return [ASSISTANT, THINK if mode.thinking else END_THINK, TASKS[task]]
    if task is not None:
        return [TASKS[task]]
    if turn["role"] not in _ASKING:
        return []
    return [ASSISTANT, THINK if mode.thinking and reason else END_THINK]


def _block(block: Message) -> str:
    return str(block["text"]) if block["type"] == "text" else tool_result(block["content"])


def _answer(turn: Message, mode: _Mode, *, keep: bool) -> Pieces:
    pieces: Pieces = (
        [str(turn.get("reasoning_content") or ""), END_THINK] if mode.thinking and keep else []
    )
    pieces.append(str(turn.get("content") or ""))
    if calls := turn.get("tool_calls"):
        pieces += tool_calls(calls, empty_line=True)
    return pieces if turn.get("wo_eos") else [*pieces, EOS]
