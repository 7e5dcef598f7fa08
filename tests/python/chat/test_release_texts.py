"""The texts of a release and its efforts (spec/v4.md 9.2): read from its folder, never run."""

from __future__ import annotations

from pathlib import Path

import pytest
from chat_turns import BOS, CLOCK, RELEASE, assistant, texts_of, user

from dsv4_ascend.chat.encoding import ChatMode, encode_messages
from dsv4_ascend.chat.release_texts import ReleaseTexts
from dsv4_backend.errors import ArgumentError, CheckpointError

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
    found = encode_messages([user("hi")], mode, texts_of(tmp_path, TABLE))
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
        encode_messages([user("hi")], ChatMode(thinking, effort), texts_of(tmp_path, source))


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
    for release in (ReleaseTexts.from_folder(tmp_path), texts_of(tmp_path, "x = 1")):
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
    found = texts_of(tmp_path, source)
    assert not trap.exists()
    assert set(found.constants) == {
        "TOOLS_TEMPLATE",
        "REASONING_EFFORT_MAX",
        "response_format_template",
    }


@pytest.mark.parametrize("source", ["def (", "x = \x00", "(" * 100000, "#" * (1 << 20) + "##"])
def test_an_unreadable_encoding_file_is_named(tmp_path: Path, source: str) -> None:
    with pytest.raises(CheckpointError, match=r"encoding_dsv4\.py"):
        texts_of(tmp_path, source)


def test_values_are_not_searched_for_placeholders(texts: ReleaseTexts) -> None:
    evil = {"function": {"name": "{dsml_token}{tool_schemas}{0.__class__}"}}
    text = encode_messages(
        [{"role": "system", "content": "{schema}", "tools": [evil]}], texts=texts
    )
    assert text.startswith(f"{BOS}{{schema}}\n\n")
    assert '{"name": "{dsml_token}{tool_schemas}{0.__class__}"}\n' in text


def test_a_bad_effort_is_named() -> None:
    with pytest.raises(ArgumentError, match="effort 'huge', expected high or max"):
        encode_messages([user("hi")], ChatMode(effort="huge"))
