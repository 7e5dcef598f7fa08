"""All experts of a projection as one tensor: a view of the file in whatever order it has them,
else a copy.
"""

import json
import random

import pytest
import torch
from seeds import seed_of
from tiny_checkpoints import bits, random_tensors, repack, tiny_config, write_raw

import dsv4_ascend
from dsv4_ascend.checkpoint.config_file import config_to_dict
from dsv4_ascend.checkpoint.folder import open_checkpoint
from dsv4_ascend.checkpoint.names import to_transformers
from dsv4_ascend.model.profile import OFFICIAL
from dsv4_ascend.model.sharding import DeviceLayout, Sharding
from dsv4_ascend.model.weights import official_tensors
from dsv4_backend.errors import ArgumentError

CONFIG = tiny_config(n_routed_experts=12)  # names sort 0, 1, 10, 11, 2
BY_NAME = sorted(range(12), key=str)
TENSORS = random_tensors(CONFIG)
DTYPES = {
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.int64: "I64",
}
IDS = list(range(11))


def write_file(path, tensors, names, shift=0):
    """Tensors in the order of `names`, one after the other,
    the first `shift` bytes past a multiple of 64.
    """
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name in names:
        raw = bits(tensors[name])
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {
            "dtype": DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": offsets,
        }
        data += raw
    text = json.dumps(header).encode()
    write_raw(path, text + b" " * ((shift - 8 - len(text)) % 64), data)


def write(folder, tensors=TENSORS, order=sorted, shift=0):
    folder.mkdir(exist_ok=True)
    # Wide elements first, as every writer does: all others stay aligned.
    names = sorted(order(list(tensors)), key=lambda name: -tensors[name].element_size())
    write_file(folder / "model.safetensors", tensors, names, shift)
    (folder / "config.json").write_text(json.dumps(config_to_dict(CONFIG)))
    return folder


def experts_of(folder, layer=1):
    """The stacks of a layer by the names below it,
    and the opened checkpoint, which keeps the file mapped.
    """
    checkpoint = open_checkpoint(folder)
    start = f"layers.{layer}.ffn.experts."
    found = {
        name.removeprefix(start): t
        for name, t in checkpoint.network_tensors()
        if name.startswith(start)
    }
    return found, checkpoint


def is_view(tensor, checkpoint):
    source = checkpoint._sources["embed.weight"].file
    return tensor.untyped_storage().data_ptr() == source._bytes.untyped_storage().data_ptr()


def holds_everything(stacks, layer=1):
    slots = stacks.get("slots", torch.arange(12))
    return all(
        bits(stacks[f"{part}.{leaf}"][slots[e]])
        == bits(TENSORS[f"layers.{layer}.ffn.experts.{e}.{part}.{leaf}"])
        for e in range(12)
        for part in ("w1", "w2", "w3")
        for leaf in ("weight", "scale")
    )


def shuffled(names):
    return random.Random(seed_of(__name__)).sample(names, len(names))


@pytest.mark.parametrize("order", [sorted, list, lambda names: sorted(names, reverse=True)])
def test_regular_files_are_used_as_they_lie(tmp_path, order):
    stacks, checkpoint = experts_of(write(tmp_path, order=order))
    assert holds_everything(stacks)
    assert all(is_view(tensor, checkpoint) for part, tensor in stacks.items() if part != "slots")


def test_the_order_of_names_is_kept(tmp_path):
    stacks, _ = experts_of(write(tmp_path))
    assert stacks["slots"].argsort().tolist() == BY_NAME
    plain, _ = experts_of(write(tmp_path / "by number", order=list))
    assert "slots" not in plain


def test_irregular_files_are_copied(tmp_path):
    stacks, checkpoint = experts_of(write(tmp_path, order=shuffled))
    assert "slots" not in stacks
    assert holds_everything(stacks)
    assert not any(is_view(tensor, checkpoint) for tensor in stacks.values())
    assert all(bits(checkpoint.tensor(name)) == bits(TENSORS[name]) for name in checkpoint.names())


def test_what_is_irregular_follows_what_is_not(tmp_path):
    """Scales alone are shuffled: weights keep the file's order, scales are copied into it."""

    def order(names):
        scales = iter(shuffled([name for name in names if name.endswith(".scale")]))
        return sorted(name for name in names if not name.endswith(".scale")) + list(scales)

    stacks, checkpoint = experts_of(write(tmp_path, order=order))
    assert holds_everything(stacks)
    assert is_view(stacks["w2.weight"], checkpoint)
    assert not is_view(stacks["w2.scale"], checkpoint)


def test_experts_in_two_shards_are_copied(tmp_path):
    write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    first = [name for name in sorted(TENSORS) if ".experts.7." not in name]
    shards = {
        "a.safetensors": first,
        "b.safetensors": [name for name in TENSORS if name not in first],
    }
    for shard, names in shards.items():
        write_file(
            tmp_path / shard, TENSORS, sorted(names, key=lambda name: -TENSORS[name].element_size())
        )
    index = {name: shard for shard, names in shards.items() for name in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    stacks, _ = experts_of(tmp_path)
    assert holds_everything(stacks)


def test_packings_of_fp4_may_differ(tmp_path):
    def convert(name, dtype, shape, raw):
        packed = {".experts.0.": ("U8", shape), ".experts.1.": ("F4", [shape[0], shape[-1] * 2])}
        other = next(
            (form for part, form in packed.items() if part in name and name.endswith("weight")),
            None,
        )
        return (*(other or (dtype, shape)), raw) if ".ffn.experts." in name else (dtype, shape, raw)

    repack(write(tmp_path) / "model.safetensors", convert)
    assert holds_everything(experts_of(tmp_path)[0])


def stacked_by_transformers(tensors):
    """transformers' module names: [E, 2m, d] of w1 and w3, [E, d, m] of w2."""
    result, parts = {}, {}
    for name, tensor in tensors.items():
        if ".ffn.experts." in name:
            expert, part = name.split(".experts.")[1].split(".")[:2]
            parts.setdefault(to_transformers(name), {})[int(expert), part] = tensor
        else:
            result[to_transformers(name)] = tensor
    for stored, found in parts.items():
        names = ("w1", "w3") if "gate_up" in stored else ("w2",)
        each = [torch.cat([found[e, part].view(torch.uint8) for part in names]) for e in range(12)]
        result[stored] = torch.stack(each).view(next(iter(found.values())).dtype)
    return result


def test_stacked_names_are_views(tmp_path):
    stacks, checkpoint = experts_of(write(tmp_path, stacked_by_transformers(TENSORS)))
    assert holds_everything(stacks)
    assert stacks["w3.weight"].stride(0) == 2 * stacks["w3.weight"][0].numel()
    assert all(is_view(tensor, checkpoint) for tensor in stacks.values())


@pytest.mark.parametrize("store", [lambda t: t, stacked_by_transformers], ids=["apart", "stacked"])
def test_a_ranks_experts_are_found_in_any_order(tmp_path, store):
    folder = write(tmp_path, store(TENSORS))
    for rank in range(3):
        sharding = Sharding(DeviceLayout(3, 1, 3, 3), rank, OFFICIAL)
        checkpoint = open_checkpoint(folder, owner=sharding.owner)
        stacks = dict(sharding.tensors(checkpoint, None))
        start = "layers.1.ffn.experts."
        slots = stacks.get(f"{start}slots", torch.arange(4))
        for e in range(4):
            for leaf in ("w1.weight", "w2.weight", "w3.scale"):
                own = stacks[start + leaf][slots[e]]
                assert bits(own) == bits(TENSORS[f"{start}{4 * rank + e}.{leaf}"])


@pytest.mark.parametrize(
    ("odd", "dtype", "shift", "views"),
    [
        ((), torch.float8_e8m0fnu, 0, False),
        (range(12), torch.float32, 0, True),
        (range(12), torch.float32, 2, False),
        ((3,), torch.float32, 0, False),
    ],
    ids=["powers of two", "any values", "misaligned", "one expert of any values"],
)
def test_fp32_scales(tmp_path, odd, dtype, shift, views):
    """Powers of two become E8M0 if all experts have them;
    else all stay fp32, and what was E8M0 is widened.
    """
    tensors = dict(TENSORS)
    for name in [name for name in tensors if ".experts." in name and name.endswith(".scale")]:
        expert = int(name.split(".experts.")[1].split(".")[0])
        tensors[name] = tensors[name].float() * (1.1 if expert in odd else 1)
    stacks, checkpoint = experts_of(write(tmp_path, tensors, shift=shift))
    slots = stacks["slots"]
    assert stacks["w1.scale"].dtype == dtype
    assert is_view(stacks["w1.scale"], checkpoint) == views
    for e in range(12):
        assert torch.equal(
            stacks["w1.scale"][slots[e]].float(), tensors[f"layers.1.ffn.experts.{e}.w1.scale"]
        )


@pytest.mark.parametrize("profile", ["ideal", "official"])
def test_the_order_of_a_file_changes_no_bit(tmp_path, profile):
    orders = {"by number": list, "by name": sorted, "shuffled": shuffled}
    models = [
        dsv4_ascend.load(write(tmp_path / name, order=order), profile=profile)
        for name, order in orders.items()
    ]
    assert [model.network.layers[0].ffn.experts.slots is None for model in models] == [
        True,
        False,
        True,
    ]
    logits = [model.forward(IDS) for model in models]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    options = {"draft_tokens": 2, "max_new_tokens": 6, "stop_ids": frozenset()}
    texts = [model.generate([IDS], **options) for model in models]
    assert texts[0] == texts[1] == texts[2]


def test_official_tensors_are_those_of_the_file(tmp_path):
    model = dsv4_ascend.load(write(tmp_path))
    found = dict(official_tensors(model.network))
    assert found.keys() == TENSORS.keys()
    assert all(
        bits(found[name]) == bits(tensor)
        for name, tensor in TENSORS.items()
        if ".ffn.experts." in name
    )


def test_progress_counts_every_byte_once(tmp_path):
    checkpoint, told = open_checkpoint(write(tmp_path)), []
    list(checkpoint.network_tensors(lambda *numbers: told.append(numbers)))
    assert told[-1] == (checkpoint.nbytes, checkpoint.nbytes)
    assert told == sorted(told)


def test_experts_that_are_missing_are_named():
    network = dsv4_ascend.model.transformer.Transformer(CONFIG, dsv4_ascend.model.profile.OFFICIAL)
    some = {name: t for name, t in TENSORS.items() if ".1.ffn.experts.5.w3." not in name}
    with pytest.raises(
        ArgumentError, match=r"layers.1.ffn.experts.w3.weight: found 11 experts, expected all 12"
    ):
        dsv4_ascend.model.weights.assign_all(network, some.items(), torch.device("cpu"))


def test_experts_one_by_one_keep_the_order_that_the_network_has(tmp_path):
    """Official tensors, under the names of single experts,
    put into a network that a file gave another order.
    """
    model = dsv4_ascend.load(write(tmp_path))
    want = model.forward(IDS)
    again = dict(official_tensors(model.network))
    dsv4_ascend.model.weights.assign_all(model.network, again.items(), torch.device("cpu"))
    assert model.network.layers[1].ffn.experts.slots is not None
    assert torch.equal(model.forward(IDS), want)
