"""The recipe's revision of the prompt encoding, rule by rule;
expected strings agree with DeepSeek's library 0.2.0.
"""

from __future__ import annotations

import pytest
from chat_turns import BOS, CLOCK, EOS, assistant, call, tool, user

from dsv4_ascend.chat.encoding import ChatMode, encode_messages
from dsv4_ascend.chat.release_texts import ReleaseTexts
from dsv4_backend.errors import ArgumentError, CheckpointError

CHAT = ChatMode(revision="recipe")
THINK = ChatMode(thinking=True, effort="low", revision="recipe")
EFFORTS = {"low": "", "high": "[HIGH]", "max": "[MAX]"}
TEXTS = ReleaseTexts(
    {"TOOLS_TEMPLATE": "[{dsml_token} {tool_schemas}]\n", "response_format_template": "({schema})"},
    "here",
    {"REASONING_EFFORT_PROMPTS": EFFORTS},
)
U, A, R = "<｜User｜>", "<｜Assistant｜>", "<｜latest_reminder｜>"
REMINDER = {"role": "latest_reminder", "content": "rem"}


def system(content: str, **more) -> dict:
    return {"role": "system", "content": content, **more}


ROWS = [
    # the last assistant turn: closed, and a new one opens; with prefix it stays open
    (
        [user("a"), assistant("b", "r")],
        f"{U}a{A}</think>b{EOS}{A}<think>",
        f"{U}a{A}</think>b{EOS}{A}</think>",
    ),
    (
        [user("a"), assistant("b", "r", prefix=True)],
        f"{U}a{A}<think>r</think>b",
        f"{U}a{A}<think>r</think>b",
    ),
    ([user("a"), assistant("", "r", prefix=True)], f"{U}a{A}<think>r", f"{U}a{A}<think>r</think>"),
    (
        [user("a"), assistant("b", "r", wo_eos=True)],
        f"{U}a{A}<think>r</think>b",
        f"{U}a{A}<think>r</think>b",
    ),
    (
        [user("a"), assistant("x", "y", prefix=True), user("z")],
        f"{U}a{A}<think>y</think>x{EOS}{U}z{A}<think>",
        f"{U}a{A}<think>y</think>x{EOS}{U}z{A}</think>",
    ),
    ([assistant("x"), assistant("y")], f"{A}</think>x{EOS}{A}</think>y{EOS}{A}<think>", None),
    ([], f"{A}<think>", f"{A}</think>"),
    # latest_reminder: the answer opens behind it
    ([user("a"), REMINDER], f"{U}a{R}rem{A}<think>", f"{U}a{R}rem{A}</think>"),
    ([REMINDER], f"{R}rem{A}<think>", f"{R}rem{A}</think>"),
    ([user("a"), REMINDER, user("b")], f"{U}a{R}rem{U}b{A}<think>", None),
    ([user("a"), assistant("x", "y"), REMINDER], f"{U}a{A}</think>x{EOS}{R}rem{A}<think>", None),
    # empty parts
    ([user(""), user("b"), user(""), user("c")], f"{U}b\n\nc{A}<think>", None),
    ([user(" "), user("b")], f"{U} \n\nb{A}<think>", None),
    ([user("")], f"{U}{A}<think>", None),
    ([system(""), user("a"), system("s"), system("")], f"s{U}a{A}<think>", None),
    ([system("1"), user("a"), system("2")], f"1\n\n2{U}a{A}<think>", None),
    ([tool("r"), user(""), user("b")], f"{U}<tool_result>r</tool_result>\n\nb{A}<think>", None),
    ([user("a"), tool("")], f"{U}a{U}<tool_result></tool_result>{A}<think>", None),
    # null reasoning
    ([user("a"), assistant("b", None)], f"{U}a{A}</think>b{EOS}{A}<think>", None),
    ([user("a"), assistant("b", None, prefix=True)], f"{U}a{A}</think>b", f"{U}a{A}</think>b"),
    (
        [user("a"), assistant("b", "", prefix=True)],
        f"{U}a{A}<think></think>b",
        f"{U}a{A}<think></think>b",
    ),
    ([user("a"), assistant(None, None, prefix=True)], f"{U}a{A}", f"{U}a{A}</think>"),
]


@pytest.mark.parametrize(("messages", "thinking", "chat"), ROWS)
def test_a_rule(messages: list, thinking: str, chat: str | None) -> None:
    assert encode_messages(messages, THINK) == BOS + thinking
    if chat is not None:
        assert encode_messages(messages, CHAT) == BOS + chat


@pytest.mark.parametrize("mode", [THINK, CHAT])
@pytest.mark.parametrize(
    ("reasoning", "shown"), [(None, "</think>"), ("", "<think></think>"), ("r", "<think>r</think>")]
)
def test_tools_keep_reasoning_in_both_modes(
    mode: ChatMode, reasoning: str | None, shown: str
) -> None:
    calls = [call("f", '{"a": "x", "n": 1}', "i"), call("g", "{}", "j")]
    turns = [
        user("a", tools=[CLOCK]),
        assistant("x", reasoning, calls),
        tool("2", "j"),
        tool("1", "i"),
        user("q"),
    ]
    end = "<think>" if mode.thinking else "</think>"
    assert encode_messages(turns, mode, TEXTS) == (
        f'{BOS}\n\n[｜DSML｜ {{"name": "clock"}}]\n{U}a{A}{shown}x\n\n<｜DSML｜tool_calls>\n'
        '<｜DSML｜invoke name="f">\n'
        '<｜DSML｜parameter name="a" string="true">x</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="n" string="false">1</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        '<｜DSML｜invoke name="g">\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
        f"{EOS}{U}<tool_result>1</tool_result>\n\n<tool_result>2</tool_result>\n\nq{A}{end}"
    )


def test_the_format_follows_the_tools_behind_all_system_texts() -> None:
    turns = [user("a"), system("s", tools=[CLOCK], response_format={"k": "ü"}), system("t")]
    assert encode_messages(turns, CHAT, TEXTS) == (
        f'{BOS}s\n\nt\n\n[｜DSML｜ {{"name": "clock"}}]\n\n\n({{"k": "ü"}}){U}a{A}</think>'
    )


@pytest.mark.parametrize(
    ("effort", "text"),
    [(None, "[HIGH]"), ("low", ""), ("high", "[HIGH]"), ("xhigh", "[HIGH]"), ("max", "[MAX]")],
)
def test_an_unset_effort_is_high(effort: str | None, text: str) -> None:
    thinking = ChatMode(thinking=True, effort=effort, revision="recipe")
    assert encode_messages([user("a")], thinking, TEXTS) == f"{BOS}{text}{U}a{A}<think>"
    assert (
        encode_messages([user("a")], ChatMode(effort=effort, revision="recipe"))
        == f"{BOS}{U}a{A}</think>"
    )
    if text:
        with pytest.raises(
            CheckpointError, match=r"no text REASONING_EFFORT_PROMPTS\['(high|max)'\].*0731"
        ):
            encode_messages([user("a")], thinking)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (
            [{"role": "developer", "content": "x"}],
            "message 0: found role developer, expected neither",
        ),
        ([user("a"), user("x", task="title")], "message 1: found task title"),
        ([system("", response_format={"type": "json_object"})], "json_object"),
    ],
)
def test_what_the_recipe_does_not_know_is_refused(messages: list, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        encode_messages(messages, CHAT, TEXTS)


def test_earlier_messages_and_unknown_values_are_refused() -> None:
    with pytest.raises(ArgumentError, match="earlier"):
        encode_messages([user("a")], CHAT, earlier=[user("b")])
    with pytest.raises(ArgumentError, match="effort 'medium', expected low, high, xhigh or max"):
        encode_messages([user("a")], ChatMode(effort="medium", revision="recipe"))
    with pytest.raises(ArgumentError, match="revision: found 'final', expected preview or recipe"):
        ChatMode(revision="final")
    with pytest.raises(ArgumentError, match="thinking: found 1, expected True or False"):
        ChatMode(thinking=1)
