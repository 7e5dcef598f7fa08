"""Prompt encoding rule by rule (spec/v4.md 9.3), with expected strings written by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv4_ascend.chat.encoding import ChatMode, encode_messages
from dsv4_ascend.chat.release_texts import ReleaseTexts
from dsv4_backend.errors import ArgumentError, CheckpointError

THINKING = ChatMode(thinking=True)
KEEP = ChatMode(thinking=True, drop_thinking=False)
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"

RELEASE = '''"""Made-up texts of a made-up release."""
import sys
TOOLS_TEMPLATE = """## Tools
{dsml_token}tool_calls, {thinking_start_token}, {thinking_end_token}
{tool_schemas}
End {tool_schemas.__class__} {0} {unknown}"""
REASONING_EFFORT_MAX: str = "Think hard.\\n\\n"
response_format_template = ("## Response Format:\\n"
                            "{schema}")
NUMBER, joined = 3, "a" + "b"
'''
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Wetter für einen Ort"},
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


@pytest.fixture
def texts(tmp_path: Path) -> ReleaseTexts:
    return _texts(tmp_path, RELEASE)


def _texts(folder: Path, source: str) -> ReleaseTexts:
    (folder / "encoding").mkdir()
    (folder / "encoding" / "encoding_dsv4.py").write_text(source, encoding="utf-8")
    return ReleaseTexts.from_folder(folder)


def user(content: str, **more) -> dict:
    return {"role": "user", "content": content, **more}


def assistant(
    content: str | None, reasoning: str | None = None, calls: list | None = None, **more
) -> dict:
    return {
        "role": "assistant",
        "content": content,
        "reasoning_content": reasoning,
        "tool_calls": calls,
        **more,
    }


def tool(content: object, call: str = "") -> dict:
    return {"role": "tool", "content": content, "tool_call_id": call}


def call(name: str, arguments: str, identity: str | None = None) -> dict:
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


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


# Modes (9.2).


def test_maximal_effort_is_a_preamble_of_the_release(texts: ReleaseTexts) -> None:
    mode = ChatMode(thinking=True, effort="max")
    assert (
        encode_messages([user("hi")], mode, texts)
        == f"{BOS}Think hard.\n\n<｜User｜>hi<｜Assistant｜><think>"
    )
    assert "Think hard" not in encode_messages([user("hi")], mode, texts, earlier=[assistant("ho")])
    assert "Think hard" not in encode_messages([user("hi")], ChatMode(effort="max"), texts)


@pytest.mark.parametrize("effort", [None, "high"])
def test_lesser_effort_inserts_nothing_unless_the_release_has_a_text(
    texts: ReleaseTexts, effort: str | None
) -> None:
    mode = ChatMode(thinking=True, effort=effort)
    assert encode_messages([user("hi")], mode, texts) == f"{BOS}<｜User｜>hi<｜Assistant｜><think>"
    both = ReleaseTexts({"REASONING_EFFORT_HIGH": "Think.", "REASONING_EFFORT_MAX": "Think hard."})
    assert ("Think." in encode_messages([user("hi")], mode, both)) == (effort == "high")


TABLE = """
REASONING_EFFORT_PROMPTS: dict[str, str] = {"low": "", "high": "[HIGH]", "max": ("[MA" "X]")}
DEFAULT_REASONING_EFFORT = "high"
"""


@pytest.mark.parametrize(
    ("effort", "text"), [(None, "[HIGH]"), ("low", ""), ("high", "[HIGH]"), ("max", "[MAX]")]
)
def test_a_folder_with_a_table_of_efforts(tmp_path: Path, effort: str | None, text: str) -> None:
    mode = ChatMode(thinking=True, effort=effort)
    found = encode_messages([user("hi")], mode, _texts(tmp_path, TABLE))
    assert found == f"{BOS}{text}<｜User｜>hi<｜Assistant｜><think>"


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize(
    ("source", "effort", "expected"),
    [
        (RELEASE, "low", "high or max"),
        (TABLE, "medium", "low, high or max"),
        ("x = 1", "low", "high or max"),
    ],
)
def test_an_effort_that_the_folder_does_not_know(
    tmp_path: Path, source: str, effort: str, expected: str, thinking: bool
) -> None:
    with pytest.raises(
        ArgumentError, match=f"effort '{effort}', expected {expected} \\({tmp_path}"
    ):
        encode_messages([user("hi")], ChatMode(thinking, effort), _texts(tmp_path, source))


# Texts come from the checkpoint.

NEEDY = [
    ("TOOLS_TEMPLATE", [{"role": "system", "content": "", "tools": [CLOCK]}], ChatMode()),
    (
        "response_format_template",
        [{"role": "system", "content": "", "response_format": {"a": 1}}],
        ChatMode(),
    ),
    ("REASONING_EFFORT_MAX", [user("hi")], ChatMode(thinking=True, effort="max")),
]


@pytest.mark.parametrize(("name", "messages", "mode"), NEEDY)
def test_a_missing_text_names_what_to_copy(
    tmp_path: Path, name: str, messages: list, mode: ChatMode
) -> None:
    for release in (ReleaseTexts.from_folder(tmp_path), _texts(tmp_path, "x = 1")):
        with pytest.raises(
            CheckpointError,
            match=f"{tmp_path}/encoding.*{name}.*copy the release's encoding folder",
        ):
            encode_messages(messages, mode, release)
    with pytest.raises(CheckpointError, match=name):
        encode_messages(messages, mode)


def test_the_encoding_file_is_read_and_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    source = f"import pathlib\npathlib.Path({str(trap)!r}).touch()\nraise SystemExit\n" + RELEASE
    found = _texts(tmp_path, source)
    assert not trap.exists()
    assert set(found.constants) == {
        "TOOLS_TEMPLATE",
        "REASONING_EFFORT_MAX",
        "response_format_template",
    }


@pytest.mark.parametrize("source", ["def (", "x = \x00", "(" * 100000, "#" * (1 << 20) + "##"])
def test_an_unreadable_encoding_file_is_named(tmp_path: Path, source: str) -> None:
    with pytest.raises(CheckpointError, match=r"encoding_dsv4\.py"):
        _texts(tmp_path, source)


def test_values_are_not_searched_for_placeholders(texts: ReleaseTexts) -> None:
    evil = {"function": {"name": "{dsml_token}{tool_schemas}{0.__class__}"}}
    text = encode_messages(
        [{"role": "system", "content": "{schema}", "tools": [evil]}], texts=texts
    )
    assert text.startswith(f"{BOS}{{schema}}\n\n")
    assert '{"name": "{dsml_token}{tool_schemas}{0.__class__}"}\n' in text


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


def test_a_bad_effort_is_named() -> None:
    with pytest.raises(ArgumentError, match="effort 'huge', expected high or max"):
        encode_messages([user("hi")], ChatMode(effort="huge"))
