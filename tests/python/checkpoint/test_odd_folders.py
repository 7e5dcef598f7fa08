"""Folders and configurations that say more than is stored,
or oddly: opened as the ecosystem does, or named exactly.
"""

import json
import math
import shutil

import pytest
import torch
from drafter_checkpoints import put
from test_checkpoint import module_tensors
from tiny_checkpoints import bits, random_tensors, tiny_config, write_tiny

import dsv4_ascend
from dsv4_ascend.checkpoint.config import V4Config
from dsv4_ascend.checkpoint.config_file import config_from_dict, config_to_dict, noted_config
from dsv4_ascend.checkpoint.folder import open_checkpoint
from dsv4_ascend.checkpoint.layout import FP8
from dsv4_ascend.checkpoint.names import to_official
from dsv4_backend.errors import ArgumentError, CheckpointError, ConfigError

PLAIN = tiny_config()
TENSORS = random_tensors(PLAIN)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TYPES = [f"{kind}_attention" for kind in ("sliding", "compressed_sparse", "heavily_compressed")]
RATES = {TYPES[1]: 4, TYPES[2]: 16}


def hub(**changes) -> dict:
    return config_to_dict(PLAIN) | changes


def typed(**changes) -> dict:
    """As transformers writes it: kinds by name, no ratios."""
    raw = hub(layer_types=TYPES, compress_rates=RATES, mlp_layer_types=["hash_moe", "moe", "moe"])
    return {
        name: value for name, value in (raw | changes).items() if name not in ("compress_ratios",)
    }


def without(*starts):
    return {name: tensor for name, tensor in TENSORS.items() if not name.startswith(starts)}


# First layers only


@pytest.mark.parametrize(("layers", "hashes"), [(2, 3), (1, 2), (2, 2), (1, 43)])
def test_fewer_layers_than_hash_layers(tmp_path, layers, hashes):
    config = tiny_config(
        PLAIN.compress_ratios[:layers],
        num_hidden_layers=layers,
        num_hash_layers=layers,
        num_nextn_predict_layers=0,
    )
    raw = hub(num_hidden_layers=layers, num_hash_layers=hashes, num_nextn_predict_layers=0)
    checkpoint = open_checkpoint(put(tmp_path, raw, random_tensors(config)))
    assert checkpoint.config == config
    assert sum("num_hash_layers" in note for note in checkpoint.notes) == (hashes > layers)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 2},
        {"num_hidden_layers": 2, "num_hash_layers": 3, "mlp_layer_types": ["hash_moe"] * 3},
        {"num_hidden_layers": 1, "mlp_layer_types": ["hash_moe", "moe"]},
        {"layer_types": [*TYPES, "sliding_attention"]},
        {
            "layer_types": [*TYPES, "of_a_draft"],
            "mlp_layer_types": ["hash_moe", "moe", "moe", "dense"],
        },
    ],
)
def test_lists_longer_than_the_layers(changes):
    config = config_from_dict(typed(num_nextn_predict_layers=0, **changes))
    assert config.compress_ratios == PLAIN.compress_ratios[: changes.get("num_hidden_layers", 3)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer_types", TYPES[:2]),
        ("layer_types", ["full_attention"] * 3),
        ("layer_types", 5),
        ("compress_rates", [4]),
        ("mlp_layer_types", ["hash_moe", "moe"]),
        ("mlp_layer_types", ["moe", "hash_moe", "moe"]),
    ],
)
def test_one_wrong_list_is_one_problem(field, value):
    for raw in (typed(**{field: value}), hub(**typed(**{field: value}))):
        with pytest.raises(ConfigError) as caught:
            config_from_dict(raw | ({"num_hash_layers": 1} if field != "mlp_layer_types" else {}))
        lines = str(caught.value).splitlines()[1:]
        assert all(field in line or line.startswith("  - num_hash_layers") for line in lines)


@pytest.mark.parametrize("behind", [[], [0], [0, 0]])
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("promised", [0, 1, 2])
def test_the_tensors_decide_on_drafts(tmp_path, behind, stored, promised):
    raw = hub(
        compress_ratios=[*PLAIN.compress_ratios[:3], *behind], num_nextn_predict_layers=promised
    )
    checkpoint = open_checkpoint(put(tmp_path, raw, TENSORS if stored else without("mtp.")))
    assert checkpoint.config == (PLAIN if stored else PLAIN.without_mtp())


# model.safetensors, an index, and more


def folder_of(tmp_path, *, single, shards, index, extra):
    """model.safetensors, shards, an index ("valid", "stale", "single" or none) and one more file,
    each if asked for.
    """
    folder = put(tmp_path / "c", hub(), TENSORS)
    if shards:
        write_tiny(tmp_path / "shards", PLAIN, shard_bytes=60_000)
        for file in (tmp_path / "shards").glob("model-*"):
            shutil.copy(file, folder)
    maps = {
        "valid": lambda: json.loads((tmp_path / "shards" / INDEX).read_text()),
        "stale": lambda: {"weight_map": {"embed.weight": "model-00001-of-00009.safetensors"}},
        "single": lambda: {"weight_map": dict.fromkeys(TENSORS, "model.safetensors")},
    }
    if index:
        (folder / INDEX).write_text(json.dumps(maps[index]()))
    if extra:
        put(folder, hub(), {"a": torch.zeros(1)}, extra)
    if not single:
        (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize(
    ("single", "shards", "index", "extra", "opened"),
    [
        (True, True, "valid", None, "model.safetensors"),
        (True, False, "stale", None, "model.safetensors"),
        (True, True, None, None, "model.safetensors"),
        (True, True, "stale", "adapter.safetensors", "model.safetensors"),
        (True, False, "single", "extra.safetensors", f"what {INDEX} lists"),
        (True, True, "single", None, f"what {INDEX} lists"),
        (False, True, "valid", "consolidated.safetensors", f"what {INDEX} lists"),
    ],
)
def test_files_beside_the_checkpoint_are_a_note(tmp_path, single, shards, index, extra, opened):
    checkpoint = open_checkpoint(
        folder_of(tmp_path, single=single, shards=shards, index=index, extra=extra)
    )
    assert {name: bits(tensor) for name, tensor in checkpoint.tensors()} == {
        n: bits(t) for n, t in TENSORS.items()
    }
    (note,) = checkpoint.notes
    assert note.startswith(f"opened {opened}; not read: ")
    assert extra is None or shards or extra in note


def test_a_broken_index_and_an_incomplete_file_stay_errors(tmp_path):
    folder = folder_of(tmp_path, single=True, shards=True, index="valid", extra=None)
    put(folder, hub(), without("layers.0.attn.wq_a"))
    with pytest.raises(
        CheckpointError,
        match=rf"(?s)opened {SINGLE}; not read: .*{INDEX}\n.*wq_a\.weight' is missing",
    ):
        open_checkpoint(folder)
    (folder / INDEX).write_text("{}")
    with pytest.raises(CheckpointError, match="weight_map"):
        open_checkpoint(folder)


# Stored formats and names


@pytest.mark.parametrize("configured", ["fp4", "fp8", None])
@pytest.mark.parametrize("other", ["layers.1.", "mtp.0.", ("layers.0.", "layers.2.")])
def test_layers_of_different_expert_formats(tmp_path, configured, other):
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128}
    config = tiny_config(**sizes)
    coarse = random_tensors(tiny_config(**sizes, expert_dtype="fp8"), expert=FP8)
    tensors = {
        name: coarse[name] if name.startswith(other) and ".ffn.experts." in name else tensor
        for name, tensor in random_tensors(config).items()
    }
    checkpoint = open_checkpoint(
        put(tmp_path, config_to_dict(config) | {"expert_dtype": configured}, tensors)
    )
    assert checkpoint.config.expert_dtype is None
    assert sum("'fp4' and 'fp8'" in note for note in checkpoint.notes) == (configured is not None)
    assert dsv4_ascend.load(tmp_path).forward([1, 2, 3]).isfinite().all()


@pytest.mark.parametrize("ending", ["_scale_inv", "_scale"])
def test_names_of_stacked_scales(tmp_path, ending):
    stored = {
        name.replace("_proj_scale_inv", f"_proj{ending}"): t
        for name, t in module_tensors(TENSORS).items()
    }
    assert (
        to_official(f"model.layers.0.mlp.experts.down_proj{ending}")
        == "layers.0.ffn.experts.w2.scale"
    )
    checkpoint = open_checkpoint(put(tmp_path, hub(), stored))
    assert {name: bits(t) for name, t in checkpoint.tensors()} == {
        n: bits(t) for n, t in without("mtp.").items()
    }


@pytest.mark.parametrize(
    ("stack", "place"),
    [("down_proj", [2, 3, 0]), ("gate_up_proj", [1, 32 + 5, 1]), ("gate_up_proj", [0, 4, 0])],
)
def test_a_bad_value_of_a_stack_is_found_where_it_is_stored(tmp_path, stack, place):
    name = f"model.layers.1.mlp.experts.{stack}_scale_inv"
    stored = module_tensors(TENSORS)
    stored[name].view(torch.uint8)[tuple(place)] = 0xFF
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(put(tmp_path, hub(), stored))
    (line,) = caught.value.problems
    assert line.startswith(f"model.safetensors: tensor '{name}': found nan at {place}, ")


# Numbers and arguments


@pytest.mark.parametrize("value", [10**400, -(10**401), 10**309, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(
    "name", ["rope_theta", "swiglu_limit", "hc_eps", "num_hidden_layers", "routed_scaling_factor"]
)
def test_numbers_that_no_float_holds(name, value):
    if (name, value) != ("swiglu_limit", math.inf):
        with pytest.raises(ConfigError, match=name):
            config_from_dict(hub(**{name: value}))
        with pytest.raises(ConfigError, match=name):
            V4Config(**vars(PLAIN) | {name: value})


@pytest.mark.parametrize("field", ["factor", "beta_fast", "original_max_position_embeddings"])
def test_nested_numbers_that_no_float_holds(field):
    rope = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, field: 10**400}
    with pytest.raises(ConfigError, match=field):
        config_from_dict(hub(rope_scaling=rope))


@pytest.mark.parametrize("factor", [1e308, 10**400, 2, 0, -0.5, "0.25", True])
@pytest.mark.parametrize("nested", [False, True])
def test_a_rotary_factor_that_is_none(factor, nested):
    rope = {"rope_type": "default", "partial_rotary_factor": factor}
    with pytest.raises(ConfigError, match="partial_rotary_factor"):
        config_from_dict(
            hub(**({"rope_scaling": rope} if nested else {"partial_rotary_factor": factor}))
        )


def test_what_is_no_json():
    for value in (10**5000, {(1, 2): 3}):
        with pytest.raises(ConfigError, match="no JSON"):
            config_from_dict(hub(rope_theta=value))
    with pytest.raises(ConfigError, match="rope_theta: found a huge integer"):
        V4Config(**vars(PLAIN) | {"rope_theta": 10**5000})


@pytest.mark.parametrize(
    "value", ["foo", "", b"foo", 5, None, [5], {"a": 1}, ["a", None], iter(["a"])]
)
def test_what_cannot_be_allowed(tmp_path, value):
    for call in (
        lambda v: config_from_dict(hub(), allow_unknown=v),
        lambda v: open_checkpoint(tmp_path, allow_unknown=v),
    ):
        put(tmp_path, hub(), TENSORS)
        with pytest.raises(
            ArgumentError, match=r"allow_unknown: found .*, expected a list of strings"
        ):
            call(value)


def test_an_allowed_name_is_a_whole_name():
    with pytest.raises(ConfigError, match="foo: unknown field"):
        config_from_dict(hub(foo=1), allow_unknown=["food"])


@pytest.mark.parametrize(
    "kind", [list, tuple, set, frozenset, lambda names: dict.fromkeys(names).keys()]
)
def test_an_allowed_name_that_matches_nothing_is_a_note(kind):
    _, notes = noted_config(hub(colour=1), allow_unknown=kind(["colour", "shade", "use_cache"]))
    assert notes == (
        "unknown configuration field colour: ignored, as allowed",
        "allow_unknown: no unknown configuration field shade",
        "allow_unknown: no unknown configuration field use_cache",
    )
