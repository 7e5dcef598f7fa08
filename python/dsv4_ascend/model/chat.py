"""Messages to prompt text, as the release encodes them (spec/v4.md 9). Messages are dicts in OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from dsv4_ascend.model.messages import Message, check_messages
from dsv4_ascend.model.release_texts import EFFORT, RESPONSE_FORMAT, TOOLS, ReleaseTexts
from dsv4_backend.errors import ArgumentError

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT, REMINDER = "<｜User｜>", "<｜Assistant｜>", "<｜latest_reminder｜>"
THINK, END_THINK, DSML = "<think>", "</think>", "｜DSML｜"
_ASKING = ("user", "developer")


@dataclass(frozen=True)
class ChatMode:
    """thinking: the assistant reasons before it answers. effort: "low", "high" or "max" (9.2).

    drop_thinking: reasoning of earlier turns is removed; forced off when any message carries tools.
    """

    thinking: bool = False
    effort: str | None = None
    drop_thinking: bool = True


def encode_messages(
    messages: Sequence[Message],
    mode: ChatMode | None = None,
    texts: ReleaseTexts | None = None,
    *,
    earlier: Sequence[Message] = (),
) -> str:
    """The prompt for `messages`, which follow `earlier` ones that are encoded already.

    ArgumentError names a bad message; CheckpointError a literal text that the release did not bring.
    """
    chat, release = mode or ChatMode(), texts or ReleaseTexts()
    if chat.effort not in (None, "low", "high", "max"):
        raise ArgumentError(f"chat: reasoning effort {chat.effort!r}, expected low, high or max")
    check_messages(messages)
    check_messages(earlier)
    old = _join_turns(earlier)
    turns = _order_tool_results(old + _join_turns(messages))
    done = len(old)
    if any(m.get("tools") for m in (*earlier, *messages)):
        chat = ChatMode(chat.thinking, chat.effort, drop_thinking=False)
    if chat.thinking and chat.drop_thinking:
        turns, done = _without_old_reasoning(turns, done)
    prompt = "" if earlier else BOS
    if turns and not earlier and chat.thinking:
        prompt += _effort_preamble(chat, release)
    return prompt + "".join(_render(turns, i, chat, release) for i in range(done, len(turns)))


def _effort_preamble(mode: ChatMode, texts: ReleaseTexts) -> str:
    if mode.effort == "max":
        return texts.text(EFFORT + "MAX", "reasoning effort max")
    return texts.constants.get(EFFORT + str(mode.effort).upper(), "")


def _join_turns(messages: Sequence[Message]) -> list[Message]:
    """Tool results become blocks of user turns; neighbouring user and tool messages share one turn."""
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
            order = {call["id"]: i for i, call in enumerate(turn["tool_calls"]) if call.get("id")}
        elif turn["role"] == "user":
            results = iter(
                sorted((b for b in turn["blocks"] if b["type"] == "tool_result"), key=lambda b: order.get(b["id"], 0))
            )
            turn["blocks"] = [next(results) if b["type"] == "tool_result" else b for b in turn["blocks"]]
    return turns


def _last_question(turns: Sequence[Message]) -> int:
    return max((i for i, turn in enumerate(turns) if turn["role"] in _ASKING), default=-1)


def _without_old_reasoning(turns: list[Message], done: int) -> tuple[list[Message], int]:
    """Before the last question: no reasoning of the assistant and no developer turns. `done` turns stay encoded."""
    last = _last_question(turns)
    dropped = [i for i, turn in enumerate(turns) if i < last and turn["role"] == "developer"]
    kept = [
        {**turn, "reasoning_content": None} if i < last and turn["role"] == "assistant" else turn
        for i, turn in enumerate(turns)
        if i not in dropped
    ]
    return kept, done - sum(i < done for i in dropped)


def _render(turns: list[Message], i: int, mode: ChatMode, texts: ReleaseTexts) -> str:
    """One turn and what opens the next."""
    turn, last = turns[i], _last_question(turns)
    task_before = i > 0 and turns[i - 1].get("task") is not None
    content = str(turn.get("content") or "")
    match turn["role"]:
        case "system":
            body = content + _extras(turn, texts)
        case "developer":
            body = USER + content + _extras(turn, texts)
        case "user":
            body = USER + "\n\n".join(_block(b) for b in turn["blocks"])
        case "latest_reminder":
            body = REMINDER + content
        case _:
            body = _answer(turn, mode, keep=not task_before and (not mode.drop_thinking or i > last))
    following = turns[i + 1]["role"] if i + 1 < len(turns) else None
    if following not in (None, "assistant", "latest_reminder"):
        return body
    return body + _opening(turn, mode, reason=not mode.drop_thinking or i >= last)


def _opening(turn: Message, mode: ChatMode, *, reason: bool) -> str:
    """What follows a turn when the assistant (or nothing yet) comes next."""
    task = turn.get("task")
    if task == "action":
        return ASSISTANT + (THINK if mode.thinking else END_THINK) + f"<｜{task}｜>"
    if task is not None:
        return f"<｜{task}｜>"
    if turn["role"] not in _ASKING:
        return ""
    return ASSISTANT + (THINK if mode.thinking and reason else END_THINK)


def _block(block: Message) -> str:
    if block["type"] == "text":
        return str(block["text"])
    content = block["content"]
    if isinstance(content, list):
        parts = [p.get("text", "") if p.get("type") == "text" else f"[Unsupported {p.get('type')}]" for p in content]
        content = "\n\n".join(parts)
    return f"<tool_result>{content}</tool_result>"


def _extras(turn: Message, texts: ReleaseTexts) -> str:
    """Tool instructions and response format behind a system or developer text."""
    extras = ""
    if tools := turn.get("tools"):
        schemas = "\n".join(to_json(tool["function"]) for tool in tools)
        extras += "\n\n" + texts.fill(
            TOOLS,
            "a message with tools",
            dsml_token=DSML,
            thinking_start_token=THINK,
            thinking_end_token=END_THINK,
            tool_schemas=schemas,
        )
    if schema := turn.get("response_format"):
        extras += "\n\n" + texts.fill(RESPONSE_FORMAT, "a response format", schema=to_json(schema))
    return extras


def _answer(turn: Message, mode: ChatMode, *, keep: bool) -> str:
    reasoning = (turn.get("reasoning_content") or "") + END_THINK if mode.thinking and keep else ""
    calls = "\n".join(_call(c["function"]) for c in turn.get("tool_calls") or ())
    block = f"\n\n<{DSML}tool_calls>\n{calls}\n</{DSML}tool_calls>" if calls else ""
    return reasoning + (turn.get("content") or "") + block + ("" if turn.get("wo_eos") else EOS)


def _call(function: Message) -> str:
    lines = [
        f'<{DSML}parameter name="{key}" string="{"true" if isinstance(value, str) else "false"}">'
        f"{value if isinstance(value, str) else to_json(value)}</{DSML}parameter>"
        for key, value in _parameters(function["arguments"]).items()
    ]
    return f'<{DSML}invoke name="{function["name"]}">\n' + "\n".join(lines) + f"\n</{DSML}invoke>"


def _parameters(arguments: str) -> Message:
    """The parameters by name; text that is no JSON object becomes the only parameter, `arguments`."""
    try:
        parsed = read_json(arguments)
    except ValueError:
        parsed = None
    return parsed if isinstance(parsed, dict) else {"arguments": arguments}


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
