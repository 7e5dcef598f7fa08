"""Checkpoints that lie: one CheckpointError names every problem;
nothing is executed, written or left open.
"""

import os
import shutil
import struct

import pytest
from refusals import refusal
from tiny_checkpoints import read_raw, repack, the_shard, tiny_config, write_raw, write_tiny

from dsv4_ascend.checkpoint.folder import open_checkpoint
from dsv4_ascend.checkpoint.layout import layout
from dsv4_ascend.checkpoint.safetensors_file import MAX_TENSORS
from dsv4_backend.errors import CheckpointError


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine") / "c"
    write_tiny(folder)
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "c")


def edited_header(folder, edit) -> None:
    shard = the_shard(folder)
    header, data = read_raw(shard)
    write_raw(shard, edit(header) or header, data)


BAD_NAMES = [
    "../evil",
    "/etc/passwd",
    "a\\b",
    "",
    "a\0b",
    "a..b",
    ".",
    "embed.weight\n",
    "é",
    "\ud800",
    "x" * 5000,
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_tensor_names(folder, name):
    def edit(header):
        header[name] = header.pop("embed.weight")

    edited_header(folder, edit)
    message = refusal(folder)
    assert "found a name" in message
    assert message.replace("\n", "").isprintable()


ENTRIES = {
    "negative offset": {"data_offsets": [-1, 5]},
    "reversed offsets": {"data_offsets": [10, 5]},
    "huge offsets": {"data_offsets": [2**63, 2**64]},
    "float offsets": {"data_offsets": [0.0, 5.0]},
    "three offsets": {"data_offsets": [0, 1, 2]},
    "no offsets": {"data_offsets": None},
    "unknown dtype": {"dtype": "F7"},
    "dtype list": {"dtype": ["F32"]},
    "negative size": {"shape": [-1, 64]},
    "true size": {"shape": [True, 64]},
    "overflowing shape": {"shape": [2**62, 2**62]},
    "deep shape": {"shape": [1] * 100},
    "wrong length": {"shape": [2, 64]},
    "extra key": {"colour": 1},
}


@pytest.mark.parametrize("kind", ENTRIES)
def test_tensor_entries(folder, kind):
    edited_header(folder, lambda header: header["embed.weight"].update(ENTRIES[kind]))
    assert "embed.weight" in refusal(folder)


def test_entries_that_are_no_objects(folder):
    edited_header(folder, lambda header: header.update({"embed.weight": [1], "norm.weight": None}))
    message = refusal(folder)
    assert "embed.weight" in message
    assert "norm.weight" in message


def test_overlap_and_hole(folder):
    def edit(header):
        names = sorted(
            (name for name in header if name != "__metadata__"),
            key=lambda n: header[n]["data_offsets"],
        )
        second = header[names[1]]
        second["data_offsets"] = [offset - 8 for offset in second["data_offsets"]]

    edited_header(folder, edit)
    message = refusal(folder)
    assert "overlaps the tensor before it" in message
    assert "leaves a hole before it" in message


def test_trailing_bytes(folder):
    with the_shard(folder).open("ab") as file:
        file.write(b"PK\x03\x04 polyglot")
    assert "trailing bytes" in refusal(folder)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 100, 5000, -1])
def test_truncation(folder, kept):
    shard = the_shard(folder)
    os.truncate(shard, kept if kept >= 0 else shard.stat().st_size - 1)
    assert "truncated" in refusal(folder)


@pytest.mark.parametrize("length", [0, 1, 2, 50, 2**25 + 1, 2**31, 2**63, 2**64 - 1])
def test_lying_header_length(folder, length):
    shard = the_shard(folder)
    with shard.open("r+b") as file:
        file.write(struct.pack("<Q", length))
    assert shard.name in refusal(folder)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}', "duplicate"),
        (b'{"a":{"dtype":"U8","dtype":"I8","shape":[0],"data_offsets":[0,0]}}', "duplicate"),
        (b"{" * 5000, "nested"),
        (b'{"a":' * 5000, "nested"),
        (b"[]", "object"),
        (b' {"a":1}', "start with"),
        (b'{"\xff":1}', "UTF-8"),
        (b'{"__metadata__":{"a":1}}', "__metadata__"),
        (b'{"a":NaN}', "NaN"),
        (b"not json", "malformed"),
        (b'{"a":{"shape":[' + b"1," * 500_000 + b"1]}}", "oversized"),
        (b'{"a":{' + b"{" * (MAX_TENSORS + 2) + b"}", "tensors"),
    ],
)
def test_headers(folder, text, problem):
    write_raw(the_shard(folder), text, b"")
    assert problem in refusal(folder)


@pytest.mark.parametrize("start", [b"PK\x03\x04" + b"\0" * 60, b"\x80\x02}q\x00." + b"\0" * 60])
def test_pickles_in_disguise(folder, start):
    the_shard(folder).write_bytes(start)
    assert "pickles are never opened" in refusal(folder)


def test_a_folder_of_pickles(folder):
    shard = the_shard(folder)
    shard.rename(folder / "pytorch_model.bin")
    assert "pickled weights are never opened" in refusal(folder)


def test_no_weights_at_all(folder):
    the_shard(folder).unlink()
    assert "no safetensors file" in refusal(folder)


def test_a_pipe_does_not_block(folder):
    shard = the_shard(folder)
    shard.unlink()
    os.mkfifo(shard)
    assert "no regular file" in refusal(folder)


# what the configuration expects


def test_missing_surplus_shape_and_dtype_are_listed_together(folder):
    def edit(header):
        header["layers.7.attn.wq_a.weight"] = header.pop("layers.0.attn.wq_a.weight")
        header["embed.weight"]["shape"].reverse()
        header["norm.weight"]["dtype"] = "F16"
        header["layers.1.ffn.experts.2.w1.weight"]["dtype"] = "F8_E4M3"

    edited_header(folder, edit)
    message = refusal(folder)
    for line in (
        "tensor 'layers.0.attn.wq_a.weight' is missing: expected F8_E4M3 or BF16 or F32 (24, 64)",
        "tensor 'layers.7.attn.wq_a.weight': surplus",
        "tensor 'embed.weight': found shape (64, 19), expected (19, 64)",
        "tensor 'norm.weight': found dtype F16, expected BF16 or F32",
        "tensor 'layers.1.ffn.experts.2.w1.weight': found dtype F8_E4M3, expected I8 or U8 or F4 "
        "or BF16 or F32",
    ):
        assert line in message
    assert "5 problem(s)" in message


@pytest.mark.parametrize(
    "name", ["layers.0.attn.wq_a", "layers.1.ffn.experts.2.w1", "mtp.0.e_proj"]
)
def test_a_quantised_weight_without_its_scale(folder, name):
    def convert(stored, dtype, shape, raw):
        return (dtype, [0], b"") if stored == f"{name}.scale" else (dtype, shape, raw)

    shard = the_shard(folder)
    repack(shard, convert)
    assert f"{name}.scale': found shape (0,)" in refusal(folder)
    header, data = read_raw(shard)
    del header[f"{name}.scale"]
    write_raw(shard, header, data)
    assert f"without its scale '{name}.scale'" in refusal(folder)


def test_a_scale_of_a_float_weight_is_surplus(folder):
    def convert(name, dtype, shape, raw):
        return (
            ("BF16", shape, raw * 2) if name == "layers.0.attn.wq_a.weight" else (dtype, shape, raw)
        )

    repack(the_shard(folder), convert)
    assert "layers.0.attn.wq_a.scale': surplus" in refusal(folder)


def test_experts_of_two_formats(folder):
    def convert(name, dtype, shape, raw):
        if name == "layers.1.ffn.experts.2.w1.weight":
            return "BF16", [32, 64], bytes(32 * 64 * 2)
        return dtype, shape, raw

    shard = the_shard(folder)
    repack(shard, convert)
    assert "layers.1.ffn.experts: found BF16 and FP4 mixed" in refusal(folder)


def test_the_same_tensor_under_two_namings(folder):
    shard = the_shard(folder)
    header, data = read_raw(shard)
    end = len(data)
    header["model.embed_tokens.weight"] = header["embed.weight"] | {
        "data_offsets": [end, end + 19 * 64 * 2]
    }
    write_raw(shard, header, data + bytes(19 * 64 * 2))
    assert "expected one tensor per name" in refusal(folder)


# what is told


def test_long_lists_are_cut_but_kept_in_the_error(folder):
    shard = the_shard(folder)
    write_raw(
        shard,
        {"norm.weight": {"dtype": "BF16", "shape": [64], "data_offsets": [0, 128]}},
        bytes(128),
    )
    with pytest.raises(CheckpointError, match=r"and \d+ more") as caught:
        open_checkpoint(folder)
    missing = len(layout(tiny_config().without_mtp())) - 1
    assert len(caught.value.problems) == missing
    assert str(caught.value).splitlines()[0].endswith(f"{missing} problem(s): {missing} missing")
    assert str(caught.value).endswith(f"and {missing - 50} more")


def test_more_tensors_than_any_model_has(folder):
    entries = {
        f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
        for i in range(MAX_TENSORS + 3)
    }
    write_raw(the_shard(folder), entries, b"")
    assert f"more than {MAX_TENSORS} tensors" in refusal(folder)


def test_nan_weights_are_found_where_values_are_checked(folder):
    def convert(name, dtype, shape, raw):
        return (
            (dtype, shape, b"\xff" * len(raw))
            if name in ("norm.weight", "embed.weight")
            else (dtype, shape, raw)
        )

    repack(the_shard(folder), convert)
    message = refusal(folder)
    assert "tensor 'norm.weight': found nan at [0] (and 63 more)" in message
    assert "embed.weight" not in message
