"""Writing: deterministic, readable by the safetensors library, all or nothing even when killed."""

import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch
from tiny_checkpoints import bits, random_tensors, tiny_config, write_tiny

from dsv4_ascend.checkpoint import save
from dsv4_ascend.checkpoint.folder import open_checkpoint
from dsv4_backend.errors import CheckpointError


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_same_tensors_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_tiny(tmp_path / name, shard_bytes=50_000)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(contents(tmp_path / "a")) > 4


def test_the_safetensors_library_reads_it(tmp_path):
    tensors = write_tiny(tmp_path / "c", shard_bytes=50_000)
    seen = {}
    for path in (tmp_path / "c").glob("*.safetensors"):
        seen |= safetensors.torch.load_file(path)
    assert {name: bits(tensor) for name, tensor in seen.items()} == {
        n: bits(t) for n, t in tensors.items()
    }


def test_strided_tensors_and_more_files(tmp_path):
    config = tiny_config()
    tensors = random_tensors(config)
    tensors["embed.weight"] = torch.randn(64, 19).to(torch.bfloat16).t()
    save.save_checkpoint(tmp_path / "deep" / "c", config, tensors, files={"tokenizer.json": b"{}"})
    loaded = open_checkpoint(tmp_path / "deep" / "c").tensor("embed.weight")
    assert torch.equal(loaded, tensors["embed.weight"])
    assert (tmp_path / "deep" / "c" / "tokenizer.json").read_bytes() == b"{}"


def refusal(folder, tensors, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        save.save_checkpoint(folder, tiny_config(), tensors, **options)
    return str(caught.value)


def test_tensors_that_do_not_fit_leave_nothing(tmp_path):
    tensors = random_tensors(tiny_config())
    del tensors["layers.0.attn.wq_a.scale"]
    tensors["embed.weight"] = tensors["embed.weight"].double()
    message = refusal(tmp_path / "c", tensors)
    assert "without its scale" in message
    assert "found dtype F64" in message
    assert list(tmp_path.iterdir()) == []


def test_refusals(tmp_path):
    tensors = random_tensors(tiny_config())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert "expected a new or empty folder" in refusal(tmp_path / "full", tensors)
    assert "expected one without folders" in refusal(tmp_path / "c", tensors, files={"../x": b""})
    assert "complex64" in refusal(
        tmp_path / "c", tensors | {"norm.weight": torch.zeros(64, dtype=torch.complex64)}
    )
    assert "cannot be written" in refusal(tmp_path / "full" / "x" / "c", tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "c").mkdir()
    write_tiny(tmp_path / "c")
    assert open_checkpoint(tmp_path / "c").format == "official"


WRITE_FOREVER = """
import shutil, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tiny_checkpoints import write_tiny
print("ready", flush=True)
while True:
    write_tiny(Path(sys.argv[1]), shard_bytes=10_000)
    shutil.move(sys.argv[1], sys.argv[1] + ".done")
    shutil.rmtree(sys.argv[1] + ".done")
"""


@pytest.mark.parametrize("delay", [0.005, 0.02, 0.05])
def test_a_killed_writer_leaves_no_half_folder(tmp_path, delay):
    target = tmp_path / "c"
    command = [sys.executable, "-c", WRITE_FOREVER, str(target), str(__file__).rsplit("/", 1)[0]]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
    if target.exists():
        open_checkpoint(target)
