"""Fields of published configurations: known, informative, or of a part that nobody here knows."""

import json

import pytest
import torch
from drafter_checkpoints import (
    PLAIN,
    UNQUANTISED,
    hub,
    put,
)  # fmt: skip
from released_model import IDS, TENSORS, logits
from tiny_checkpoints import random_tensors
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from transformers_shape import TINY_HF

import dsv4_ascend
from dsv4_ascend.checkpoint.config_file import config_from_dict, config_to_dict
from dsv4_backend.errors import ConfigError, Dsv4Error


@pytest.fixture(scope="module")
def want(tmp_path_factory):
    """The logits of the main model, whatever comes with it."""
    return logits(put(tmp_path_factory.mktemp("want"), hub(), TENSORS))


@pytest.mark.parametrize("limit", [0, 0.0, None])
def test_no_clamp(tmp_path, limit):
    """An infinite limit is no clamp through the network, and it survives a round trip."""
    tensors = {
        n: t * 40 if n.endswith("w3.weight") else t
        for n, t in random_tensors(UNQUANTISED, "F32", "F32").items()
    }
    free = logits(put(tmp_path / "free", hub(UNQUANTISED, swiglu_limit=limit), tensors))
    huge = logits(put(tmp_path / "huge", hub(UNQUANTISED, swiglu_limit=1e30), tensors))
    clamped = logits(put(tmp_path / "ten", hub(UNQUANTISED, swiglu_limit=10.0), tensors))
    assert torch.equal(free, huge)
    assert not torch.allclose(free, clamped)
    config = config_from_dict(hub(swiglu_limit=limit))
    assert config.swiglu_limit == float("inf")
    assert (
        config_from_dict(json.loads(json.dumps(config_to_dict(config), allow_nan=False))) == config
    )


@pytest.mark.parametrize("limit", [-1, "10", True, False, [0]])
def test_a_limit_that_is_none(limit):
    with pytest.raises(ConfigError, match="swiglu_limit"):
        config_from_dict(hub(swiglu_limit=limit))


@pytest.mark.parametrize("rope", ["yarn", "default"])
def test_what_to_dict_of_transformers_writes(rope):
    """With the real class: its base class's fields, nested RoPE, its own defaults."""
    scaling = {
        "rope_type": rope,
        "factor": 16.0,
        "original_max_position_embeddings": 65536,
        "mscale_all_dim": 0,
    }
    theirs = DeepseekV4Config(**({"rope_parameters": scaling} if rope == "yarn" else {}))
    config = config_from_dict(theirs.to_dict())
    assert config.num_hidden_layers == 43
    assert (config.rope_scaling is not None) == (rope == "yarn")
    flash = dsv4_ascend.checkpoint.config.V4Config.flash()
    assert config_from_dict(DeepseekV4Config(**config_to_dict(flash)).to_dict()) == flash


def test_a_resaved_model_opens(tmp_path):
    shape = {name: value for name, value in TINY_HF.items() if name != "compress_rates"}
    theirs = DeepseekV4ForCausalLM(DeepseekV4Config(**shape))
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(theirs.config.to_dict()))
    model = dsv4_ascend.load(tmp_path)
    assert any("id2label" in note for note in model.notes)


@pytest.mark.parametrize(
    "field",
    ["reap_pruning", "unsloth_fixed", "tokenizer_class", "_attn_implementation", "return_dict",
     "id2label", "mergekit_recipe", "output_attentions", "vision_dim", "temperature",
     "hidden_dropout", "gradient_checkpointing", "name_or_path", "use_return_dict",
     "transformers_weights", "router_z_loss_coef", "mtp_loss_weight",
     "gradient_checkpointing_kwargs", "balance_loss_alpha", "mtp_loss_scaling_factor"],
)  # fmt: skip
def test_informative_fields_are_one_note(tmp_path, field, want):
    model = dsv4_ascend.load(put(tmp_path, hub(**{field: "X"}), TENSORS), dtype=torch.float32)
    assert torch.equal(model.forward(IDS), want)
    (note,) = model.notes
    assert field in note


UNKNOWN = ["engram_layers", "attention_sink_bias", "qk_norm", "colour", "hc_version", "\x1b[2J"]


@pytest.mark.parametrize("field", UNKNOWN)
def test_fields_of_the_model_stop_the_load_unless_allowed(tmp_path, field, want):
    folder = put(tmp_path, hub(**{field: 1}), TENSORS)
    shown = ascii(field)[1:-1]
    with pytest.raises(ConfigError) as caught:
        dsv4_ascend.load(folder)
    assert f"--allow-unknown {shown}" in str(caught.value)
    assert "\x1b" not in str(caught.value)
    model = dsv4_ascend.load(folder, dtype=torch.float32, allow_unknown=[shown])
    assert torch.equal(model.forward(IDS), want)
    assert model.notes == (f"unknown configuration field {shown}: ignored, as allowed",)


def test_nothing_else_can_be_allowed():
    with pytest.raises(ConfigError, match="scoring_func"):
        config_from_dict(hub(scoring_func="softmax"), allow_unknown=["scoring_func"])
    nested = hub(quantization_config={"quant_method": "fp8", "colour": 1})
    with pytest.raises(Dsv4Error, match=r"--allow-unknown quantization_config\.colour"):
        config_from_dict(nested)
    assert config_from_dict(nested, allow_unknown=["quantization_config.colour"]) == PLAIN
