"""Checkpoints of every format come out as the same official tensors, as views of the file."""

import dataclasses
import gc
import json

import pytest
import safetensors.torch
import torch
from seeds import seed_of
from tiny_checkpoints import (
    UNQUANTISED,
    bits,
    random_tensors,
    read_raw,
    repack,
    the_shard,
    tiny_config,
    write_raw,
    write_tiny,
)  # fmt: skip
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from transformers_shape import TINY_HF

from dsv4_ascend.checkpoint.config_file import config_to_dict
from dsv4_ascend.checkpoint.folder import open_checkpoint
from dsv4_ascend.checkpoint.layout import FP8
from dsv4_ascend.checkpoint.names import to_official, to_transformers
from dsv4_backend.errors import CheckpointError

ANY_EXPERT = dataclasses.replace(tiny_config(), expert_dtype=None)


def assert_same(checkpoint, tensors):
    assert set(checkpoint.names()) == set(tensors)
    for name, tensor in checkpoint.tensors():
        assert (tensor.dtype, tensor.shape) == (tensors[name].dtype, tensors[name].shape), name
        assert bits(tensor) == bits(tensors[name]), name


@pytest.mark.parametrize("shard_bytes", [1, 20_000, 2**30])
@pytest.mark.parametrize(
    ("config", "dtypes"),
    [
        (tiny_config(), {}),
        (tiny_config(), {"linear": "BF16", "expert": "BF16"}),
        (ANY_EXPERT, {"expert": FP8}),
        (UNQUANTISED, {"linear": "F32", "expert": "F32", "other": "F32"}),
    ],
)
def test_official_folder_round_trip(tmp_path, config, dtypes, shard_bytes):
    tensors = write_tiny(tmp_path / "c", config, shard_bytes, **dtypes)
    checkpoint = open_checkpoint(tmp_path / "c")
    assert (checkpoint.config, checkpoint.format) == (config, "official")
    assert_same(checkpoint, tensors)


def test_scales_belong_to_quantised_weights(tmp_path):
    tensors = write_tiny(tmp_path / "c")
    checkpoint = open_checkpoint(tmp_path / "c")
    name = "layers.0.ffn.experts.1.w2.weight"
    assert bits(checkpoint.scale(name)) == bits(tensors["layers.0.ffn.experts.1.w2.scale"])
    assert checkpoint.scale("norm.weight") is None
    assert name in checkpoint
    assert "layers.9.attn_sink" not in checkpoint


def test_progress_counts_every_byte(tmp_path):
    tensors = write_tiny(tmp_path / "c")
    seen = []
    for _ in open_checkpoint(tmp_path / "c").tensors(
        lambda done, total: seen.append((done, total))
    ):
        pass
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert len(seen) == len(tensors)
    assert seen[-1] == (total, total)


def test_views_outlive_the_checkpoint_and_never_reach_the_file(tmp_path):
    tensors = write_tiny(tmp_path / "c")
    file = next((tmp_path / "c").glob("*.safetensors"))
    before = file.read_bytes()
    checkpoint = open_checkpoint(tmp_path / "c")
    view = checkpoint.tensor("embed.weight")
    assert (
        view.untyped_storage().data_ptr()
        == checkpoint.tensor("norm.weight").untyped_storage().data_ptr()
    )
    del checkpoint
    gc.collect()
    assert bits(view) == bits(tensors["embed.weight"])
    view.zero_()
    assert file.read_bytes() == before


def test_other_stored_forms_of_the_same_values(tmp_path):
    """FP4 as U8 or F4, tid2eid as I32, scales as F32 powers of two."""
    tensors = write_tiny(tmp_path / "c")

    def convert(name, dtype, shape, raw):
        if dtype == "I8":
            return (
                ("U8", shape, raw)
                if ".ffn.experts.0." in name
                else ("F4", [shape[0], shape[1] * 2], raw)
            )
        if dtype == "I64":
            return (
                "I32",
                shape,
                bits(torch.frombuffer(bytearray(raw), dtype=torch.int64).to(torch.int32)),
            )
        if dtype == "F8_E8M0":
            return (
                "F32",
                shape,
                bits(torch.exp2(torch.frombuffer(bytearray(raw), dtype=torch.uint8).float() - 127)),
            )
        return dtype, shape, raw

    repack(the_shard(tmp_path / "c"), convert)
    for name, tensor in open_checkpoint(tmp_path / "c").tensors():
        assert bits(tensor.long() if name.endswith("tid2eid") else tensor) == bits(tensors[name]), (
            name
        )


@pytest.mark.parametrize("value", [0.0, -2.0, float("inf"), float("nan")])
def test_scales_that_are_no_positive_numbers_are_refused(tmp_path, value):
    write_tiny(tmp_path / "c")

    def convert(name, dtype, shape, raw):
        return (
            ("F32", shape, bits(torch.full(shape, value)))
            if name.endswith("wq_a.scale")
            else (dtype, shape, raw)
        )

    repack(the_shard(tmp_path / "c"), convert)
    with pytest.raises(CheckpointError, match=r"wq_a.scale.*positive finite scale"):
        open_checkpoint(tmp_path / "c")


def test_every_header_length_is_read(tmp_path):
    """Any length modulo 256, so misaligned data too,
    and lengths whose first byte is that of a pickle.
    """
    tensors = write_tiny(tmp_path / "c")
    shard = the_shard(tmp_path / "c")
    header, data = read_raw(shard)
    text = json.dumps(header).encode()
    for more in range(256):
        write_raw(shard, text + b" " * more, data)
        checkpoint = open_checkpoint(tmp_path / "c")
        assert bits(checkpoint.tensor("hc_head_fn")) == bits(tensors["hc_head_fn"])
    assert_same(checkpoint, tensors)


def module_tensors(tensors):
    """The same tensors under transformers' module names, experts stacked, without MTP."""
    result, stacks = {}, {}
    for name, tensor in tensors.items():
        if name.startswith("mtp."):
            continue
        target = to_transformers(name)
        if ".ffn.experts." in name:
            _, expert, part, _ = name.rsplit(".", 3)
            stacks.setdefault(target, {})[int(expert), part] = tensor.view(torch.uint8)
        else:
            result[target] = tensor
    for target, parts in stacks.items():
        experts = max(expert for expert, _ in parts) + 1
        names = ("w2",) if ("w2" in {part for _, part in parts}) else ("w1", "w3")
        stacked = torch.stack(
            [torch.cat([parts[expert, part] for part in names]) for expert in range(experts)]
        )
        result[target] = stacked.view(
            torch.float8_e8m0fnu if target.endswith("scale_inv") else torch.int8
        )
    return result


def test_quantised_module_names_with_stacked_experts(tmp_path):
    tensors = random_tensors(tiny_config())
    (tmp_path / "config.json").write_text(json.dumps(config_to_dict(tiny_config())))
    stored = module_tensors(tensors)
    assert "model.layers.0.mlp.experts.gate_up_proj_scale_inv" in stored
    safetensors.torch.save_file(stored, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.format == "transformers"
    assert checkpoint.config == tiny_config().without_mtp()
    assert_same(
        checkpoint,
        {name: tensor for name, tensor in tensors.items() if not name.startswith("mtp.")},
    )


@pytest.fixture(scope="module")
def transformers_model(request):
    torch.manual_seed(seed_of(request.node.nodeid))
    return DeepseekV4ForCausalLM(DeepseekV4Config(**TINY_HF))


@pytest.mark.parametrize(
    "options",
    [{}, {"max_shard_size": "50KB"}, {"save_original_format": False}],
    ids=["one file", "shards", "modules"],
)
def test_what_save_pretrained_writes(tmp_path, transformers_model, options):
    transformers_model.save_pretrained(tmp_path, **options)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.format == "transformers"
    assert checkpoint.config.layer_kinds == ("swa", "csa", "hca")
    assert checkpoint.config.compress_ratios == (0, 2, 16)
    state, seen = transformers_model.state_dict(), set()
    for name, tensor in checkpoint.tensors():
        target = to_transformers(name)
        seen.add(target)
        want = state[target]
        if ".ffn.experts." in name:
            want = want[int(name.split(".")[4])]
            want = {"w1": want[:24], "w3": want[24:], "w2": want}[name.split(".")[5]]
        assert torch.equal(tensor, want), name
    assert seen == set(state)


def test_names_of_every_module_round_trip(transformers_model):
    for module in transformers_model.state_dict():
        official = to_official(module)
        if ".experts." not in official or "shared" in official:
            assert to_transformers(official) == module
    assert (
        to_official("model.layers.1.self_attn.q_a_proj.weight_scale_inv")
        == "layers.1.attn.wq_a.scale"
    )
    assert (
        to_transformers("layers.1.attn.wq_a.scale")
        == "model.layers.1.self_attn.q_a_proj.weight_scale_inv"
    )
    assert to_official("model.layers.1.attn.norm.weight") == "layers.1.attn.kv_norm.weight"
