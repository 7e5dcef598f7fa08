"""A converted folder: what lies in it, and that it is the model that a profile makes of the
official one, bit for bit.
"""

import json

import numpy as np
import pytest
import torch
from conversions import DEPLOYED, contents, converted, write_source
from safetensors import safe_open

import dsv4_ascend
from dsv4_ascend.checkpoint.folder import open_checkpoint
from dsv4_ascend.convert.comparison import compare
from dsv4_ascend.convert.job import convert
from dsv4_ascend.convert.targets import TARGETS
from dsv4_ascend.tiny.release import SHIPPED
from dsv4_ascend.weights.linear import StoredModule
from dsv4_backend.errors import ArgumentError
from dsv4_backend.ops.int8 import pack_int4, unpack_int4


def weights(model):
    """Class, codes and scales of every weight, and every other parameter."""
    found = {
        path: (type(module.stored()), module.weight, module.scale)
        for path, module in model.network.named_modules()
        if isinstance(module, StoredModule)
    }
    rest = model.network.state_dict().items()
    return found | {name: (None, tensor, None) for name, tensor in rest if name not in found}


def same(one, other):
    if one is None or other is None:
        return one is other
    as_bytes = (t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*as_bytes)


@pytest.mark.parametrize("target", DEPLOYED)
def test_a_converted_folder_is_what_its_profile_makes_of_the_official_one(folders, target):
    got, want = dsv4_ascend.load(folders[target]), dsv4_ascend.load(SHIPPED, profile=target)
    assert got.profile is want.profile
    found, expected = weights(got), weights(want)
    assert found.keys() == expected.keys()
    for name, (form, weight, scale) in expected.items():
        assert found[name][0] is form, name
        assert same(found[name][1], weight), name
        assert same(found[name][2], scale), name
    ids = got.tokenizer.encode("def ", bos=True)
    options = {"max_new_tokens": 8, "draft_tokens": 1}
    assert got.generate([ids], **options) == want.generate([ids], **options)


@pytest.mark.parametrize("profile", ["official", "bf16", "ideal", "a2a3-int8"])
def test_a_bf16_folder_runs_in_every_profile(folders, profile):
    got = dsv4_ascend.load(folders["bf16"], profile=profile).forward([5, 6, 7, 8])
    want = dsv4_ascend.load(SHIPPED, profile=profile).forward([5, 6, 7, 8])
    if profile == "official":  # rows of float weights are not rounded to FP8
        assert (got - want).pow(2).mean() < 0.01 * want.var()
    else:
        assert torch.allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("target", DEPLOYED)
@pytest.mark.parametrize("profile", ["official", "ideal", "bf16", *DEPLOYED])
def test_profile_and_folder_must_agree(folders, target, profile):
    if profile == target or (target, profile) == ("a2a3-int8", "a2a3-w4a8"):
        assert dsv4_ascend.load(folders[target], profile=profile).profile.name == profile
        return
    words = rf"profile: found {profile}, but .*{target} was converted to .*expected {target} or"
    with pytest.raises(ArgumentError, match=words):
        dsv4_ascend.load(folders[target], profile=profile)


NAMES = {
    "a2a3-int8": ("layers.0.attn.wq_b", "W8A8_DYNAMIC", ("I8", 1), ("F32", None), True),
    "a2a3-w4a8": ("layers.1.ffn.experts.3.w1", "W4A8_DYNAMIC", ("I8", 2), ("F32", None), True),
    "a5-mx": ("layers.1.ffn.experts.3.w1", "W4A8_MXFP", ("U8", 1), ("U8", 32), False),
}


@pytest.mark.parametrize("target", NAMES)
def test_names_shapes_and_description_are_those_that_vllm_ascend_reads(folders, target):
    stem, kind, (dtype, packed), (scale_dtype, block), offset = NAMES[target]
    folder = folders[target]
    described = json.loads((folder / "quant_model_description.json").read_text())
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    rows, columns = open_checkpoint(SHIPPED).layout[f"{stem}.weight"].shape
    with safe_open(folder / index[f"{stem}.weight"], "np") as file:
        stored = file.get_slice(f"{stem}.weight")
        halved = 2 if target == "a5-mx" else 1
        assert (stored.get_dtype(), stored.get_shape()) == (
            dtype,
            [rows // packed, columns // halved],
        )
        scale = file.get_slice(f"{stem}.weight_scale")
        assert (scale.get_dtype(), scale.get_shape()) == (
            scale_dtype,
            [rows, columns // block if block else 1],
        )
        if offset:
            assert not np.any(file.get_tensor(f"{stem}.weight_offset"))
    assert described.keys() - index.keys() == {"model_quant_type", "version", "group_size"}
    assert not index.keys() - described.keys()
    assert described[f"{stem}.weight"] == described[f"{stem}.weight_scale"] == kind
    assert described["layers.0.attn.wq_a.weight"] == described["embed.weight"] == "FLOAT"
    assert described["group_size"] == (32 if target == "a5-mx" else 0)
    config = json.loads((folder / "config.json").read_text())
    official = json.loads((SHIPPED / "config.json").read_text())
    assert official.keys() - config.keys() == {"quantization_config", "expert_dtype"}


def test_int4_rows_and_the_kernels_bias(folders):
    """By NumPy: low half the even row; scale_bias is 8 times the sum of values, of w2 in parts."""
    (path,) = folders["a2a3-w4a8"].glob("*.safetensors")
    with safe_open(path, "np") as file:
        for part, columns in (("w1", 1), ("w2", 16)):
            stem = f"layers.1.ffn.experts.3.{part}"
            packed, scale, bias = (
                file.get_tensor(f"{stem}.{leaf}")
                for leaf in ("weight", "weight_scale", "scale_bias")
            )
            codes = np.empty((2 * packed.shape[0], packed.shape[1]), np.int8)
            codes[0::2], codes[1::2] = (packed << 4) >> 4, packed >> 4
            assert codes.min() == -7
            assert codes.max() == 7
            values = codes.astype(np.float64) * scale
            parts = 8 * values.reshape(len(values), columns, -1).sum(-1)
            assert np.allclose(bias, parts, rtol=1e-5, atol=1e-5)


def test_int4_packs_and_unpacks():
    codes = torch.randint(-8, 8, (3, 6, 5)).to(torch.int8)
    assert torch.equal(unpack_int4(pack_int4(codes)), codes)


@pytest.mark.parametrize("linear", ["F8_E4M3", "BF16", "F32"])
@pytest.mark.parametrize("target", DEPLOYED)
def test_sources_of_several_formats(tmp_path, linear, target):
    expert = "I8" if linear == "F8_E4M3" else linear
    source = write_source(tmp_path / "source", linear=linear, expert=expert)
    folder = converted(source, tmp_path / "folder", target)
    got, want = dsv4_ascend.load(folder), dsv4_ascend.load(source, profile=target)
    assert torch.equal(got.forward([1, 2, 3, 4]), want.forward([1, 2, 3, 4]))
    assert (folder / "generation_config.json").read_text() == "{}\n"
    assert len(list(folder.glob("model-*.safetensors"))) == len(list(source.glob("*.safetensors")))


# The round trip.


def test_official_bf16_official(folders, tmp_path):
    """The same values everywhere; the same bytes but for few scales, which the report names."""
    back = converted(folders["bf16"], tmp_path / "back", "official")
    found = compare(SHIPPED, back)
    assert not found.other_values
    assert found.same == 379
    assert {name: scales[0] for name, scales in found.other_scales.items()} == {
        "layers.0.attn.wq_b.weight": 1,
        "layers.0.ffn.experts.15.w3.weight": 1,
        "layers.2.ffn.experts.3.w1.weight": 1,
        "layers.3.attn.wq_b.weight": 1,
    }
    assert all("the same values in other codes: 1 of" in line for line in found.lines()[1:])
    config = json.loads((back / "config.json").read_text())
    assert config == json.loads((SHIPPED / "config.json").read_text())


def test_official_to_official_is_a_copy(folders):
    found = compare(SHIPPED, folders["official"])
    assert (found.other_values, found.other_scales) == ({}, {})


def test_finished_is_finished(folders):
    before = contents(folders["a5-mx"])
    done = convert(SHIPPED, folders["a5-mx"], TARGETS["a5-mx"])
    assert (done.resumed, done.written) == (1, 0)
    assert contents(folders["a5-mx"]) == before
