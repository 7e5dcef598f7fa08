"""Indexes of shards that lie: one CheckpointError names every problem."""

import json
import os
import shutil

import pytest
from refusals import refusal
from tiny_checkpoints import read_raw, write_raw, write_tiny

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def pristine_shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine") / "c"
    write_tiny(folder, shard_bytes=60_000)
    return folder


@pytest.fixture
def shards(pristine_shards, tmp_path):
    return shutil.copytree(pristine_shards, tmp_path / "s")


def edited_index(folder, edit) -> None:
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(edit(index) or index))


SHARD_NAMES = [
    "../x.safetensors",
    "/etc/x.safetensors",
    "a/b.safetensors",
    "x.bin",
    "",
    5,
    None,
    "a\0.safetensors",
]


@pytest.mark.parametrize("name", SHARD_NAMES, ids=ascii)
def test_shard_names(shards, name):
    edited_index(shards, lambda index: index["weight_map"].update({"embed.weight": name}))
    assert "expected a plain .safetensors file name" in refusal(shards)


@pytest.mark.parametrize(
    "raw",
    [
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        "",
        '{"weight_map": {"a": 1, "a": 2}}',
    ],
)
def test_an_index_without_meaning(shards, raw):
    (shards / INDEX).write_text(raw)
    assert INDEX in refusal(shards)


def test_an_index_that_names_absent_shards_and_tensors(shards):
    def edit(index):
        index["weight_map"] |= {
            "ghost": "model-00001-of-00009.safetensors",
            "embed.weight": "absent.safetensors",
        }
        index["weight_map"]["lost"] = index["weight_map"]["norm.weight"]

    edited_index(shards, edit)
    message = refusal(shards)
    assert "found shard 'absent.safetensors', expected a file" in message
    assert "tensor 'lost': expected in" in message
    assert "tensor 'embed.weight': found it here, expected it in absent.safetensors" in message


def test_two_shards_with_one_tensor(shards):
    first, second, *_ = sorted(shards.glob("*.safetensors"))
    header, data = read_raw(second)
    shape = [19, 64]
    header["embed.weight"] = {
        "dtype": "BF16",
        "shape": shape,
        "data_offsets": [len(data), len(data) + 19 * 64 * 2],
    }
    write_raw(second, header, data + bytes(19 * 64 * 2))
    message = refusal(shards)
    assert (
        f"{second.name}: tensor 'embed.weight': found it here, expected it in {first.name}"
        in message
    )
    assert "expected one tensor per name" in message


def test_a_shard_that_the_index_forgot(shards):
    """Its tensors are missing, and the first line names the file that was not read."""
    forgotten = sorted(shards.glob("*.safetensors"))[1].name
    edited_index(
        shards,
        lambda index: {
            "weight_map": {n: f for n, f in index["weight_map"].items() if f != forgotten}
        },
    )
    message = refusal(shards)
    assert "is missing" in message
    assert f"opened what {INDEX} lists; not read: {forgotten}" in message


def test_one_bad_shard_does_not_drown_in_missing_tensors(shards):
    os.truncate(sorted(shards.glob("*.safetensors"))[1], 4)
    message = refusal(shards)
    assert "truncated" in message
    assert "missing" not in message


def test_shards_without_index(shards):
    (shards / INDEX).unlink()
    assert "no model.safetensors.index.json" in refusal(shards)
