"""Where `generate` takes its prompt from, terminals that lack characters,
and Ctrl-C at any time.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_cli_model import checkpoint, generate, run  # noqa: F401

from dsv4_ascend.chat.encoding import ChatMode, encode_messages
from dsv4_ascend.model.model import load

QUIET = ("--temperature", 0)


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch):
    def give(raw: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), "ascii"))

    return give


@pytest.fixture
def bare(checkpoint: Path, tmp_path: Path) -> Path:  # noqa: F811
    """The checkpoint without its tokenizer."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for path in checkpoint.iterdir():
        if path.name != "tokenizer.json":
            (folder / path.name).symlink_to(path)
    return folder


def test_text_from_everywhere_is_the_same(generate, typed, tmp_path: Path) -> None:  # noqa: F811
    text = "def grüße(x):\n    "
    (tmp_path / "prompt.txt").write_bytes(text.encode())
    want = generate("--prompt", text, *QUIET)
    assert generate("--prompt-file", tmp_path / "prompt.txt", *QUIET).out == want.out
    for option in ("--prompt", "--prompt-file"):
        typed(text.encode())
        assert generate(option, "-", *QUIET).out == want.out


def test_ids_from_everywhere(generate, typed, checkpoint: Path, tmp_path: Path) -> None:  # noqa: F811
    ids = load(checkpoint).tokenizer.encode("def f", bos=True)
    want = generate("--prompt", "def f", *QUIET).out
    for name, text in (("a.json", json.dumps(ids)), ("b.txt", " ".join(map(str, ids)) + "\n")):
        (tmp_path / name).write_text(text)
        assert generate("--input-ids", tmp_path / name, *QUIET).out == want
        typed(text.encode())
        assert generate("--input-ids", "-", *QUIET).out == want


def test_a_folder_without_tokenizer_takes_and_prints_ids(run, bare: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "ids").write_text("0 5 6")
    found = run(
        "generate",
        "--checkpoint",
        bare,
        "--input-ids",
        tmp_path / "ids",
        *QUIET,
        "--max-new-tokens",
        4,
    )
    want = load(bare).generate([[0, 5, 6]], max_new_tokens=4)[0]
    assert (found.code, found.out.split()) == (0, [str(token) for token in want])
    (tmp_path / "ids").write_text(found.out)  # what was printed can be given again
    assert (
        run(
            "generate", "--checkpoint", bare, "--input-ids", tmp_path / "ids", "--max-new-tokens", 1
        ).code
        == 0
    )


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ([], ChatMode()),
        (["--thinking"], ChatMode(True)),
        (["--encoding", "recipe"], ChatMode(revision="recipe")),
    ],
)
def test_a_chat_from_a_file(generate, typed, checkpoint, options: list, mode: ChatMode) -> None:  # noqa: F811
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    model = load(checkpoint)
    prompt = model.tokenizer.encode(encode_messages(turns, mode))
    (want,) = model.generate([prompt], max_new_tokens=6)
    for found in (turns, {"messages": turns}):
        typed(json.dumps(found).encode())
        said = generate("--messages", "-", *QUIET, *options).out
        assert said == model.tokenizer.decode(want) + "\n"


@pytest.mark.parametrize("chat", [[], ["--chat"]])
def test_literals_are_text_unless_control_is_asked_for(generate, checkpoint, chat: list) -> None:  # noqa: F811
    tokenizer = load(checkpoint).tokenizer
    counts = [
        generate("--prompt", "</think>", *QUIET, *chat, *more).err
        for more in ([], ["--control-tokens"])
    ]
    fewer = len(tokenizer.encode("</think>")) - 1
    first, second = (int(count.split()[1]) for count in counts)
    assert first - second == fewer > 0


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--prompt", "a", "--prompt-file", "b"], 2, "give one source"),
        (["--prompt", "-", "--messages", "-"], 2, "give one source"),
        (["--input-ids", "a", "--chat"], 2, "ids need no encoding"),
        (["--input-ids", "a", "--control-tokens"], 2, "ids need no encoding"),
        (["--prompt-file", "/none"], 2, "--prompt-file: no file /none"),
        (["--prompt-file", "/"], 2, "--prompt-file: / cannot be read"),
        (["--messages", "/none"], 2, "--messages: no file /none"),
        (["--effort", "high"], 2, "--effort: only with --chat"),
        (["--encoding", "recipe"], 2, "--encoding: only with --chat"),
        (["--chat", "--encoding", "final"], 2, "expected preview or recipe"),
        (["--chat", "--effort", "huge"], 2, "effort 'huge', expected high or max"),
        (["--prompt", "-"], 2, "--prompt: standard input holds the byte 0xff at 1, expected UTF-8"),
        (["--input-ids", "-"], 2, "standard input is neither JSON"),
        (["--messages", "-"], 2, "--messages: standard input"),
    ],
)
def test_a_bad_source_is_named(generate, typed, options: list, code: int, words: str) -> None:  # noqa: F811
    typed(b"a\xff")
    found = generate(*options)
    assert (found.code, found.out) == (code, "")
    assert words in found.err.replace("\n", " ")


EMOJI = """
import sys
from dsv4_ascend.cli import main
from dsv4_ascend.model.model import Model
def stream(self, prompts, **options):
    return ((0, token) for token in self.tokenizer.encode("é日本 😀 ok"))
Model.stream = stream
main.main(sys.argv[1:])
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "gbk", "utf-8"])
def test_what_the_terminal_lacks_is_escaped(encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [sys.executable, "-c", EMOJI, "generate"], env=environment, capture_output=True, timeout=300
    )
    assert done.returncode == 0
    assert done.stdout == "é日本 😀 ok\n".encode(encoding, "backslashreplace")


TABLE = r"""
import sys
from dsv4_ascend.cli import console, doctor, main
doctor.doctor = lambda: console().print("\u65e5\u672c \u2192 \U0001f600")
main.main(["doctor"])
"""


def test_tables_too() -> None:
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-c", TABLE], env=environment, capture_output=True, timeout=300
    )
    assert (done.returncode, done.stdout) == (0, b"\\u65e5\\u672c \\u2192 \\U0001f600\n")


START = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run behind `&`
sys.argv[0] = "dsv4-ascend"
from dsv4_ascend.cli.main import main
assert "torch" not in sys.modules
print("begin", flush=True)
main(["generate", "--max-new-tokens", "9999"])
"""


@pytest.mark.parametrize("delay", [0.0, 0.3, None])
def test_an_interrupt_is_130_without_a_traceback(delay: float | None) -> None:
    """While modules are imported, and (None) in the middle of the text."""
    process = subprocess.Popen(
        [sys.executable, "-c", START], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"begin\n"
    time.sleep(delay if delay is not None else 0)
    if delay is None:
        assert process.stdout.read(1)
    else:
        time.sleep(0.05)  # until main has put its handler in place
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert b"Traceback" not in errors
