"""`dsv4-ascend generate` and `logits` on a random checkpoint: what is printed,
what is written, what is refused.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from seeds import seed_of
from tiny_networks import CONFIG, random_model

from dsv4_ascend.checkpoint.save import save_checkpoint
from dsv4_ascend.cli.main import main
from dsv4_ascend.model import model as model_module
from dsv4_ascend.model.model import load
from dsv4_ascend.model.step import make_step
from dsv4_ascend.model.weights import official_tensors
from dsv4_ascend.tiny.corpus import train_tokenizer

VOCAB = 300
IDS = torch.randint(
    0, VOCAB, (40,), generator=torch.Generator().manual_seed(seed_of(__name__))
).tolist()
SPEED = re.compile(
    r"prefill \d+ tokens, [\d.]+ tokens/s(; decode \d+ tokens, [\d.]+ tokens/s)?.*\n"
)


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "checkpoint"
    model = random_model(dataclasses.replace(CONFIG, vocab_size=VOCAB, eos_token_ids=()))
    tokenizer = train_tokenizer(["def f(x):\n    return x + 1\n", "grüße an die Welt"] * 3, VOCAB)
    tensors = dict(official_tensors(model.network))
    save_checkpoint(
        folder, model.config, tensors, files={"tokenizer.json": tokenizer.to_str().encode()}
    )
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture) -> Callable[..., Result]:
    def call(*arguments: object) -> Result:
        with pytest.raises(SystemExit) as left:
            main([str(a) for a in arguments])
        return Result(left.value.code or 0, *capsys.readouterr())

    return call


@pytest.fixture
def generate(run, checkpoint: Path) -> Callable[..., Result]:
    return lambda *more: run("generate", "--checkpoint", checkpoint, "--max-new-tokens", 6, *more)


@pytest.fixture
def logits(run, checkpoint: Path, tmp_path: Path) -> Callable[..., Result]:
    output = tmp_path / "out.safetensors"

    def call(ids: object, *more: object) -> Result:
        path = ids if isinstance(ids, Path) else tmp_path / "ids.json"
        if not isinstance(ids, Path):
            path.write_text(json.dumps(ids))
        return run(
            "logits", "--checkpoint", checkpoint, "--input-ids", path, "--output", output, *more
        )

    return call


def written(tmp_path: Path) -> torch.Tensor:
    (name,) = [p.name for p in tmp_path.iterdir() if p.name.startswith((".", "out"))]
    assert name == "out.safetensors"
    ((tensor, value),) = load_file(tmp_path / name).items()
    assert tensor == "logits"
    assert value.dtype == torch.float32
    return value


def in_a_process(*arguments: object) -> subprocess.CompletedProcess:
    code = "from dsv4_ascend.cli.main import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, timeout=300, check=False)


# generate


def test_text_on_stdout_and_speed_on_stderr(generate, checkpoint: Path) -> None:
    found = generate("--prompt", "def f", "--temperature", 0)
    model = load(checkpoint)
    assert found.code == 0
    assert found.out == model.tokenizer.decode(model.generate("def f", max_new_tokens=6)[0]) + "\n"
    assert SPEED.fullmatch(found.err)
    assert "decode 6 tokens" in found.err


def test_generate_as_a_process(generate, checkpoint: Path) -> None:
    arguments = ["--prompt", "grüße", "--seed", 3]
    process = in_a_process(
        "generate", "--checkpoint", checkpoint, "--max-new-tokens", 6, *arguments
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.decode() == generate(*arguments).out
    assert SPEED.fullmatch(process.stderr.decode())


def test_the_seed_decides_the_text(generate) -> None:
    first, again, other = (generate("--temperature", 1, "--seed", seed).out for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_drafting_changes_no_text(generate) -> None:
    plain, drafted = (generate("--temperature", 0, "--draft-tokens", n) for n in (0, 2))
    assert drafted.out == plain.out
    assert re.search(r"\d+% of drafted tokens accepted\n$", drafted.err)
    assert "drafted" not in plain.err


@pytest.mark.parametrize(("options", "opening"), [([], "</think>"), (["--thinking"], "<think>")])
def test_chat_encodes_the_prompt(
    generate, checkpoint: Path, options: list[str], opening: str
) -> None:
    found = generate("--chat", "--prompt", "def", "--temperature", 0, *options)
    model = load(checkpoint)
    ids = model.tokenizer.encode(
        f"<｜begin▁of▁sentence｜><｜User｜>def<｜Assistant｜>{opening}", control=True
    )
    want = model.generate([ids], max_new_tokens=6)[0]
    assert found.out == model.tokenizer.decode(want) + "\n"
    assert f"prefill {len(ids)} tokens" in found.err


def test_generating_nothing_prints_an_empty_line(run, checkpoint: Path) -> None:
    assert run("generate", "--checkpoint", checkpoint, "--max-new-tokens", 0).out == "\n"


def test_the_profile_reaches_the_model(generate, checkpoint: Path) -> None:
    model = load(checkpoint, dtype=torch.float32)
    want = model.tokenizer.decode(model.generate("def ", max_new_tokens=6)[0])
    assert generate("--temperature", 0, "--profile", "ideal").out == want + "\n"


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--thinking"], 2, "--thinking: only with --chat"),
        (["--draft-tokens", "1"], 2, "temperature 0"),
        (["--top-p", "0"], 2, "top_p: found 0.0, expected a finite number in (0, 1]"),
        (["--temperature", "inf"], 2, "temperature: found inf, expected a finite number >= 0"),
        (
            ["--profile", "fast"],
            2,
            "--profile: found 'fast', expected ideal, official, bf16, a2a3-int8, a2a3-w4a8 or "
            "a5-mx",
        ),
        (["--device", "gpu"], 2, "--device: found 'gpu', expected cpu or npu"),
        (["--device", "meta"], 2, "--device: found 'meta', expected cpu or npu"),
        (["--prompt", "a\udcff"], 2, r"text: found '\udcff' at 1, expected Unicode"),
        (["--temperature", "-1"], 2, "--temperature"),
        (["--temperature", "nan"], 2, "--temperature"),
        (["--max-new-tokens", "-1"], 2, "--max-new-tokens"),
        (["--max-new-tokens", "many"], 2, "--max-new-tokens"),
        (["--seed", str(2**64)], 2, "--seed"),
        (["--nonsense"], 2, "--nonsense"),
    ],
)
def test_generate_refuses(generate, options: list[str], code: int, words: str) -> None:
    assert_refused(generate(*options), code, words)


@pytest.mark.parametrize("command", ["generate", "logits"])
def test_an_absent_checkpoint_is_one_line(run, tmp_path: Path, command: str) -> None:
    (tmp_path / "ids.json").write_text("[1]")
    more = (
        ["--input-ids", tmp_path / "ids.json", "--output", tmp_path / "out"]
        if command == "logits"
        else []
    )
    found = run(command, "--checkpoint", tmp_path / "none", *more)
    assert_refused(found, 2, f"--checkpoint: no folder {tmp_path}/none")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ids.json"]


def test_a_checkpoint_without_tokenizer_says_what_to_do(
    run, checkpoint: Path, tmp_path: Path
) -> None:
    for path in checkpoint.iterdir():
        if path.name != "tokenizer.json":
            (tmp_path / path.name).symlink_to(path)
    assert_refused(
        run("generate", "--checkpoint", tmp_path),
        1,
        "no tokenizer.json; give token ids instead of text",
    )


def assert_refused(found: Result, code: int, words: str) -> None:
    """No traceback, nothing on stdout, one line (two for usage, which typer frames)."""
    assert (found.code, found.out) == (code, "")
    assert words in found.err
    assert code == 2 or (found.err.startswith("dsv4-ascend: ") and found.err.count("\n") == 1)


# logits


@pytest.fixture(scope="module")
def whole(checkpoint: Path) -> torch.Tensor:
    return load(checkpoint, dtype=torch.float32).forward(IDS, chunk=len(IDS))


def test_logits_from_json(logits, tmp_path: Path, whole: torch.Tensor) -> None:
    assert logits(IDS, "--profile", "ideal") == (0, "", "")
    assert torch.equal(written(tmp_path), whole)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint16])
def test_logits_from_safetensors(
    logits, tmp_path: Path, whole: torch.Tensor, dtype: torch.dtype
) -> None:
    save_file({"any name": torch.tensor(IDS, dtype=dtype)}, tmp_path / "ids.safetensors")
    assert logits(tmp_path / "ids.safetensors", "--profile", "ideal").code == 0
    assert torch.equal(written(tmp_path), whole)


@pytest.mark.parametrize(
    "options", [["--chunk", 7], ["--decode-from", 35], ["--chunk", 8, "--decode-from", 38]]
)
def test_chunks_and_decoding_give_the_same(
    logits, tmp_path: Path, whole: torch.Tensor, options: list
) -> None:
    """Only the order of fp32 sums differs; logits are of size 3."""
    assert logits(IDS, "--profile", "ideal", *options).code == 0
    torch.testing.assert_close(written(tmp_path), whole, atol=1e-3, rtol=0)


def test_official_is_the_default_profile(logits, checkpoint: Path, tmp_path: Path) -> None:
    assert logits(IDS[:9]).code == 0
    assert torch.equal(written(tmp_path), load(checkpoint).forward(IDS[:9], chunk=9))


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ([], [16, 16, 8]),
        (["--chunk", 30], [30, 10]),
        (["--decode-from", 38], [16, 16, 6, 1, 1]),
        (["--chunk", 64], [40]),
    ],
)
def test_logits_are_prefilled_in_chunks(
    logits, monkeypatch: pytest.MonkeyPatch, options: list, steps: list
) -> None:
    """The default bounds the memory of a long prompt: 512 tokens, 16 here."""
    assert model_module.PREFILL_CHUNK == 512
    found = []

    def seen(cache, sequences, parts):
        found.append(len(parts[0]))
        return make_step(cache, sequences, parts)

    monkeypatch.setattr(model_module, "PREFILL_CHUNK", 16)
    monkeypatch.setattr(model_module, "make_step", seen)
    assert logits(IDS, *options).code == 0
    assert found == steps


def test_no_ids_give_an_empty_result(logits, tmp_path: Path) -> None:
    assert logits([]).code == 0
    assert written(tmp_path).shape == (0, VOCAB)


def test_logits_replaces_an_older_file(logits, tmp_path: Path) -> None:
    (tmp_path / "out.safetensors").write_text("old")
    assert logits(IDS[:3]).code == 0
    assert written(tmp_path).shape == (3, VOCAB)


def test_logits_as_a_process(checkpoint: Path, tmp_path: Path, whole: torch.Tensor) -> None:
    (tmp_path / "ids.json").write_text(json.dumps(IDS))
    files = ["--input-ids", tmp_path / "ids.json", "--output", tmp_path / "out.safetensors"]
    process = in_a_process("logits", "--checkpoint", checkpoint, "--profile", "ideal", *files)
    assert (process.returncode, process.stdout, process.stderr) == (0, b"", b"")
    torch.testing.assert_close(written(tmp_path), whole, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "neither JSON nor named *.safetensors"),
        ("[" * 100000, "too deeply nested"),
        ("[NaN]", "found NaN"),
        ('{"ids": [1]}', "holds dict, expected a list of integers"),
        ("[1, 2.0]", "2.0 at position 1, expected an integer"),
        ("[true]", "True at position 0"),
        ('["1"]', "'1' at position 0"),
        ("[1, [2]]", "[2] at position 1"),
        (f"[1, {VOCAB}]", f"{VOCAB} at position 1, expected ids in [0, {VOCAB})"),
        ("[-1]", "-1 at position 0"),
        (f"[{10**30}]", "at position 0"),
    ],
)
def test_bad_json_is_named(logits, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "ids.txt").write_text(text)
    assert_refused(logits(tmp_path / "ids.txt"), 2, words)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "holds 0 tensors, expected one"),
        ({"a": torch.tensor([1]), "b": torch.tensor([2])}, "holds 2 tensors, expected one"),
        ({"a": torch.tensor([1.0])}, "'a' is torch.float32 (1,), expected integers [T]"),
        ({"a": torch.tensor([True])}, "torch.bool"),
        ({"a": torch.tensor([[1]])}, "torch.int64 (1, 1)"),
        ({"a": torch.tensor([1, -5])}, "-5 at position 1"),
    ],
)
def test_bad_safetensors_are_named(logits, tmp_path: Path, tensors: dict, words: str) -> None:
    save_file(tensors, tmp_path / "ids.safetensors")
    assert_refused(logits(tmp_path / "ids.safetensors"), 2, words)
    assert not (tmp_path / "out.safetensors").exists()


def test_bad_files_are_named(logits, tmp_path: Path) -> None:
    (tmp_path / "ids.safetensors").write_bytes(b"no")
    assert_refused(logits(tmp_path / "ids.safetensors"), 2, "is not a safetensors file")
    assert_refused(logits(tmp_path / "gone.json"), 2, f"--input-ids: no file {tmp_path}/gone.json")
    (tmp_path / "latin.json").write_bytes(b"\xff")
    assert_refused(logits(tmp_path / "latin.json"), 2, "not UTF-8")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(("place", "code"), [("none/out", 2), ("", 2), ("x" * 300, 3)])
def test_a_bad_output_is_named_and_nothing_is_left(
    run, checkpoint: Path, tmp_path: Path, place: str, code: int
) -> None:
    (tmp_path / "ids.json").write_text("[1]")
    files = ["--input-ids", tmp_path / "ids.json", "--output", tmp_path / place]
    assert_refused(run("logits", "--checkpoint", checkpoint, *files), code, "--output: ")
    assert [p.name for p in tmp_path.iterdir()] == ["ids.json"]


@pytest.mark.parametrize("options", [["--chunk", 0], ["--decode-from", -1], ["--chunk", "all"]])
def test_logits_usage(logits, tmp_path: Path, options: list) -> None:
    assert_refused(logits([1], *options), 2, str(options[0]))
    assert not (tmp_path / "out.safetensors").exists()


def test_logits_needs_its_options(run) -> None:
    assert_refused(run("logits"), 2, "Missing option")
