"""`dsv4-ascend generate` and `logits` on several ranks: one voice, one result, one error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from rank_processes import fork_ranks
from safetensors.torch import load_file

from dsv4_ascend.cli import voice
from dsv4_ascend.cli.main import main
from dsv4_ascend.model.model import load
from dsv4_ascend.tiny.release import SHIPPED

GENERATE = "generate", "--max-new-tokens", 6, "--temperature", 0, "--profile", "ideal"
TWO = "torchrun", "--standalone", "--nproc-per-node", "2", "-m", "dsv4_ascend"


@pytest.fixture
def ranks(capfd, monkeypatch):
    """Run a command line on two ranks: exit codes, standard output and error of both together."""
    monkeypatch.setattr(voice, "_HEAD_START", 0.1)

    def run(*arguments):
        started = fork_ranks(2, lambda rank: main([str(a) for a in arguments]))
        for process, _ in started:
            process.join(60)
        return [process.exitcode for process, _ in started], *capfd.readouterr()

    return run


@pytest.mark.parametrize("layout", [(), ("--dp", 2)])
def test_rank_0_alone_prints_the_text_of_one_rank(ranks, layout):
    codes, out, err = ranks(*GENERATE, *layout)
    model = load(SHIPPED, profile="ideal")
    assert codes == [0, 0]
    text = model.generate("def ", max_new_tokens=6)[0]
    assert out == model.tokenizer.decode(text) + "\n"
    assert err.startswith("prefill 3 tokens")
    assert err.count("\n") == 1


def test_logits_are_written_once(ranks, tmp_path):
    ids, target = [0, 5, 300, 7], tmp_path / "out.safetensors"
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    codes, out, err = ranks(
        "logits", "--input-ids", tmp_path / "ids.json", "--output", target, "--profile", "ideal"
    )
    assert (codes, out, err) == ([0, 0], "", "")
    expected = load(SHIPPED, profile="ideal").forward(ids)
    assert (load_file(target)["logits"] - expected).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tp", 3], "--tp: found 3, expected a divisor of the 2 ranks; what works with 2 ranks:"),
        (["--tp", 0], "Invalid value for '--tp'"),
        (["--prompt", "-"], "--prompt: found standard input, expected a file, which all ranks"),
    ],
)
def test_a_mistake_in_the_command_line_is_told_once(ranks, options, said):
    codes, out, err = ranks(*GENERATE, *options)
    assert codes == [2, 2]
    assert out == ""
    assert err.count(said) == 1


def test_a_fault_names_its_rank_and_ends_the_others(ranks, tmp_path, monkeypatch):
    """Only rank 1 lacks the checkpoint."""
    from dsv4_ascend.cli import loading

    real = loading.load

    def lacking(folder, **options):
        where = tmp_path / "nothing" if os.environ["RANK"] == "1" else folder
        return real(where, **options)

    monkeypatch.setattr(loading, "load", lacking)
    codes, out, err = ranks(*GENERATE)
    assert codes == [3, 1]
    assert out == ""
    assert "dsv4-ascend: rank 1 of 2: " in err
    assert "dsv4-ascend: rank 0 of 2: rank 1 has ended before its work was done" in err


def torchrun(*arguments, **options):
    command = [sys.executable, "-m", "torch.distributed.run", *TWO[1:], *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


@pytest.mark.long  # the default tier has the README's line
def test_torchrun_starts_ranks():
    process = torchrun(*GENERATE)
    out, err = process.communicate(timeout=200)
    model = load(SHIPPED, profile="ideal")
    assert process.returncode == 0, err
    assert out == model.tokenizer.decode(model.generate("def ", max_new_tokens=6)[0]) + "\n"


@pytest.mark.long
def test_torchrun_ends_with_a_rank_that_is_killed():
    process = torchrun("generate", "--max-new-tokens", 100_000, "--temperature", 0)
    assert process.stdout.read(4)  # both ranks have begun
    children = [int(pid) for pid in children_of(process.pid)]
    os.kill(children[1], signal.SIGKILL)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert process.returncode != 0
    assert "rank" in err
    assert str(children[1]) in err


def children_of(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return file.read().split()


def test_a_command_without_a_launcher_says_how_to_start_one(capsys):
    with pytest.raises(SystemExit) as left:
        main(["generate", "--tp", "2"])
    assert left.value.code == 2
    assert "torchrun --nproc-per-node 2 -m dsv4_ascend" in capsys.readouterr().err
