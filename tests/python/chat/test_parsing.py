"""Completions back to messages: round trip with the encoding,
and a strict grammar (spec/v4.md 9.3, last paragraph).
"""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_ascend.chat.encoding import ChatMode, encode_messages
from dsv4_ascend.chat.parsing import CompletionError, parse_completion
from dsv4_backend.errors import ArgumentError

EOS = "<｜end▁of▁sentence｜>"


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def call(name: str, arguments: str) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


NAMES = st.text("abcäß_-1 ", min_size=1, max_size=6)
STRINGS = st.text("aß \n\"'<>/{}\\", max_size=12)
VALUES = st.recursive(
    STRINGS
    | st.integers()
    | st.booleans()
    | st.none()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=5,
)
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), max_size=3)


@settings(max_examples=60, deadline=None)
@given(content=STRINGS, reasoning=STRINGS, calls=CALLS, thinking=st.booleans())
def test_encoding_then_parsing_gives_the_message_back(
    content: str, reasoning: str, calls: list, thinking: bool
) -> None:
    message = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    message["tool_calls"] = [call(name, json.dumps(fields)) for name, fields in calls]
    mode = ChatMode(thinking=thinking)
    prompt = encode_messages([user("hi")], mode)
    completion = encode_messages([user("hi"), message], mode).removeprefix(prompt)
    found = parse_completion(completion, thinking=thinking)
    assert (found["role"], found["content"]) == ("assistant", content)
    assert found["reasoning_content"] == (reasoning if thinking else "")
    parsed = [
        (c["function"]["name"], json.loads(c["function"]["arguments"])) for c in found["tool_calls"]
    ]
    assert parsed == calls
    assert encode_messages([user("hi"), found], mode) == prompt + completion


INVOKE = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n{}'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)
PARAMETER = '<｜DSML｜parameter name="{}" string="{}">{}</｜DSML｜parameter>\n'


def test_string_parameters_are_quoted_and_others_kept() -> None:
    fields = PARAMETER.format("a", "true", 'x "ü"') + PARAMETER.format("b", "false", "1.50")
    found = parse_completion("text" + INVOKE.format(fields) + EOS)
    assert found["content"] == "text"
    assert found["tool_calls"] == [
        {
            "type": "function",
            "function": {"name": "f", "arguments": '{"a": "x \\"ü\\"", "b": 1.50}'},
        }
    ]


@pytest.mark.parametrize("body", ["", "\n"])
def test_a_call_without_parameters(body: str) -> None:
    assert parse_completion(INVOKE.format(body))["tool_calls"][0]["function"]["arguments"] == "{}"


BAD = {
    "no </think>": "only thoughts",
    "not JSON": "</think>" + INVOKE.format(PARAMETER.format("a", "false", "{")),
    "not JSON: 'NaN'": "</think>" + INVOKE.format(PARAMETER.format("a", "false", "NaN")),
    "not JSON: '1111": "</think>" + INVOKE.format(PARAMETER.format("a", "false", "1" * 5000)),
    r"not JSON: '\[\[": "</think>" + INVOKE.format(PARAMETER.format("a", "false", "[" * 100000)),
    "'a' twice": "</think>" + INVOKE.format(2 * PARAMETER.format("a", "true", "x")),
    "expected a parameter or .*found ' ": "</think>"
    + INVOKE.format(" " + PARAMETER.format("a", "true", "x")),
    "expected a parameter or .*found '<": "</think>"
    + INVOKE.format(PARAMETER.format("a", "maybe", "x")),
    "expected a call or .*found 'x'": "</think>"
    + INVOKE.format("").removesuffix("</｜DSML｜tool_calls>")
    + "x",
    "expected a call or .*found ''": "</think>\n\n<｜DSML｜tool_calls>\n",
    "found '</｜DSML｜tool_calls>more'": "</think>" + INVOKE.format("") + "more",
    "sentence｜> in the middle": f"</think>done{EOS}and more",
    "<think> in the middle": "a<think>b</think>c",
    "｜DSML｜ in the middle": "</think>a<｜DSML｜tool_calls>",
}


@pytest.mark.parametrize("words", BAD)
def test_a_completion_off_the_grammar_is_refused(words: str) -> None:
    with pytest.raises(CompletionError, match=words):
        parse_completion(BAD[words], thinking=True)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (
            "x</｜DSML｜parameter>y",
            "parameter 'a': expected '>' and a newline after </｜DSML｜parameter, found '>y",
        ),
        ("x</｜DSML｜parameter></｜DSML｜parameter>", "found '></｜DSML｜parameter>"),
        ("x</｜DSML｜parameter> \n", r"found '> \\n"),
        (
            'x</｜DSML｜parameter><｜DSML｜parameter name="b" string="true">',
            "expected '>' and a newline after </｜DSML｜parameter",
        ),
        ("x</｜DSML｜parameter\n", "and a newline"),
    ],
)
def test_a_value_ends_at_its_first_closing_tag(value: str, words: str) -> None:
    with pytest.raises(CompletionError, match=words):
        parse_completion(INVOKE.format(PARAMETER.format("a", "true", value)))


@pytest.mark.parametrize(
    "value", ["</｜DSML｜invoke>\n", "<｜DSML｜invoke", "</｜DSML｜tool_calls>", "\n", ""]
)
def test_a_value_may_hold_other_tags(value: str) -> None:
    fields = PARAMETER.format("a", "true", value) + PARAMETER.format("b", "true", "y")
    (found,) = parse_completion(INVOKE.format(fields))["tool_calls"]
    assert json.loads(found["function"]["arguments"]) == {"a": value, "b": "y"}


@pytest.mark.parametrize("revision", ["preview", "recipe"])
@pytest.mark.parametrize("name", ['a"b', "a\nb", 'f">\n', '"', "\n", 'x" y="z'])
def test_odd_names_round_trip(name: str, revision: str) -> None:
    mode = ChatMode(revision=revision)
    answer = {
        "role": "assistant",
        "content": "",
        "tool_calls": [call(name, json.dumps({name: name})), call(name, "{}")],
    }
    whole = encode_messages([user("hi"), answer], mode)
    completion = whole[whole.index("\n\n<") : whole.index(EOS) + len(EOS)]
    found = [c["function"] for c in parse_completion(completion)["tool_calls"]]
    assert [(c["name"], json.loads(c["arguments"])) for c in found] == [
        (name, {name: name}),
        (name, {}),
    ]


@pytest.mark.parametrize("text", [None, b"x", 3])
def test_what_is_no_text_is_named(text: object) -> None:
    with pytest.raises(ArgumentError, match="completion: found"):
        parse_completion(text)


PIECES = [
    "</think>",
    "<think>",
    EOS,
    "\n\n<｜DSML｜tool_calls>\n",
    "</｜DSML｜tool_calls>",
    "</｜DSML｜invoke>\n",
]
PIECES += [
    '<｜DSML｜invoke name="f">\n',
    PARAMETER.format("a", "false", "1"),
    PARAMETER.format("b", "true", "x"),
    "\n",
]


@settings(max_examples=150, deadline=None)
@given(
    text=st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=8).map("".join),
    thinking=st.booleans(),
)
def test_any_text_is_a_message_or_a_completion_error(text: str, thinking: bool) -> None:
    try:
        message = parse_completion(text, thinking=thinking)
    except CompletionError:
        return
    prompt = encode_messages([user("hi")], ChatMode(thinking=thinking))
    again = encode_messages([user("hi"), message], ChatMode(thinking=thinking)).removeprefix(prompt)
    assert parse_completion(again, thinking=thinking) == message


def encoded(name: str, fields: dict, revision: str = "preview") -> str:
    """The answer that calls one tool, as the encoding writes it."""
    mode = ChatMode(revision=revision)
    message = {"role": "assistant", "content": "", "tool_calls": [call(name, json.dumps(fields))]}
    text = encode_messages([user("hi"), message], mode)
    return text[text.index("\n\n<｜DSML｜tool_calls>") : text.index(EOS)]


@pytest.mark.parametrize("revision", ["preview", "recipe"])
@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("f", 'a" string="true">'),
        ("f", 'x" string="false">y'),
        ("f", '\n" string="true">" string="true">'),
        ("f", "｜DSML｜"),
        ("f", "a</｜DSML｜parameter>"),
        ("｜DSML｜", "a"),
        ('f">\n<｜DSML｜parameter name="b', "a"),
    ],
)
def test_a_name_that_would_be_read_as_another_is_refused(
    revision: str, name: str, key: str
) -> None:
    with pytest.raises(
        ArgumentError, match=r"tool_calls: .* name: found .*expected a name without"
    ):
        encoded(name, {key: "x"}, revision)


@pytest.mark.parametrize("revision", ["preview", "recipe"])
@pytest.mark.parametrize(
    "name",
    [
        '"',
        "\n",
        'a" string="true"',
        '" string="maybe">',
        'f">',
        'f">\n',
        '">\n">\n',
        "<｜",
        "DSML｜",
        "</think>",
    ],
)
def test_odd_names_come_back(revision: str, name: str) -> None:
    for fields in ({}, {name: "x"}, {name: 1, name + '"': [name]}):
        (found,) = parse_completion(encoded(name, fields, revision))["tool_calls"]
        assert (found["function"]["name"], json.loads(found["function"]["arguments"])) == (
            name,
            fields,
        )


@pytest.mark.parametrize(
    "value", ["1e999", "-1e400", "[1, 2e308]", '{"a": {"b": 1e1000}}', "Infinity"]
)
def test_a_parameter_that_no_number_holds_is_refused(value: str) -> None:
    with pytest.raises(CompletionError, match="not JSON"):
        parse_completion(INVOKE.format(PARAMETER.format("a", "false", value)))


@pytest.mark.parametrize("thinking", ["yes", None, 1, 0, []])
def test_thinking_is_true_or_false(thinking: object) -> None:
    with pytest.raises(ArgumentError, match=r"thinking: found .*expected True or False"):
        parse_completion("</think>text", thinking=thinking)
