"""Bad values are found when a checkpoint is opened;
what is no checkpoint, or another's format, is named first.
"""

import json

import pytest
import torch
from drafter_checkpoints import PLAIN, UNQUANTISED, hub, put
from tiny_checkpoints import random_tensors

import dsv4_ascend
from dsv4_ascend.chat.tokenizer import Tokenizer
from dsv4_ascend.checkpoint import values
from dsv4_ascend.checkpoint.config import config_error
from dsv4_ascend.checkpoint.folder import open_checkpoint
from dsv4_ascend.checkpoint.layout import layout
from dsv4_ascend.checkpoint.safetensors_file import checkpoint_error
from dsv4_ascend.cli.main import main
from dsv4_backend.errors import CheckpointError, Dsv4Error

TENSORS = random_tensors(PLAIN)
NAN, INF = float("nan"), float("inf")


def refusal(folder) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    return caught.value


def changed(name, place, value, cast=None):
    """The tensors with one value changed."""
    tensor = TENSORS[name].clone() if cast is None else TENSORS[name].float().to(cast)
    raw = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e8m0fnu else tensor
    raw[place] = value
    return TENSORS | {name: tensor}


BAD = [
    (
        "layers.0.ffn.gate.tid2eid",
        (3, 0),
        4,
        None,
        "found 4 at [3, 0], expected an expert id in [0, 4)",
    ),
    ("layers.0.ffn.gate.tid2eid", (18, 1), -1, None, "found -1 at [18, 1]"),
    ("layers.0.ffn.gate.tid2eid", (0, 0), 2**40, None, "at [0, 0]"),
    (
        "layers.1.attn.wq_a.scale",
        (0, 0),
        0xFF,
        None,
        "found nan at [0, 0], expected a positive finite scale",
    ),
    ("layers.1.ffn.experts.2.w1.scale", (7, 3), 0xFF, None, "found nan at [7, 3]"),
    ("layers.1.attn.wq_a.scale", (0, 0), 0.0, torch.float32, "found 0 at [0, 0]"),
    ("layers.1.ffn.experts.2.w2.scale", (5, 1), NAN, torch.float32, "found nan at [5, 1]"),
    ("mtp.0.e_proj.scale", (0, 0), -2.0, torch.float32, "found -2 at [0, 0]"),
    ("layers.1.ffn.shared_experts.w1.scale", (0, 0), INF, torch.float32, "found inf at [0, 0]"),
    ("norm.weight", 5, NAN, None, "found nan at [5], expected a finite number"),
    ("layers.2.attn.kv_norm.weight", 1, INF, None, "found inf at [1]"),
    ("layers.0.attn.attn_sink", 2, -INF, None, "found -inf at [2]"),
    ("layers.2.attn.compressor.ape", (15, 3), NAN, None, "at [15, 3]"),
    ("layers.1.ffn.gate.bias", 1, NAN, None, "at [1]"),
    ("mtp.0.hc_head_scale", 0, NAN, None, "at [0]"),
    ("layers.0.ffn.gate.tid2eid", (2, 1), 123456789, None, "found 123456789 at [2, 1]"),
    ("layers.0.ffn.gate.tid2eid", (2, 1), -(2**40) - 1, None, "found -1099511627777 at [2, 1]"),
    ("layers.1.attn.wq_a.scale", (0, 0), -1234567.0, torch.float32, "found -1234567 at [0, 0]"),
]


@pytest.mark.parametrize(("name", "place", "value", "cast", "words"), BAD)
def test_a_bad_value_is_named(tmp_path, name, place, value, cast, words):
    folder = put(tmp_path, hub(), changed(name, place, value, cast))
    (line,) = refusal(folder).problems
    assert line.startswith(f"model.safetensors: tensor '{name}'")
    assert words in line
    with pytest.raises(CheckpointError):
        dsv4_ascend.load(folder)


def test_all_bad_values_of_all_tensors(tmp_path):
    tensors = changed("norm.weight", slice(2, None), NAN) | {"hc_head_base": torch.full((2,), INF)}
    lines = refusal(put(tmp_path, hub(), tensors)).problems
    assert [line.split(": ", 2)[2] for line in lines] == [
        "found nan at [2] (and 125 more), expected a finite number",
        "found inf at [0] (and 1 more), expected a finite number",
    ]


def test_smallest_and_largest_scales_are_good(tmp_path):
    tensors = changed("layers.1.attn.wq_a.scale", (0, 0), 0)
    tensors["layers.1.ffn.experts.0.w1.scale"] = torch.full((128, 4), 0xFE, dtype=torch.uint8).view(
        torch.float8_e8m0fnu
    )
    open_checkpoint(put(tmp_path, hub(), tensors))


def test_expert_scales_beyond_the_budget_are_not_read(tmp_path, monkeypatch):
    folder = put(tmp_path, hub(), changed("layers.1.ffn.experts.2.w1.scale", (7, 3), 0xFF))
    monkeypatch.setattr(values, "EXPERT_SCALE_BUDGET", 100)
    assert not open_checkpoint(folder).value_problems()


# Files that are something else

OTHERS = {
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "a Git LFS pointer",
    ),
    "html": (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "an HTML page"),
    "plain html": (b"<html lang='en'>" + b" " * 99, "an HTML page"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an XML answer"),
    "empty": (b"", "an empty file"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(99), "a GGUF file"),
    "old lfs": (
        b"version https://hawser.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "a Git LFS pointer",
    ),
    "older lfs": (b"version http://git-media.io/v/2\noid sha256:0\nsize 1\n", "a Git LFS pointer"),
    "text": (b"Entry not found", "text that begins with 'Entry not found'"),
    "long text": (
        "Entrée non trouvée. ".encode() * 9,
        "text that begins with 'Entrée non trouvée.",
    ),
    "json": (b'{"error": "gated"}', 'JSON that begins with \'{"error"'),
    "gzip": (b"\x1f\x8b\x08" + b"\xff" * 99, "compressed by gzip"),
    "xz": (b"\xfd7zXZ\0" + b"\xff" * 99, "compressed by xz"),
    "zstd": (b"\x28\xb5\x2f\xfd" + b"\xff" * 99, "compressed by Zstandard"),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("shards", [False, True])
def test_another_file_under_a_shards_name(tmp_path, kind, shards):
    raw, words = OTHERS[kind]
    folder = put(tmp_path, hub(), {"norm.weight": torch.ones(128)}, "a.safetensors")
    (folder / "b.safetensors").write_bytes(raw)
    if shards:
        index = {"weight_map": {"norm.weight": "a.safetensors", "embed.weight": "b.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        (folder / "a.safetensors").unlink()
    (line,) = [line for line in refusal(folder).problems if line.startswith("b.safetensors")]
    assert words in line


@pytest.mark.parametrize("kind", [kind for kind in OTHERS if kind != "json"])
@pytest.mark.parametrize("name", ["model.safetensors.index.json", "config.json", "tokenizer.json"])
def test_another_file_under_a_json_files_name(tmp_path, kind, name):
    folder = put(tmp_path, hub(), TENSORS)
    (folder / name).write_bytes(OTHERS[kind][0])
    with pytest.raises(Dsv4Error) as caught:
        Tokenizer.from_folder(folder, 0) if name == "tokenizer.json" else open_checkpoint(folder)
    assert OTHERS[kind][1] in str(caught.value)
    assert name in str(caught.value)


# Formats of others


def linears():
    """Names of the weights that quantisers change."""
    return [
        name.removesuffix(".weight")
        for name, entry in layout(UNQUANTISED).items()
        if entry.scale_name
    ]


FLOATS = random_tensors(UNQUANTISED, linear="BF16", expert="BF16")
WORDS, BYTES, FLOAT = (
    torch.zeros(4, 4, dtype=d) for d in (torch.int32, torch.uint8, torch.bfloat16)
)
FOREIGN = {
    "W8A8_DYNAMIC quantisation of msModelSlim": (
        {"weight": WORDS.char(), "weight_scale": FLOAT, "weight_offset": FLOAT},
        {},
        {"quant_model_description.json": '{"model_quant_type": "W8A8_DYNAMIC"}'},
    ),
    "W4A8 quantisation of msModelSlim": (
        {"weight": WORDS.char()},
        {},
        {"quant_model_description_w4a8.json": '{"model_quant_type": "W4A8"}'},
    ),
    "compressed-tensors": (
        {"weight_packed": WORDS, "weight_scale": FLOAT, "weight_shape": WORDS},
        {"quantization_config": {"quant_method": "compressed-tensors"}},
        {},
    ),
    "GPTQ": ({"qweight": WORDS, "qzeros": WORDS, "scales": FLOAT, "g_idx": WORDS}, {}, {}),
    "AWQ": (
        {"qweight": WORDS, "scales": FLOAT},
        {"quantization_config": {"quant_method": "awq"}},
        {},
    ),
    "AutoRound": (
        {"qweight": WORDS, "scales": FLOAT},
        {"quantization_config": {"quant_method": "auto-round"}},
        {},
    ),
    "NVFP4": ({"weight": BYTES, "weight_scale": FLOAT, "weight_scale_2": FLOAT[0]}, {}, {}),
    "MLX": ({"weight": WORDS.view(torch.uint32), "scales": FLOAT, "biases": FLOAT}, {}, {}),
    "bitsandbytes": ({"weight": BYTES, "weight.absmax": FLOAT, "weight.quant_map": FLOAT}, {}, {}),
    "quantised by hqq": ({"weight": BYTES}, {"quantization_config": {"quant_method": "hqq"}}, {}),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_format_is_named_first(tmp_path, kind):
    parts, config, files = FOREIGN[kind]
    tensors = {
        name: t for name, t in FLOATS.items() if name.removesuffix(".weight") not in linears()
    }
    tensors |= {f"{stem}.{part}": t for stem in linears() for part, t in parts.items()}
    folder = put(tmp_path, hub(UNQUANTISED) | config, tensors)
    for name, text in files.items():
        (folder / name).write_text(text)
    first, *more = str(refusal(folder)).splitlines()
    assert first.startswith(f"{folder}: {kind}")
    assert "use the official release" in first
    assert len(more) <= 1


def test_gguf_folder_and_file(tmp_path):
    (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
    for path in (tmp_path, tmp_path / "model-q4.gguf"):
        first, *more = str(refusal(path)).splitlines()
        assert "GGUF" in first
        assert "give a folder of safetensors: the official release" in first
        assert all("1 problem(s)" in line and "other" not in line for line in more)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x.gguf", "GGUF"), ("X.GGUF", "GGUF"), ("model.safetensors", "found a file, expected a "
                                                                      "folder"),
        ("config.json", "give the folder that holds it"), (None, "no folder"),
    ],
)  # fmt: skip
def test_a_file_in_place_of_the_folder(capsys, tmp_path, name, words):
    path = tmp_path / (name or "absent")
    if name:
        path.write_bytes(b"GGUF")
    code, _, err = run(capsys, "generate", "--checkpoint", path, "--max-new-tokens", "1")
    assert code == 2
    assert words in err
    assert str(path) in err


def test_marks_beside_a_good_checkpoint_are_no_error(tmp_path):
    folder = put(tmp_path, hub(), TENSORS)
    (folder / "quant_model_description.json").write_text("{}")
    (folder / "model.gguf").write_bytes(b"GGUF")
    open_checkpoint(folder)


def test_many_problems_begin_with_their_kinds(tmp_path):
    tensors = {("x." if "layers.1" in name else "") + name: t for name, t in TENSORS.items()}
    error = refusal(put(tmp_path, hub(), tensors))
    first = str(error).splitlines()[0]
    counts = {
        kind: sum(kind in line for line in error.problems) for kind in ("is missing", "surplus")
    }
    assert f"{counts['is missing']} missing" in first
    assert f"{counts['surplus']} surplus" in first
    for build in (config_error, checkpoint_error):
        assert (
            str(build("here", ["f: unknown field"] * 21))
            .splitlines()[0]
            .endswith("21 unknown fields")
        )
        assert (
            str(build("here", ["f: unknown field"] * 20)).splitlines()[0].endswith("20 problem(s)")
        )


# The command line


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in arguments])
    return (left.value.code or 0, *capsys.readouterr())


@pytest.fixture
def unknown(tmp_path):
    (tmp_path / "ids.json").write_text("[1, 2, 3]")
    return put(tmp_path / "c", hub(colour=1, shade=2, id2label={}), TENSORS)


def test_unknown_fields_on_the_command_line(capsys, tmp_path, unknown):
    command = (
        "logits",
        "--checkpoint",
        unknown,
        "--input-ids",
        tmp_path / "ids.json",
        "--output",
        tmp_path / "o",
    )
    code, _, err = run(capsys, *command)
    assert code == 1
    assert "--allow-unknown colour" in err
    code, _, err = run(capsys, *command, "--allow-unknown", "colour", "--allow-unknown", "shade")
    assert code == 0
    lines = err.splitlines()
    assert all(line.startswith("dsv4-ascend: note: ") for line in lines)
    assert [sum(name in line for line in lines) for name in ("colour", "shade", "id2label")] == [
        1,
        1,
        1,
    ]


def test_generate_takes_it_too(capsys, unknown):
    code, _, err = run(capsys, "generate", "--checkpoint", unknown, "--allow-unknown", "colour")
    assert code == 1
    assert "shade: unknown field" in err
    assert "colour: unknown field" not in err
