"""Configurations: presets, both file formats,
and every kind of wrong field reported by name in one error.
"""

import dataclasses
import json

import pytest
from tiny_checkpoints import UNQUANTISED, tiny_config
from transformers import DeepseekV4Config

from dsv4_ascend.checkpoint.config import RopeScaling, V4Config, kinds_of_ratios
from dsv4_ascend.checkpoint.config_file import config_from_dict, config_to_dict, read_config
from dsv4_backend.errors import ConfigError

FLASH_OFFICIAL = {
    "vocab_size": 129280, "dim": 4096, "moe_inter_dim": 2048, "n_layers": 43, "n_hash_layers": 3,
    "n_heads": 64, "n_mtp_layers": 1, "n_routed_experts": 256, "n_shared_experts": 1,
    "n_activated_experts": 6, "score_func": "sqrtsoftplus", "route_scale": 1.5,
    "swiglu_limit": 10.0, "q_lora_rank": 1024, "head_dim": 512, "rope_head_dim": 64,
    "norm_eps": 1e-6, "o_groups": 8, "o_lora_rank": 1024, "window_size": 128,
    "compress_ratios": [0, 0] + [4, 128] * 20 + [4, 0], "compress_rope_theta": 160000,
    "original_seq_len": 65536, "rope_theta": 10000, "rope_factor": 16, "beta_fast": 32,
    "beta_slow": 1, "index_n_heads": 64, "index_head_dim": 128, "index_topk": 512, "hc_mult": 4,
    "hc_sinkhorn_iters": 20, "dtype": "fp8", "scale_fmt": "ue8m0", "expert_dtype": "fp4",
    "max_batch_size": 4, "max_seq_len": 4096,
}  # fmt: skip


def hub(**changes) -> dict:
    """The hub's config.json of Flash with changed fields; None removes one."""
    raw = config_to_dict(V4Config.flash()) | changes
    return {name: value for name, value in raw.items() if value is not None}


def refusal(raw: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        config_from_dict(raw)
    return str(caught.value)


def test_schedules_of_the_releases():
    flash, pro = V4Config.flash(), V4Config.pro()
    assert [flash.layer_kinds[:43].count(kind) for kind in ("swa", "csa", "hca")] == [2, 21, 20]
    assert [pro.layer_kinds[:61].count(kind) for kind in ("swa", "csa", "hca")] == [0, 30, 31]
    assert (len(flash.compress_ratios), len(pro.compress_ratios)) == (44, 62)
    assert (flash.kind(43), pro.kind(61), flash.ratio(2), flash.ratio(3)) == ("swa", "swa", 4, 128)
    assert [flash.is_hash_layer(layer) for layer in (0, 2, 3, 43)] == [True, True, False, False]


def test_official_names():
    assert config_from_dict(FLASH_OFFICIAL) == V4Config.flash()


def test_official_yarn_is_off_without_original_length():
    assert config_from_dict(FLASH_OFFICIAL | {"original_seq_len": 0}).rope_scaling is None


@pytest.mark.parametrize(
    "config",
    [V4Config.flash(), V4Config.pro(), tiny_config(), UNQUANTISED, V4Config.flash().without_mtp()],
)
def test_hub_names_round_trip(config):
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_kinds_that_ratios_do_not_imply_round_trip():
    changed = dataclasses.replace(
        tiny_config(),
        compress_ratios=(0, 8, 4, 0),
        layer_kinds=("swa", "csa", "hca", "swa"),
        eos_token_ids=(1, 2),
    )
    raw = config_to_dict(changed)
    assert "compress_ratios" not in raw
    assert config_from_dict(raw) == changed


def test_kinds_that_no_file_can_say_are_refused():
    changed = dataclasses.replace(
        tiny_config((0, 8, 4, 0)),
        layer_kinds=("swa", "csa", "csa", "swa"),
        compress_ratios=(0, 8, 4, 0),
    )
    with pytest.raises(ConfigError, match="compress_ratios"):
        config_to_dict(changed)


def test_what_transformers_makes_of_the_hub_file(tmp_path):
    DeepseekV4Config(**config_to_dict(V4Config.flash())).save_pretrained(tmp_path)
    assert read_config(tmp_path) == V4Config.flash()


def test_transformers_own_fields(tmp_path):
    DeepseekV4Config(
        num_hidden_layers=3,
        head_dim=32,
        partial_rotary_factor=0.25,
        layer_types=[
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
        ],
        compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 16},
        mlp_layer_types=["hash_moe", "moe", "moe"],
    ).save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert config.layer_kinds == ("swa", "csa", "hca", "swa")
    assert config.compress_ratios == (0, 2, 16, 0)
    assert (config.qk_rope_head_dim, config.num_hash_layers, config.rope_scaling) == (8, 1, None)
    assert not config.quantized


def test_official_file_in_its_own_folder(tmp_path):
    (tmp_path / "inference").mkdir()
    (tmp_path / "inference" / "config.json").write_text(json.dumps(FLASH_OFFICIAL))
    assert read_config(tmp_path) == V4Config.flash()


def test_a_file_without_schedule_is_ambiguous():
    assert "compress_ratios: missing" in refusal(hub(compress_ratios=None))


WRONG = {
    "hidden_size": -1,
    "vocab_size": 1.5,
    "num_hidden_layers": 45,
    "o_groups": 7,
    "num_experts_per_tok": 257,
    "qk_rope_head_dim": 63,
    "num_hash_layers": -1,
    "n_routed_experts": 10**9,
    "swiglu_limit": -1,
    "rms_norm_eps": "small",
    "num_key_value_heads": 8,
    "n_shared_experts": 2,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "tie_word_embeddings": True,
    "hidden_act": "gelu",
    "model_type": "deepseek_v41",
    "eos_token_id": 129280,
    "bos_token_id": -1,
    "expert_dtype": "int4",
    "compress_ratios": [0, 0, 4],
    "quantization_config": {"quant_method": "awq"},
    "num_nextn_predict_layers": -1,
    "layer_types": ["full_attention"] * 43,
    "mlp_layer_types": ["moe"] * 42,
    "partial_rotary_factor": 0.5,
    "rope_scaling": {"type": "linear", "factor": 2},
    "hc_mult": True,
    "engram_layers": [1],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_field_is_named(name):
    message = refusal(hub(**{name: WRONG[name]}))
    named = {
        "partial_rotary_factor": "qk_rope_head_dim",
        "num_hidden_layers": "compress_ratios",
    }.get(name, name)
    assert named in message


def test_all_wrong_fields_are_named_together():
    message = refusal(hub(hidden_size=0, colour="red", topk_method="greedy", head_dim=None))
    assert "4 problem(s)" in message
    for name in ("hidden_size", "colour", "topk_method", "head_dim"):
        assert name in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("factor", 0.5), ("factor", None), ("original_max_position_embeddings", 0),
        ("beta_slow", 64), ("mscale", 2.0), ("colour", 1), ("attention_factor", 1.2),
    ],
)  # fmt: skip
def test_a_wrong_yarn_field_is_named(field, value):
    rope = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, field: value}
    message = refusal(
        hub(rope_scaling={name: item for name, item in rope.items() if item is not None})
    )
    assert f"rope_scaling.{field}" in message or "beta_fast, beta_slow" in message


@pytest.mark.parametrize(
    "ratios",
    [(0, 1, 16, 0), (0, 4, -2, 0), (0, 4, 16, 4), (0, 4, 16), (0, 4, 16, 0, 0), (0, "4", 16, 0)],
)
def test_wrong_schedules(ratios):
    with pytest.raises(ConfigError, match="compress_ratios"):
        tiny_config().__class__(**vars(tiny_config()) | {"compress_ratios": ratios})


def test_contradictory_schedules_are_named():
    types = ["sliding_attention"] * 43
    assert "as layer_types says" in refusal(hub(layer_types=types))


def test_unquantised_experts_have_no_format():
    with pytest.raises(ConfigError, match="expert_dtype"):
        dataclasses.replace(tiny_config(), quantized=False)


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"", "an empty file"), (b" \n", "an empty file"),
        (b"[]", "object"), (b'{"a": 1, "a": 2}', "duplicate"), (b'{"a": NaN}', "NaN"),
        (b'{"a": "\xff"}', "UTF-8"), (b"[" * 100_000, "nested"),
        (b'{"a": ' + b"9" * 5000 + b"}", "malformed"), (b" " * (2**20 + 1), "at most"),
        (b"\xef\xbb\xbf{}", "malformed"),
    ],
)  # fmt: skip
def test_a_file_with_no_single_meaning(tmp_path, raw, problem):
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(ConfigError, match=problem):
        read_config(tmp_path)


def test_no_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be opened"):
        read_config(tmp_path)


def test_control_characters_of_a_field_name_are_not_printed():
    assert "\x1b" not in refusal(hub(**{"\x1b[2J": 1, "eos_token_id": "\x1b[2J"}))


def test_presets_are_values_of_the_specification():
    assert V4Config.flash().rope_scaling == RopeScaling(16, 65536, 32, 1)
    assert kinds_of_ratios((0, 4, 128, 16)) == ("swa", "csa", "hca", "hca")
