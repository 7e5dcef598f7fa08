"""What people typed stays text, markers become control tokens, streamed text is the decoded text,
in linear time.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from seeds import seed_of
from tokenizers import decoders, models, pre_tokenizers, trainers

from dsv4_ascend.chat.encoding import ChatMode, encode_messages
from dsv4_ascend.chat.markers import TASKS
from dsv4_ascend.chat.prompt_text import Marker, PromptText
from dsv4_ascend.chat.release_texts import ReleaseTexts
from dsv4_ascend.chat.tokenizer import Tokenizer
from dsv4_backend.errors import ArgumentError

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
PLAIN = [
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜latest_reminder｜>",
    "<think>",
    "</think>",
    "｜DSML｜",
    *TASKS.values(),
]
LITERALS = [BOS, EOS, *PLAIN]
WORDS = ["def f(x):\n    return x", "grüße", "日本語", "a</think>b", "<｜User｜>", " 12345 ", "😀"]


@pytest.fixture(scope="module")
def backend() -> tokenizers.Tokenizer:
    """As the release's file: bos and eos special and in the base vocabulary,
    all others added and not special.
    """
    found = tokenizers.Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    found.train_from_iterator(WORDS * 5, trainer)
    found.add_tokens(
        [tokenizers.AddedToken(text, normalized=True, special=False) for text in PLAIN]
    )
    return found


@pytest.fixture(scope="module")
def tokenizer(backend: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(backend, BOS)


@pytest.mark.parametrize(
    "text", [*LITERALS, "a</think>b", "<｜User｜><｜User｜>", "x <｜DSML｜invoke>"]
)
@pytest.mark.parametrize("role", ["user", "system", "tool", "assistant"])
def test_what_was_typed_is_text(tokenizer: Tokenizer, text: str, role: str) -> None:
    prompt = encode_messages([{"role": role, "content": text}])
    controls = Counter(tokenizer.token_id(literal) for literal in LITERALS)
    own = [tokenizer.token_id(prompt[start:end]) for start, end in prompt.markers]
    ids = tokenizer.encode(prompt)
    assert [i for i in ids if i in controls] == own
    assert tokenizer.decode(ids, skip_special=False) == prompt
    everywhere = [i for i in tokenizer.encode(prompt, control=True) if i in controls]
    assert len(everywhere) > len(own)


def test_the_encoders_own_marks_are_control_tokens(tokenizer: Tokenizer) -> None:
    schema = {"function": {"name": "</think>", "description": "{dsml_token} ｜DSML｜"}}
    texts = ReleaseTexts(
        {
            "TOOLS_TEMPLATE": "{dsml_token} {thinking_start_token} "
            "{thinking_end_token} {tool_schemas}"
        }
    )
    calls = [
        {"function": {"name": "<｜User｜>", "arguments": '{"<think>": "</｜DSML｜parameter>"}'}}
    ]
    turns = [
        {"role": "system", "content": "", "tools": [schema]},
        {"role": "user", "content": "u"},
        {
            "role": "assistant",
            "content": "<｜User｜>",
            "reasoning_content": "</think>",
            "tool_calls": calls,
        },
        {"role": "user", "content": "t", "task": "title"},
    ]
    prompt = encode_messages(turns, ChatMode(thinking=True), texts)
    found = [prompt[start:end] for start, end in prompt.markers]
    dsml = "｜DSML｜"
    tail = [
        "<｜User｜>",
        "<｜Assistant｜>",
        "<think>",
        "</think>",
        *[dsml] * 6,
        EOS,
        "<｜User｜>",
        "<｜title｜>",
    ]
    assert found == [BOS, dsml, "<think>", "</think>", *tail]
    names = {tokenizer.token_id(literal): literal for literal in LITERALS}
    assert [names[i] for i in tokenizer.encode(prompt) if i in names] == found


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(
        st.text(max_size=6) | st.sampled_from(["é", "a ", "\n\n", " b", "日"]), max_size=5
    )
)
def test_text_without_literals_encodes_alike_in_both_modes(
    tokenizer: Tokenizer, parts: list[str]
) -> None:
    prompt = encode_messages([{"role": "user", "content": part} for part in parts])
    assert tokenizer.encode(prompt) == tokenizer.encode(prompt, control=True)


def test_a_plain_string_is_text_and_control_is_asked_for(tokenizer: Tokenizer) -> None:
    user = tokenizer.token_id("<｜User｜>")
    assert user not in tokenizer.encode("<｜User｜>")
    assert tokenizer.encode("<｜User｜>", control=True) == [user]
    prompt = encode_messages([{"role": "user", "content": "a"}])
    assert tokenizer.encode(prompt, bos=True) == tokenizer.encode(prompt)
    assert tokenizer.encode("a", bos=True)[0] == tokenizer.token_id(BOS)
    assert user not in tokenizer.encode(str(prompt)[:])


def test_joined_prompts_keep_their_marks() -> None:
    prompt = PromptText.of(["a", Marker("<b>"), "c"])
    for whole in ("<b>" + prompt + "<b>", prompt + prompt, prompt + Marker("x")):
        assert isinstance(whole, PromptText)
        assert {whole[start:end] for start, end in whole.markers} == {"<b>"}
    assert list(("x" + prompt).segments()) == ["xa", "<b>", "c"]
    assert not isinstance(prompt[1:], PromptText)


def test_merges_that_spell_a_control_token_are_refused() -> None:
    found = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    found.add_tokens(["ab"])
    with pytest.raises(ArgumentError, match="found ab, which merges spell"):
        Tokenizer(found, None).encode("ab")


@pytest.mark.parametrize("text", [None, 3, b"a", ["a"], "\udc80"])
def test_what_is_no_text_is_named(tokenizer: Tokenizer, text: object) -> None:
    with pytest.raises(ArgumentError, match="text: found"):
        tokenizer.encode(text)


@pytest.mark.parametrize("ids", ["12", 3, [-1], [1.0], [True], [2**32], [None]])
def test_what_is_no_id_is_named(tokenizer: Tokenizer, ids: object) -> None:
    with pytest.raises(ArgumentError, match="ids: found"):
        tokenizer.decode(ids)


def byte_fallback() -> Tokenizer:
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {
        "▁a": 256,
        "▁": 257,
        "b": 258,
        "<s>": 259,
    }
    found = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="b"))
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    found.decoder = decoders.Sequence(steps)
    found.add_special_tokens(["<s>"])
    return Tokenizer(found, None)


STREAMS = [
    list("é日本 😀 ok".encode()),
    [0xE2, 0x82],
    [0xE2, 0x82, 256, 0xE2, 0x82, 0xAC, 0xAC, 257, 0xFF],
    [259, 256, 259, 256, 0x80],
    [257, 257, 258],
    [],
]


@pytest.mark.parametrize("ids", STREAMS)
def test_byte_fallback_streams_what_it_decodes(ids: list[int]) -> None:
    tokenizer = byte_fallback()
    assert "".join(tokenizer.stream(ids)) == tokenizer.decode(ids)


@settings(max_examples=80, deadline=None)
@given(
    ids=st.lists(st.integers(0, 413), max_size=40),
    byte_ids=st.lists(st.integers(0, 259), max_size=40),
)
def test_any_ids_stream_what_they_decode_to(
    tokenizer: Tokenizer, ids: list[int], byte_ids: list[int]
) -> None:
    assert "".join(tokenizer.stream(ids)) == tokenizer.decode(ids)
    assert "".join(byte_fallback().stream(byte_ids)) == byte_fallback().decode(byte_ids)


def test_characters_come_out_whole_and_at_once(tokenizer: Tokenizer) -> None:
    text = "é日本 😀 ok, dàs ist �!"
    pieces = list(tokenizer.stream(tokenizer.encode(text)))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece and "�!" not in piece for piece in pieces)
    assert sum(map(bool, pieces)) > 5


@pytest.mark.parametrize(
    "kind", ["one line", "broken bytes", "replacement characters", "special tokens"]
)
def test_streaming_is_linear(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, kind: str
) -> None:
    """Counted, not timed: tokens that are decoded in all, per token of the stream."""
    draw = random.Random(seed_of(request.node.nodeid))
    broken = [i for i in range(2, 258) if tokenizer.decode([i]) == "\ufffd"]
    ids = {
        "one line": tokenizer.encode("ein Wort, 日本 😀 " * 400),
        "broken bytes": [draw.choice(broken) for _ in range(8192)],
        "replacement characters": tokenizer.encode("\ufffd" * 3000),
        "special tokens": [0, 1] * 4096,
    }[kind]
    decode, work = Tokenizer.decode, []
    monkeypatch.setattr(
        Tokenizer, "decode", lambda self, i, **k: (work.append(len(i)), decode(self, i, **k))[1]
    )
    assert "".join(tokenizer.stream(ids)) == decode(tokenizer, ids)
    assert sum(work) < 12 * len(ids)


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize(
    ("lacking", "turns"),
    [
        ("<｜latest_reminder｜>", [{"role": "latest_reminder", "content": "r"}]),
        ("<｜title｜>", [{"role": "user", "content": "u", "task": "title"}]),
        ("</think>", [{"role": "user", "content": "u"}]),
        (
            "｜DSML｜",
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}],
        ),
    ],
)
def test_a_marker_that_is_no_token_is_named(lacking: str, turns: list, control: bool) -> None:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.add_tokens([text for text in LITERALS if text != lacking])
    with pytest.raises(ArgumentError, match=f"the marker {lacking}, which is no token"):
        Tokenizer(backend, BOS).encode(encode_messages(turns), control=control)


@pytest.mark.parametrize("value", ["yes", None, 1, 0.0])
def test_flags_are_true_or_false(tokenizer: Tokenizer, value: object) -> None:
    for name in ("bos", "control"):
        with pytest.raises(ArgumentError, match=f"^{name}: found"):
            tokenizer.encode("a", **{name: value})
    with pytest.raises(ArgumentError, match=r"^skip_special: found"):
        tokenizer.decode([1], skip_special=value)
