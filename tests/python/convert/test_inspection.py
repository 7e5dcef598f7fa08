"""`inspect` and `verify`: what they tell of good folders, and each thing that can be wrong."""

import json
import re
import shutil

import pytest
import torch
from tiny_checkpoints import random_tensors, tiny_config

from dsv4_ascend.checkpoint.save import save_checkpoint
from dsv4_ascend.cli.main import main
from dsv4_ascend.convert.inspection import inspect
from dsv4_ascend.convert.targets import TARGETS
from dsv4_ascend.convert.verification import RMS_RATIO, verify
from dsv4_ascend.tiny.release import SHIPPED


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    return caught.value.code, *capsys.readouterr()


@pytest.mark.parametrize("target", TARGETS)
def test_converted_folders_are_known_and_look_right(folders, target):
    folder = folders[target]
    found = inspect(folder)
    assert found.format.startswith(f"{target} (")
    assert found.parameters == inspect(SHIPPED).parameters
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert 0 < stored - found.nbytes < 200_000  # headers
    assert found.problems == ()
    assert verify(folder) == []


def test_inspect_on_the_command_line(capsys):
    code, out, _ = run(capsys, "inspect")
    assert code == 0
    assert "no release: 4 layers, hidden 256, 16 experts, 1 MTP block(s)" in out
    assert "official (F8_E4M3 44, FP4 240)" in out
    code, out, _ = run(capsys, "inspect", "--json")
    found = json.loads(out)
    assert found["classes"]["experts"]["parameters"] == 5 * 16 * 3 * 128 * 256
    assert found["classes"]["experts"]["formats"] == {"FP4": 240}
    assert (found["problems"], found["notes"]) == ([], [])


def test_what_is_missing_or_foreign(tmp_path, capsys):
    config = tiny_config()
    tensors = random_tensors(config)
    save_checkpoint(tmp_path / "folder", config, tensors)
    index = tmp_path / "folder" / "model.safetensors.index.json"
    index.unlink()
    raw = json.loads((tmp_path / "folder" / "config.json").read_text())
    raw["num_hash_layers"] = 0
    (tmp_path / "folder" / "config.json").write_text(json.dumps(raw))
    code, out, _ = run(capsys, "inspect", tmp_path / "folder")
    assert code == 1
    assert "problem: tensor 'layers.0.ffn.gate.bias' is missing" in out
    assert "gate.tid2eid': surplus" in out
    assert run(capsys, "verify", tmp_path / "folder")[0] == 1


GOOD = {"linear": "BF16", "expert": "BF16"}
CONFIG = tiny_config((0, 4, 16, 4, 0), quantized=False, expert_dtype=None, n_routed_experts=4)
W2, W1 = "layers.1.ffn.experts.2.w2.weight", "layers.1.ffn.experts.2.w1.weight"


def twin_elsewhere(tensors):
    """One matrix, in another layer."""
    tensors["layers.2.ffn.experts.3.w1.weight"].copy_(tensors["layers.1.ffn.experts.0.w1.weight"])


def nearly_dead(tensors):
    tensors[W2].view(-1)[: int(0.95 * tensors[W2].numel())] = 0


def nan(tensors):
    tensors["layers.1.attn.wq_b.weight"][3, 2] = torch.nan


def infinite_norm(tensors):
    tensors["layers.1.attn_norm.weight"][3] = torch.inf


def dead(tensors):
    tensors[W2].zero_()


def twin(tensors):
    for part in ("w1", "w2", "w3"):
        tensors[f"layers.2.ffn.experts.3.{part}.weight"].copy_(
            tensors[f"layers.2.ffn.experts.1.{part}.weight"]
        )


def token_table(tensors):
    tensors["layers.0.ffn.gate.tid2eid"][5, 1] = 4


def loud(tensors):
    tensors[W1].mul_(2 * RMS_RATIO)


FAULTS = {
    nan: r"tensor 'layers.1.attn.wq_b.weight': found 1 of 1536 values not finite",
    infinite_norm: r"tensor 'layers.1.attn_norm.weight': found inf at \[3\], expected a finite",
    dead: rf"tensor '{W2}': found zeros alone, .*dead",
    twin: r"layers.2.ffn.experts.3: found the same bytes as layers.2.ffn.experts.1",
    twin_elsewhere: r"layers.2.ffn.experts.3: found the same bytes as layers.1.ffn.experts.0 in w1",
    nearly_dead: rf"tensor '{W2}': found 95% of its values zeros, expected at most 90%",
    token_table: r"tid2eid': found 4 at \[5, 1\], expected an expert id in \[0, 4\)",
    loud: rf"tensor '{W1}': found an rms of .*, expected within a factor of 16 of .*, the median",
}


def written(folder, tensors, config=CONFIG):
    """Without the checks of `save_checkpoint`, which opens what it wrote."""
    from safetensors.torch import save_file

    from dsv4_ascend.checkpoint.config_file import config_to_dict

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_to_dict(config)))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_each_fault_is_the_only_finding(tmp_path, fault):
    tensors = random_tensors(CONFIG, **GOOD)
    assert verify(written(tmp_path / "good", tensors)) == []
    fault(tensors)
    (line,) = verify(written(tmp_path / "bad", tensors))
    assert re.search(FAULTS[fault], line), line


def scale_nan(tensors):
    tensors["layers.1.ffn.experts.2.w2.scale"].view(torch.uint8)[3, 0] = 255


def code_nan(tensors):
    tensors["layers.1.attn.wq_b.weight"].view(torch.uint8)[3, 2] = 0x7F


def saturated(tensors):
    tensors[W1].view(torch.uint8)[:12] = 0x77


def vanished(tensors):
    tensors[W1].view(torch.uint8)[1:] = 0x80


CODES = {
    scale_nan: r"experts.2.w2.scale': found nan at \[3, 0\], expected a positive finite scale",
    code_nan: r"wq_b.weight': found 1 of 1536 values not finite",
    saturated: rf"{W1}': found 4\d% of its codes the largest e2m1 codes, expected at most 25%",
    vanished: rf"{W1}': found 9\d% of its values zeros, expected at most 90%",
}


@pytest.mark.parametrize("fault", CODES, ids=lambda fault: fault.__name__)
def test_each_fault_of_codes_is_found(tmp_path, fault):
    config = tiny_config((0, 4, 16, 4, 0), n_routed_experts=4)
    tensors = random_tensors(config)
    for name in (name for name in tensors if name.endswith(".scale")):
        tensors[name].view(torch.uint8).fill_(120)  # random ones would be outliers themselves
    assert verify(written(tmp_path / "good", tensors, config)) == []
    fault(tensors)
    found = verify(written(tmp_path / "bad", tensors, config))
    assert re.search(CODES[fault], found[0]), found


def test_an_offset_that_is_not_zero(folders, tmp_path):
    folder = shutil.copytree(folders["a2a3-int8"], tmp_path / "folder")
    (path,) = folder.glob("*.safetensors")
    raw = bytearray(path.read_bytes())
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    name = "layers.1.ffn.experts.7.w1.weight_offset"
    raw[8 + int.from_bytes(raw[:8], "little") + header[name]["data_offsets"][0] + 3] = 0x40
    path.write_bytes(raw)
    (line,) = verify(folder)
    assert name in line
    assert "found 2 at [0, 0], expected 0, as symmetric codes have it" in line


def test_verify_on_the_command_line(folders, tmp_path, capsys):
    code, out, _ = run(capsys, "verify")
    assert (code, out.endswith("nothing looks wrong\n")) == (0, True)
    tensors = random_tensors(CONFIG, **GOOD)
    dead(tensors)
    bad = written(tmp_path / "bad", tensors)
    code, out, _ = run(capsys, "verify", bad)
    assert (code, out.count("\n")) == (1, 2)
    code, out, _ = run(capsys, "verify", bad, "--json")
    assert len(json.loads(out)["findings"]) == 1
    code, out, _ = run(capsys, "verify", folders["a2a3-int8"], "--against", SHIPPED)
    assert code == 1
    assert "other values: max 0.00" in out
