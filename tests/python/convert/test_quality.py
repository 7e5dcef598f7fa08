"""Errors of weights against NumPy's, perplexities, and what is saved of them."""

import json
import shutil

import ml_dtypes  # noqa: F401  (names of dtypes for NumPy)
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dsv4_ascend.checkpoint.folder import open_checkpoint
from dsv4_ascend.cli.main import main
from dsv4_ascend.convert.comparison import compare
from dsv4_ascend.convert.folders import QUALITY
from dsv4_ascend.convert.quality import quality
from dsv4_ascend.tiny.release import SHIPPED
from dsv4_backend.ops.quant import dequantize_fp4


def test_errors_of_a_tensor_are_those_of_numpy(folders):
    folder = folders["a2a3-w4a8"]
    found = compare(SHIPPED, folder).other_values
    name = "layers.2.ffn.experts.5.w3"
    official = open_checkpoint(SHIPPED)
    want = dequantize_fp4(official.tensor(f"{name}.weight"), official.scale(f"{name}.weight"))
    want = want.double().numpy()
    limit = np.abs(want).max(1, keepdims=True) / 7
    scale = torch.from_numpy(limit.astype(np.float32)).view(torch.int32)
    scale = ((scale + 0xFFFF) & -0x10000).view(torch.float32).double().numpy()
    error = np.clip(np.rint(want / scale), -7, 7) * scale - want
    assert found[f"{name}.weight"].max == pytest.approx(np.abs(error).max() / np.abs(want).max())
    rms = np.sqrt((error**2).sum() / (want**2).sum())
    assert found[f"{name}.weight"].rms == pytest.approx(rms)
    stored = load_file(next(folder.glob("*.safetensors")))
    assert np.array_equal(stored[f"{name}.weight_scale"].double().numpy(), scale)


LIMITS = {"a2a3-int8": 0.008, "a2a3-w4a8": 0.15}
EXACT = ("q_a", "kv", "o_a", "embed", "head", "gate", "norms", "mhc", "compressor", "tables")


@pytest.mark.parametrize("target", LIMITS)
def test_classes(folders, tmp_path, target):
    folder = shutil.copytree(folders[target], tmp_path / target)
    found = quality(SHIPPED, folder, tokens=0)
    told = json.loads((folder / QUALITY).read_text())
    assert told["perplexity"] == "not wanted"
    assert {name for name, e in told["errors"].items() if e["max"] == 0} >= set(EXACT)
    assert 0.1 * LIMITS[target] < told["errors"]["experts"]["rms"] < LIMITS[target]
    assert told["errors"]["q_b"]["rms"] < 0.008
    worst = [e["rms"] for e in told["worst"].values()]
    assert worst == sorted(worst, reverse=True)
    assert len(told["tensors"]) > 200
    assert told["worst"].items() <= told["tensors"].items()
    assert worst[0] == max(e.rms for e in found.compared.other_values.values())


@pytest.mark.parametrize("target", ["a5-mx", "bf16"])
def test_exact_targets(folders, target):
    assert not compare(SHIPPED, folders[target]).other_values


def test_on_the_command_line(tmp_path, capsys):
    arguments = ["convert", str(SHIPPED), str(tmp_path / "f"), "--target", "a2a3-int8", "--quality"]
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--tokens", "512"])
    out, told = capsys.readouterr().out, json.loads((tmp_path / "f" / QUALITY).read_text())
    assert caught.value.code == 0
    found = told["perplexity"]
    assert found["tokens"] == 512
    assert (found["before_profile"], found["after_profile"]) == ("official", "a2a3-int8")
    assert found["after"] == pytest.approx(found["before"], rel=0.02)
    shown = f"{found['before']:.2f} (official) before, {found['after']:.2f} (a2a3-int8) after"
    assert f"perplexity over 512 tokens: {shown}" in out
    assert "worst: layers." in out
