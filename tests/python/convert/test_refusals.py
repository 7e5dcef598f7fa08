"""Places and sources that cannot be: one clear error each, and the source as it was."""

import json
import os
import shutil
import stat

import pytest
import torch
from conversions import SIZES, contents, converted, write_source
from tiny_checkpoints import random_tensors, tiny_config

from dsv4_ascend.checkpoint.folder import open_checkpoint
from dsv4_ascend.checkpoint.save import save_checkpoint
from dsv4_ascend.cli.main import main
from dsv4_ascend.convert.inspection import inspect
from dsv4_ascend.convert.job import convert
from dsv4_ascend.convert.targets import TARGETS
from dsv4_ascend.convert.verification import verify
from dsv4_backend.errors import CheckpointError, ConfigError

INT8 = TARGETS["a2a3-int8"]


def refused(source, folder, words):
    """The only line but the first."""
    before = contents(source)
    with pytest.raises((CheckpointError, ConfigError), match=words) as caught:
        convert(source, folder, INT8)
    assert contents(source) == before
    assert len(str(caught.value).splitlines()) <= 2
    return str(caught.value)


def test_places(source, tmp_path):
    refused(source, source, "found the source, expected another folder")
    (tmp_path / "link").symlink_to(source)
    refused(source, tmp_path / "link", "found the source")
    refused(source, source / "inside", "inside the source")
    refused(source, source.parent, "around the source")
    (tmp_path / "file").touch()
    refused(source, tmp_path / "file", "found a file, expected a new or empty folder")
    refused(source, tmp_path / "file" / "inside", "cannot be written")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    refused(source, tmp_path / "full", "found precious there already")
    assert os.listdir(tmp_path / "full") == ["precious"]


def test_a_folder_that_may_not_be_written(source, tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    if os.geteuid() == 0:  # whom no mode stops

        def open_(path, flags, *rest, real=os.open, **options):
            if flags & os.O_CREAT:
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, flags, *rest, **options)

        monkeypatch.setattr(os, "open", open_)
    else:
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    refused(source, folder, "cannot be written .*Permission denied")


def test_sources(source, tmp_path):
    folder = tmp_path / "folder"
    refused(converted(source, tmp_path / "int8", "a2a3-int8"), folder, "found W8A8_DYNAMIC weights")

    def changed(name):
        return shutil.copytree(source, tmp_path / name)

    cut = changed("cut")
    shard = sorted(cut.glob("*.safetensors"))[0]
    os.truncate(shard, shard.stat().st_size - 1)
    before = contents(cut)
    with pytest.raises(CheckpointError, match="truncated"):
        convert(cut, folder, INT8)
    assert contents(cut) == before
    gone = changed("gone")
    sorted(gone.glob("*.safetensors"))[1].unlink()
    refused(gone, folder, "expected a file in the folder")
    (changed("config") / "config.json").write_text("{")
    refused(tmp_path / "config", folder, "malformed JSON")
    assert not folder.exists()


def test_what_lies_beside_the_weights(tmp_path):
    """Files are copied, folders of the release's own too; pipes, hidden files and weights not."""
    source = write_source(tmp_path / "source")
    for name in ("inference/config.json", ".git/config", "x.bin"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}")
    os.mkfifo(source / "pipe")
    os.symlink("/nowhere", source / "broken")
    folder = converted(source, tmp_path / "folder", "a5-mx")
    beside = {name for name in contents(folder) if not name.startswith(("model", "con", "quant"))}
    assert beside == {"encoding/encoding_dsv4.py", "generation_config.json"}


DESCRIPTIONS = {
    "[]": "found a JSON list, expected an object",
    '{"layers.0.attn.wq_b.weight": "W8A8"}': "found 'W8A8', expected FLOAT or one of W8A8_DYNAMIC",
    '{"layers.0.attn.wq_b.weight": ["W8A8"]}': "expected FLOAT or one of",
    '{"layers.0.attn.wq_b.weight": "W4A8_MXFP"}': "found dtype I8, expected U8 or I8|found shape",
}


@pytest.mark.parametrize("text", DESCRIPTIONS)
def test_descriptions_that_lie(source, tmp_path, text):
    from dsv4_ascend.checkpoint.folder import open_checkpoint

    folder = converted(source, tmp_path / "folder", "a2a3-int8")
    path = folder / "quant_model_description.json"
    if "W4A8_MXFP" in text:
        text = json.dumps(json.loads(path.read_text()) | json.loads(text))
    path.write_text(text)
    with pytest.raises(CheckpointError, match=DESCRIPTIONS.get(text, "found shape")):
        open_checkpoint(folder)


def test_on_the_command_line(source, tmp_path, capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as caught:
            main([str(a) for a in arguments])
        return caught.value.code, *capsys.readouterr()

    folder = tmp_path / "folder"
    code, _, told = run("convert", source, folder, "--target", "int8")
    assert (code, told.count("\n")) == (2, 1)
    assert "--target: found 'int8', expected a2a3-int8" in told
    code, _, told = run("convert", tmp_path / "none", folder, "--target", "bf16")
    assert (code, told.count("\n")) == (2, 1)
    code, out, _ = run("convert", source, folder, "--target", "bf16")
    assert (code, "bf16, " in out) == (0, True)
    code, out, _ = run("convert", source, folder, "--target", "bf16")
    assert "of them there already" in out


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["layers.1.attn.wq_a.weight", "layers.1.ffn.experts.2.w1.weight"])
def test_values_that_are_not_finite_stop_it_at_the_tensor(tmp_path, name, target):
    config = tiny_config(quantized=False, expert_dtype=None, **SIZES)
    tensors = random_tensors(config, linear="BF16", expert="BF16")
    tensors[name][1, 3] = torch.inf
    save_checkpoint(tmp_path / "source", config, tensors)
    folder = tmp_path / "folder"
    for _ in range(2):
        with pytest.raises(CheckpointError, match=f"{name}.*not finite") as caught:
            convert(tmp_path / "source", folder, target)
        assert len(str(caught.value).splitlines()) <= 2
    assert not (folder / "config.json").exists()
    with pytest.raises(CheckpointError, match="unfinished conversion"):
        inspect(folder)
    with pytest.raises(CheckpointError, match="unfinished conversion"):
        verify(folder)


def test_files_that_are_left_out_are_told(source, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    os.mkfifo(tmp_path / "source" / "tokenizer.json")
    (tmp_path / "source" / "conversion_quality.json").write_text("{}")
    done = convert(tmp_path / "source", tmp_path / "folder", "bf16")
    assert any(note.startswith("tokenizer.json: left out") for note in done.notes)
    assert not (tmp_path / "folder" / "conversion_quality.json").exists()


def test_a_folder_without_its_description_is_told_so(source, tmp_path):
    converted(source, tmp_path / "folder", "a2a3-int8")
    (tmp_path / "folder" / "quant_model_description.json").unlink()
    with pytest.raises(CheckpointError, match=r"without quant_model_description\.json.*restore"):
        open_checkpoint(tmp_path / "folder")
