"""What is published besides the preview opens: DSpark,
Vision-Exp, truncated, converted and re-saved checkpoints.
"""

import dataclasses
import gzip
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from drafter_checkpoints import (
    DRAFTER,
    DSPARK,
    FIELDS,
    PLAIN,
    UNQUANTISED,
    dspark_tensors,
    hub,
    put,
    vision_tensors,
)  # fmt: skip
from released_model import IDS, TENSORS, logits
from tiny_checkpoints import random_tensors

import dsv4_ascend
from dsv4_ascend.checkpoint.config_file import config_from_dict, config_to_dict, noted_config
from dsv4_ascend.checkpoint.folder import open_checkpoint
from dsv4_ascend.checkpoint.layout import FP8, layout
from dsv4_ascend.checkpoint.names import to_transformers
from dsv4_ascend.checkpoint.save import save_checkpoint
from dsv4_backend.errors import CheckpointError, ConfigError, UnsupportedError

DATA = Path(__file__).parents[4] / "shared" / "data"


@pytest.fixture(scope="module")
def want(tmp_path_factory):
    """The logits of the main model, whatever comes with it."""
    return logits(put(tmp_path_factory.mktemp("want"), hub(), TENSORS))


@pytest.fixture(scope="module")
def dspark(tmp_path_factory):
    raw = hub(**FIELDS, num_nextn_predict_layers=1, compress_ratios=[*PLAIN.compress_ratios, 0, 0])
    return put(tmp_path_factory.mktemp("dspark"), raw, dspark_tensors())


# DSpark


def test_dspark_stages_are_kept_and_the_main_model_runs(dspark, want):
    checkpoint = open_checkpoint(dspark)
    assert checkpoint.config == DSPARK
    assert set(checkpoint.names()) == set(dspark_tensors())
    model = dsv4_ascend.load(dspark, dtype=torch.float32)
    assert torch.equal(model.forward(IDS), want)
    assert [note for note in model.notes if "DSpark" in note] == [*model.notes]
    with pytest.raises(
        UnsupportedError, match="draft_tokens: drafting with DSpark is not implemented"
    ):
        model.generate([IDS], draft_tokens=2, max_new_tokens=2)
    assert len(model.generate([IDS], max_new_tokens=2, stop_ids=frozenset())[0]) == 2


@pytest.mark.parametrize("fields", [{}, {"dspark_block_size": 5}, {"dspark_markov_rank": None}])
def test_dspark_is_known_by_its_tensors(tmp_path, fields, want):
    """No field promises it, and the count of drafts says 1."""
    folder = put(tmp_path, hub(**fields), dspark_tensors())
    config = open_checkpoint(folder).config
    assert config.num_nextn_predict_layers == 3
    assert (config.dspark.markov_rank, config.dspark.targets) == (
        DRAFTER.markov_rank,
        DRAFTER.targets,
    )
    assert torch.equal(logits(folder), want)


def test_dspark_fields_beside_mtp_tensors(tmp_path):
    """A copy whose config kept the fields and whose tensors are the preview's."""
    checkpoint = open_checkpoint(put(tmp_path, hub(**FIELDS), TENSORS))
    assert checkpoint.config == PLAIN


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        (
            "mtp.0.main_proj.weight",
            torch.zeros(128, 256).to(torch.float8_e4m3fn),
            "found shape (128, 256)",
        ),
        (
            "mtp.2.markov_head.markov_w1.weight",
            torch.zeros(19, 15).bfloat16(),
            "found shape (19, 15)",
        ),
        (
            "mtp.2.confidence_head.proj.weight",
            torch.zeros(1, 144, dtype=torch.int8),
            "found dtype I8",
        ),
        ("mtp.1.attn_norm.weight", None, "is missing"),
        ("mtp.2.norm.weight", None, "is missing"),
        ("mtp.1.e_proj.weight", torch.zeros(128, 128).bfloat16(), "surplus"),
    ],
)
def test_dspark_stages_are_checked(tmp_path, name, tensor, words):
    tensors = dspark_tensors() | {name: tensor}
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(
            put(tmp_path, hub(**FIELDS), {key: t for key, t in tensors.items() if t is not None})
        )
    (line,) = caught.value.problems
    assert name in line
    assert words in line


def test_dspark_round_trip(tmp_path):
    assert config_from_dict(config_to_dict(DSPARK)) == DSPARK
    save_checkpoint(tmp_path / "c", DSPARK, dspark_tensors())
    assert open_checkpoint(tmp_path / "c").config == DSPARK


WRONG_FIELDS = {
    "dspark_markov_rank": ["x", -1, 0, True, [1], 10**12, "16"],
    "dspark_target_layer_ids": ["0", [-1], [0, "1"], {}],
    "dspark_block_size": [0, "5", 1.5],
    "dspark_noise_token_id": [-1, "17"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, wrong in WRONG_FIELDS.items() for value in wrong]
)
def test_a_wrong_drafter_field_is_a_note(name, value):
    """The main model does not use it; the other fields of the drafter stay."""
    config, notes = noted_config(hub(**FIELDS | {name: value}, compress_ratios=[0, 4, 16, 0, 0, 0]))
    (note,) = [note for note in notes if name in note and "found" in note]
    assert f"{name}: found " in note
    assert config.num_hidden_layers == 3
    assert (config.dspark is not None) == (name in ("dspark_block_size", "dspark_noise_token_id"))


def test_a_wrong_drafter_field_beside_its_tensors(tmp_path, want):
    folder = put(tmp_path, hub(**FIELDS | {"dspark_markov_rank": 0}), dspark_tensors())
    assert torch.equal(logits(folder), want)
    assert open_checkpoint(folder).config.dspark.markov_rank == DRAFTER.markov_rank


def test_a_drafter_of_the_callers_is_checked_by_field():
    with pytest.raises(
        ConfigError, match=r"dspark\.block_size: found 0, expected a positive integer"
    ):
        PLAIN.with_drafts(3, dataclasses.replace(DRAFTER, block_size=0))


def recorded(folder: Path) -> dict:
    """The recorded release as sparse files, written by the script beside the record;
    skips where there is none.
    """
    script = DATA / "make_sparse.py"
    if not script.exists():
        pytest.skip(f"no record at {DATA}: the scaled-down layout above stands for it")
    subprocess.run([sys.executable, script, folder], check=True)
    return json.loads(gzip.decompress((DATA / "flash-0731-160-experts.json.gz").read_bytes()))


@pytest.mark.parametrize("naming", ["hub", "official"])
def test_the_recorded_release_opens_fast(tmp_path, naming):
    record = recorded(tmp_path)
    if naming == "official":
        (tmp_path / "config.json").unlink()
    seconds = []
    for _ in range(3):
        used = time.process_time()
        checkpoint = open_checkpoint(tmp_path)
        seconds.append(time.process_time() - used)
    # Of this process: a machine that runs other tests too stretches the wall clock.
    assert min(seconds) < 3
    stored = {name: entry for shard in record["shards"] for name, entry in shard.items()}
    assert set(checkpoint.names()) == set(stored)
    assert len(stored) == 45821
    assert (
        checkpoint.config.num_nextn_predict_layers,
        checkpoint.config.dspark.target_layer_ids,
    ) == (3, (40, 41, 42))
    for name, entry in layout(checkpoint.config).items():
        dtype, shape, _ = stored[name]
        assert dtype in entry.dtypes
        assert tuple(shape) == entry.stored_shape(dtype)


# Schedules and drafts


def without(*starts):
    return {name: tensor for name, tensor in TENSORS.items() if not name.startswith(starts)}


@pytest.mark.parametrize("naming", ["official", "transformers"])
@pytest.mark.parametrize(
    ("changes", "dropped", "layers"),
    [
        ({"num_nextn_predict_layers": 0}, ("mtp.",), 3),
        ({"num_hidden_layers": 2, "num_nextn_predict_layers": 0}, ("mtp.", "layers.2."), 2),
        ({"num_hidden_layers": 2}, ("mtp.", "layers.2."), 2),
        ({}, ("mtp.",), 3),
        ({"compress_ratios": [0, 4, 16, 0, 0, 0, 7]}, ("mtp.",), 3),
        (
            {"num_hidden_layers": 1, "compress_ratios": [0, 4, 16, 0, 0]},
            ("mtp.", "layers.1", "layers.2"),
            1,
        ),
    ],
)
def test_drafts_that_are_not_there(tmp_path, changes, dropped, layers, naming):
    tensors = without(*dropped)
    if naming == "transformers":
        tensors = {
            name if ".experts." in name else to_transformers(name): t for name, t in tensors.items()
        }
    checkpoint = open_checkpoint(put(tmp_path, hub(**changes), tensors))
    assert checkpoint.config.num_nextn_predict_layers == 0
    assert len(checkpoint.config.compress_ratios) == layers
    assert logits(tmp_path).shape == (11, 19)


def test_drafts_that_no_field_promises(tmp_path):
    assert open_checkpoint(put(tmp_path, hub(num_nextn_predict_layers=0), TENSORS)).config == PLAIN


@pytest.mark.parametrize("ratios", [[0, 4], [0], []])
def test_a_list_that_is_too_short(ratios):
    with pytest.raises(ConfigError, match="compress_ratios"):
        config_from_dict(hub(compress_ratios=ratios))


def test_half_a_draft_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"mtp\.0\.h_proj\.weight' is missing"):
        open_checkpoint(put(tmp_path, hub(), without("mtp.0.h_proj")))


# Formats


@pytest.mark.parametrize("value", ["fp4", "fp8", "bf16", "bfloat16", None])
def test_floats_whatever_the_expert_dtype_says(tmp_path, value):
    tensors = random_tensors(UNQUANTISED, linear="BF16", expert="BF16")
    folder = put(tmp_path, hub(UNQUANTISED, expert_dtype=value, **FIELDS), tensors)
    assert open_checkpoint(folder).config == UNQUANTISED
    assert logits(folder).shape == (11, 19)


@pytest.mark.parametrize(
    ("raw", "expert", "stored"),
    [
        (hub(UNQUANTISED), "I8", (True, None)),
        (hub(expert_dtype="fp8"), "I8", (True, "fp4")),
        (hub(), FP8, (True, "fp8")),
        (hub(expert_dtype="bf16"), FP8, (True, None)),
    ],
)
def test_stored_dtypes_decide(tmp_path, raw, expert, stored):
    config = dataclasses.replace(PLAIN, expert_dtype=None)
    checkpoint = open_checkpoint(put(tmp_path, raw, random_tensors(config, expert=expert)))
    assert (checkpoint.config.quantized, checkpoint.config.expert_dtype) == stored
    assert len(checkpoint.notes) == 1
    assert logits(tmp_path).shape == (11, 19)


def test_saving_another_model_than_configured_is_refused(tmp_path):
    with pytest.raises(
        CheckpointError, match="num_nextn_predict_layers: found 0 by the tensors, expected 1"
    ):
        save_checkpoint(tmp_path / "c", PLAIN, without("mtp."))
    assert not (tmp_path / "c").exists()


# Images, and other files


def test_images_are_set_aside(tmp_path, want):
    fields = {"vision_n_layers": 32, "vision_dim": 1024, "image_token_id": 18, "rms_norm_eps": 1e-6}
    folder = put(tmp_path, hub(**fields), TENSORS | vision_tensors())
    model = dsv4_ascend.load(folder, dtype=torch.float32)
    assert torch.equal(model.forward(IDS), want)
    assert sum("images set aside" in note for note in model.notes) == 1
    assert set(open_checkpoint(folder).names()) == set(TENSORS)


@pytest.mark.parametrize(
    "name", ["visions.norm.weight", "layers.1.ffn.gate.bias_xl", "layers.1.ffn.gate.bias2"]
)
def test_what_is_no_image_part_stays_surplus(tmp_path, name):
    with pytest.raises(CheckpointError, match=f"{name}': surplus"):
        open_checkpoint(put(tmp_path, hub(), TENSORS | {name: torch.zeros(4)}))


def test_model_safetensors_before_others(tmp_path, want):
    folder = put(tmp_path, hub(), TENSORS)
    put(folder, hub(), {"a": torch.zeros(1)}, "adapter.safetensors")
    put(folder, hub(), {"b": torch.zeros(1)}, "consolidated.safetensors")
    model = dsv4_ascend.load(folder, dtype=torch.float32)
    assert torch.equal(model.forward(IDS), want)
    assert model.notes == (
        "opened model.safetensors; not read: adapter.safetensors, consolidated.safetensors",
    )


@pytest.mark.parametrize("ending", [".weight_scale", ".weight_scale_inv"])
def test_other_names_of_scales(tmp_path, ending, want):
    def renamed(name):
        return name.removesuffix(".scale") + ending if name.endswith(".scale") else name

    tensors = {renamed(name): tensor for name, tensor in TENSORS.items()}
    assert torch.equal(logits(put(tmp_path, hub(), tensors)), want)
