"""Prompt encoding rule by rule (spec/v4.md 9.3), with expected strings written by hand."""

from __future__ import annotations

import pytest
from chat_turns import BOS, CLOCK, EOS, WEATHER, assistant, call, tool, user

from dsv4_ascend.chat.encoding import ChatMode, encode_messages
from dsv4_ascend.chat.release_texts import ReleaseTexts
from dsv4_backend.errors import ArgumentError

THINKING = ChatMode(thinking=True)
KEEP = ChatMode(thinking=True, drop_thinking=False)


# Rule 1: joining and ordering.


def test_user_and_tool_messages_join_one_turn() -> None:
    assert encode_messages([user("one"), tool("two"), user("three")]) == (
        f"{BOS}<｜User｜>one\n\n<tool_result>two</tool_result>\n\nthree<｜Assistant｜></think>"
    )


def test_a_task_keeps_user_messages_apart() -> None:
    assert encode_messages([user("one", task="title"), user("two")]) == (
        f"{BOS}<｜User｜>one<｜User｜>two<｜Assistant｜></think>"
    )


def test_tool_results_follow_the_order_of_the_calls() -> None:
    calls = [call("f", "{}", "a"), call("g", "{}", "b")]
    text = encode_messages(
        [assistant("", calls=calls), tool("B", "b"), user("and"), tool("A", "a")]
    )
    assert text.endswith(
        f"{EOS}<｜User｜><tool_result>A</tool_result>\n\nand\n\n<tool_result>B</tool_result><｜Assistant｜></think>"
    )


def test_a_call_may_carry_its_id_in_the_function() -> None:
    calls = [call("f", "{}"), call("g", "{}")]
    for entry, identity in zip(calls, "ab", strict=True):
        entry["function"]["id"] = identity
    text = encode_messages([assistant("", calls=calls), tool("B", "b"), tool("A", "a")])
    assert text.endswith(
        "<tool_result>A</tool_result>\n\n<tool_result>B</tool_result><｜Assistant｜></think>"
    )


# Rule 2: BOS.


def test_bos_only_without_earlier_context() -> None:
    assert encode_messages([]) == BOS
    assert encode_messages([user("hi")]) == f"{BOS}<｜User｜>hi<｜Assistant｜></think>"
    follow = [user("hi"), assistant("ho")]
    assert (
        encode_messages([user("more")], earlier=follow) == "<｜User｜>more<｜Assistant｜></think>"
    )


@pytest.mark.parametrize("mode", [ChatMode(), KEEP])
def test_a_conversation_in_pieces_is_the_whole(mode: ChatMode) -> None:
    turns = [
        user("a"),
        assistant("b", "r"),
        {"role": "latest_reminder", "content": "now"},
        user("c"),
        assistant("d"),
    ]
    whole = encode_messages(turns[:1], mode) + encode_messages(turns[1:2], mode, earlier=turns[:1])
    whole += encode_messages(turns[2:], mode, earlier=turns[:2])
    assert whole == encode_messages(turns, mode)


def test_a_new_turn_is_rendered_after_a_developer_turn_that_falls_away() -> None:
    earlier = [{"role": "developer", "content": "x"}, assistant("y", "why")]
    assert (
        encode_messages([user("z")], THINKING, earlier=earlier)
        == "<｜User｜>z<｜Assistant｜><think>"
    )


# Rule 3: dropping old reasoning.

TWO_ROUNDS = [
    {"role": "developer", "content": "rules"}, user("q1"), assistant("a1", "r1"), user("q2"),
    assistant("a2", "r2"),
]  # fmt: skip


def test_old_reasoning_and_developer_turns_are_dropped() -> None:
    assert encode_messages(TWO_ROUNDS, THINKING) == (
        f"{BOS}<｜User｜>q1<｜Assistant｜></think>a1{EOS}<｜User｜>q2<｜Assistant｜><think>r2</think>a2{EOS}"
    )


def test_all_reasoning_stays_when_asked() -> None:
    assert encode_messages(TWO_ROUNDS, KEEP) == (
        f"{BOS}<｜User｜>rules<｜User｜>q1<｜Assistant｜><think>r1</think>a1{EOS}"
        f"<｜User｜>q2<｜Assistant｜><think>r2</think>a2{EOS}"
    )


@pytest.mark.parametrize("role", ["system", "user"])
def test_tools_in_any_message_keep_all_reasoning(texts: ReleaseTexts, role: str) -> None:
    text = encode_messages(
        [{"role": role, "content": "s", "tools": [CLOCK]}, *TWO_ROUNDS], THINKING, texts
    )
    assert "<think>r1</think>a1" in text
    assert "<｜User｜>rules" in text


def test_without_thinking_nothing_is_dropped_but_reasoning() -> None:
    assert encode_messages(TWO_ROUNDS) == (
        f"{BOS}<｜User｜>rules<｜User｜>q1<｜Assistant｜></think>a1{EOS}<｜User｜>q2<｜Assistant｜></think>a2{EOS}"
    )


# Rules 4 and 10: system text, tools, response format.


def test_system_text_is_raw() -> None:
    assert encode_messages([{"role": "system", "content": "You are."}, user("hi")]) == (
        f"{BOS}You are.<｜User｜>hi<｜Assistant｜></think>"
    )


def test_tools_section_is_the_releases_text(texts: ReleaseTexts) -> None:
    system = {"role": "system", "content": "S", "tools": [WEATHER, CLOCK]}
    assert encode_messages([system, user("hi")], texts=texts) == (
        f"{BOS}S\n\n## Tools\n｜DSML｜tool_calls, <think>, </think>\n"
        '{"name": "weather", "description": "Wetter für einen Ort"}\n{"name": "clock"}\n'
        "End {tool_schemas.__class__} {0} {unknown}<｜User｜>hi<｜Assistant｜></think>"
    )


def test_response_format_follows_the_tools(texts: ReleaseTexts) -> None:
    system = {
        "role": "system",
        "content": None,
        "tools": [CLOCK],
        "response_format": {"type": "größe"},
    }
    text = encode_messages([system], texts=texts)
    assert text.startswith(f"{BOS}\n\n## Tools\n")
    assert text.endswith('{unknown}\n\n## Response Format:\n{"type": "größe"}')


# Rules 5 and 6: user, developer, reminder.


def test_tool_result_parts() -> None:
    parts = [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]
    assert encode_messages([tool(parts)]) == (
        f"{BOS}<｜User｜><tool_result>x\n\ny</tool_result><｜Assistant｜></think>"
    )


def test_developer_text_with_tools(texts: ReleaseTexts) -> None:
    text = encode_messages(
        [{"role": "developer", "content": "D", "tools": [CLOCK]}], THINKING, texts
    )
    assert text.startswith(f"{BOS}<｜User｜>D\n\n## Tools\n")
    assert text.endswith("{unknown}<｜Assistant｜><think>")


def test_latest_reminder() -> None:
    reminder = {"role": "latest_reminder", "content": "It is noon."}
    assert encode_messages([reminder, user("hi")]) == (
        f"{BOS}<｜latest_reminder｜>It is noon.<｜User｜>hi<｜Assistant｜></think>"
    )
    assert encode_messages([user("hi"), reminder]) == (
        f"{BOS}<｜User｜>hi<｜Assistant｜></think><｜latest_reminder｜>It is noon."
    )


# Rule 7: what opens the answer.


@pytest.mark.parametrize(
    ("mode", "opening"), [(ChatMode(), "</think>"), (THINKING, "<think>"), (KEEP, "<think>")]
)
def test_the_mode_opens_the_answer(mode: ChatMode, opening: str) -> None:
    assert encode_messages([user("hi")], mode) == f"{BOS}<｜User｜>hi<｜Assistant｜>{opening}"


def test_no_opening_before_another_question() -> None:
    assert (
        encode_messages([user("hi"), {"role": "system", "content": "S"}], THINKING)
        == f"{BOS}<｜User｜>hiS"
    )


@pytest.mark.parametrize("task", ["query", "authority", "domain", "title", "read_url"])
def test_a_task_token_stands_alone(task: str) -> None:
    assert encode_messages([user("hi", task=task)], THINKING) == f"{BOS}<｜User｜>hi<｜{task}｜>"


@pytest.mark.parametrize(("mode", "opening"), [(ChatMode(), "</think>"), (THINKING, "<think>")])
def test_the_action_task_opens_an_answer(mode: ChatMode, opening: str) -> None:
    assert encode_messages([user("hi", task="action")], mode) == (
        f"{BOS}<｜User｜>hi<｜Assistant｜>{opening}<｜action｜>"
    )


# Rule 8: answers.


def test_an_answer_without_eos() -> None:
    assert encode_messages([user("hi"), assistant("ho", wo_eos=True)]) == (
        f"{BOS}<｜User｜>hi<｜Assistant｜></think>ho"
    )


def test_no_reasoning_after_a_task() -> None:
    assert encode_messages([user("hi", task="title"), assistant("T", "r")], KEEP) == (
        f"{BOS}<｜User｜>hi<｜title｜>T{EOS}"
    )


# Rule 9: tool calls.


def test_tool_calls_are_written_as_dsml() -> None:
    calls = [
        call("find", '{"text": "grün\\n2", "n": 3, "deep": {"a": [null, "ü"]}}'),
        call("stop", "{}"),
    ]
    assert encode_messages([assistant("ok", calls=calls)]) == (
        f"{BOS}ok\n\n<｜DSML｜tool_calls>\n"
        '<｜DSML｜invoke name="find">\n'
        '<｜DSML｜parameter name="text" string="true">grün\n2</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="n" string="false">3</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="deep" string="false">{"a": [null, "ü"]}</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n"
        '<｜DSML｜invoke name="stop">\n\n</｜DSML｜invoke>\n'
        f"</｜DSML｜tool_calls>{EOS}"
    )


@pytest.mark.parametrize("arguments", ["not JSON", '{"a": NaN}', "[1]", "", '{"a": ' * 10000])
def test_arguments_that_are_no_object_become_one_string(arguments: str) -> None:
    text = encode_messages([assistant(None, calls=[call("f", arguments)])])
    assert (
        f'<｜DSML｜parameter name="arguments" string="true">{arguments}</｜DSML｜parameter>\n'
        in text
    )


# Bad messages.


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("hi", "message 0: found 'hi', expected a dict"),
        (
            assistant("x", calls=[{"function": {"id": 3, "name": "f", "arguments": "{}"}}]),
            "function id: found 3",
        ),
        ({"content": "x"}, "role: found None"),
        ({"role": ["user"], "content": "x"}, "role"),
        ({"role": "robot", "content": "x"}, "role: found 'robot', expected one of system"),
        ({"role": "user"}, r"message 0 \(user\): content: found None, expected a string"),
        (user(None), "content"),
        (user([{"type": "text", "text": "x"}]), "content"),
        (user("x", task="cook"), "task: found 'cook', expected one of action"),
        (user("x", task=["title"]), "task"),
        ({"role": "system"}, "content"),
        ({"role": "latest_reminder", "content": 3}, "content"),
        ({"role": "developer", "content": ""}, "not empty"),
        (tool(None), "content"),
        (tool(["x"]), "parts with a type"),
        (tool([{"type": "text"}]), "text in a text part"),
        (tool("x", 3), "tool_call_id"),
        (assistant(["x"]), "content"),
        (assistant("x", 7), "reasoning_content"),
        (assistant("x", calls={"a": 1}), "tool_calls: found"),
        (
            assistant("x", calls=[{}]),
            r"tool_calls\[0\]: found \{\}, expected a dict with the dict 'function'",
        ),
        (assistant("x", calls=["f"]), r"tool_calls\[0\]"),
        (assistant("x", calls=[call("f", {"a": 1})]), "function arguments: found"),
        (assistant("x", calls=[{"function": {"name": "f"}}]), "function arguments: found None"),
        (assistant("x", calls=[{"function": {"arguments": "{}"}}]), "function name: found None"),
        (assistant("x", calls=[call("f", "{}", 3)]), "id: found 3"),
        (
            {"role": "system", "content": "x", "tools": "clock"},
            "tools: found 'clock', expected a list",
        ),
        ({"role": "system", "content": "x", "tools": [{"name": "clock"}]}, r"tools\[0\]"),
        ({"role": "system", "content": "x", "tools": [{"function": {"a": {1}}}]}, "JSON"),
        ({"role": "system", "content": "x", "response_format": {"a": b"1"}}, "JSON"),
    ],
)
def test_a_bad_message_is_named(texts: ReleaseTexts, message: dict, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        encode_messages([message], texts=texts)
    if "JSON" not in words:
        with pytest.raises(ArgumentError, match=words):
            encode_messages([user("hi")], earlier=[message])
