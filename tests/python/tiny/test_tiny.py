"""The small model: its training in miniature, its stored formats,
and the checkpoint that is shipped.
"""

from __future__ import annotations

import dataclasses
import json
import keyword
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_networks import random_model

from dsv4_ascend.checkpoint.layout import layout
from dsv4_ascend.checkpoint.safetensors_file import DTYPES
from dsv4_ascend.cli.main import main
from dsv4_ascend.model.model import Model, load
from dsv4_ascend.model.profile import IDEAL
from dsv4_ascend.model.transformer import Transformer
from dsv4_ascend.model.weights import official_tensors
from dsv4_ascend.tiny.corpus import (
    Corpus,
    encode_documents,
    ngram_perplexities,
    read_corpus,
    train_tokenizer,
)
from dsv4_ascend.tiny.release import (
    CARD,
    SHIPPED,
    measure,
    perplexity,
    release_tensors,
    write_release,
)
from dsv4_ascend.tiny.training import TINY, Recipe, fake_quantised, initialise, train
from dsv4_backend.errors import ArgumentError
from dsv4_backend.ops.quant import (
    dequantize_fp4,
    dequantize_fp8,
    quantize_weight_fp4,
    quantize_weight_fp8,
)

TEXT = "def add(x, y):\n    return x + y\n\n\nfor i in range(10):\n    print(add(i, i))\n"

REDUCED = dataclasses.replace(
    TINY,
    vocab_size=280,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=2,
    head_dim=64,
    qk_rope_head_dim=32,
    q_lora_rank=32,
    o_lora_rank=32,
    sliding_window=8,
    index_n_heads=2,
    index_head_dim=32,
    index_topk=4,
    n_routed_experts=3,
    moe_intermediate_size=64,
    compress_ratios=(0, 4, 16, 0),
    layer_kinds=("swa", "csa", "hca", "swa"),
    hc_mult=2,
)
RECIPE = Recipe(steps=3, batch=2, length=32, warmup=1, quantise_from=0.5)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums keep their order with one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], REDUCED.vocab_size)


@pytest.fixture(scope="module")
def stream(tokenizer) -> torch.Tensor:
    return encode_documents(tokenizer, [TEXT] * 30)


def _train(stream: torch.Tensor, recipe: Recipe) -> tuple[Transformer, list[float]]:
    network, losses = Transformer(REDUCED, IDEAL), []
    train(network, stream, recipe, lambda step, loss, seconds: losses.append(loss))
    return network, losses


# Training.


def test_a_seed_gives_the_same_bits(stream: torch.Tensor) -> None:
    first, again = (_train(stream, RECIPE) for _ in range(2))
    assert first[1] == again[1]
    for (name, a), (_, b) in zip(
        first[0].named_parameters(), again[0].named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    other = _train(stream, dataclasses.replace(RECIPE, seed=1, steps=1))
    assert other[1][0] != first[1][0]


def test_the_loss_falls_and_every_weight_learns(stream: torch.Tensor) -> None:
    before = Transformer(REDUCED, IDEAL)
    initialise(before, 0)
    network, losses = _train(stream, dataclasses.replace(RECIPE, steps=12, quantise_from=0.8))
    assert len(losses) == 12
    assert sum(losses[-2:]) < 0.8 * sum(losses[:2])
    start = dict(official_tensors(before))
    same = [n for n, p in official_tensors(network) if torch.equal(p, start[n])]
    assert [n for n in same if not n.endswith("tid2eid")] == []


def test_late_steps_see_the_stored_weights() -> None:
    """Quantisation-aware: value of the stored weight,
    gradient of the identity, floats untouched.
    """
    weight = torch.randn(64, 64, requires_grad=True)
    for name, value in {
        "layers.0.ffn.experts.0.w1.weight": dequantize_fp4(*quantize_weight_fp4(weight.detach())),
        "layers.0.attn.wq_a.weight": dequantize_fp8(*quantize_weight_fp8(weight.detach())),
        "layers.1.attn.compressor.wkv.weight": weight.detach(),
    }.items():
        seen = fake_quantised(name, weight)
        assert torch.equal(seen, value), name
        (gradient,) = torch.autograd.grad(seen.sum(), weight)
        assert torch.equal(gradient, torch.ones_like(weight)), name


# Stored formats (spec 7.1 and 7.2, by hand).

STORED = {
    r"(embed|head|norm)\.weight|.*(_norm|norm)\.weight": "BF16",
    r".*\.ffn\.gate\.weight|.*\.indexer\.weights_proj\.weight": "BF16",
    r".*\.compressor\.(wkv|wgate)\.weight": "BF16",
    r".*\.attn\.attn_sink|.*\.compressor\.ape|.*\.gate\.bias": "F32",
    r"(.*\.)?hc_(attn|ffn|head)_(fn|base|scale)": "F32",
    r".*\.ffn\.gate\.tid2eid": "I64",
    r".*\.attn\.(wq_a|wq_b|wkv|wo_a|wo_b)\.weight|.*\.indexer\.wq_b\.weight": "F8_E4M3",
    r".*\.ffn\.shared_experts\.w[123]\.weight|mtp\.0\.[eh]_proj\.weight": "F8_E4M3",
    r".*\.ffn\.experts\.\d+\.w[123]\.weight": "I8",
}


def test_every_tensor_is_stored_as_the_release_stores_it() -> None:
    network = Transformer(TINY, IDEAL)
    initialise(network, 0)
    released = release_tensors(dict(official_tensors(network)))
    names = {dtype: name for name, (bits, dtype) in DTYPES.items() if bits >= 8}
    want: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, entry in layout(TINY).items():
        (stored,) = [dtype for pattern, dtype in STORED.items() if re.fullmatch(pattern, name)]
        want[name] = stored, entry.stored_shape(stored)
        if stored in ("F8_E4M3", "I8"):
            assert entry.dtypes[0] == stored, name
            want[name.removesuffix("weight") + "scale"] = "F8_E8M0", entry.scale_shape(stored)
    assert {name: (names[t.dtype], tuple(t.shape)) for name, t in released.items()} == want


def test_a_release_folder_loads_and_its_card_is_recomputable(
    tmp_path: Path, tokenizer, stream: torch.Tensor
) -> None:
    network, _ = _train(stream, dataclasses.replace(RECIPE, steps=1))
    trained = dict(official_tensors(network))
    found = measure(trained, stream, stream, "digest", 512, REDUCED)
    write_release(tmp_path / "out", trained, tokenizer, found, REDUCED)
    card = json.loads((tmp_path / "out" / CARD).read_text())
    assert card == dataclasses.asdict(found)
    assert (card["tokens"], card["corpus_sha256"]) == (512, "digest")
    model = load(tmp_path / "out")
    assert model.config == REDUCED
    assert perplexity(model, stream[:513]) == pytest.approx(card["quantised_official"], rel=1e-6)
    assert model.tokenizer.encode("def add", bos=True)[0] == 0


def test_perplexity_needs_a_window() -> None:
    with pytest.raises(ArgumentError, match="found 512 tokens, expected at least 513"):
        perplexity(random_model(), torch.zeros(512, dtype=torch.int64))


# Corpus.


def test_ngram_baselines_by_hand() -> None:
    train, held_out = torch.tensor([0, 1] * 500), torch.tensor([0, 1] * 50)
    unigram, bigram = ngram_perplexities(train, held_out, 2)
    assert unigram == pytest.approx(2)
    assert bigram == pytest.approx(1 / 0.95, rel=1e-6)


def test_the_corpus_is_fixed_and_split_by_file() -> None:
    corpus = read_corpus()
    assert corpus == read_corpus()
    assert not set(corpus.train) & set(corpus.held_out)
    assert 10 < len(corpus.train) / len(corpus.held_out) < 40


# The command.


def test_train_tiny_writes_a_checkpoint_that_generates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    numbers = "".join(f"value_{i} = {i * 7919 % 10007}\n" for i in range(400))
    corpus = Corpus([TEXT * 30 + numbers], [numbers], "made up")
    monkeypatch.setattr("dsv4_ascend.cli.train_tiny.read_corpus", lambda: corpus)
    monkeypatch.setattr("dsv4_ascend.cli.train_tiny.Recipe", lambda: Recipe(batch=1, length=128))
    options = ["--output", str(tmp_path / "out"), "--steps", "1", "--evaluated-tokens", "512"]
    with pytest.raises(SystemExit) as left:
        main(["train-tiny", *options])
    assert left.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["output"] == str(tmp_path / "out")
    assert load(tmp_path / "out").config == TINY
    assert printed["quantised_official"] > 1


def test_train_tiny_refuses_a_full_folder_before_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit) as left:
        main(["train-tiny", "--output", str(tmp_path)])
    assert left.value.code == 2
    assert "--output: found something" in capsys.readouterr().err


# The shipped checkpoint. Its absence is a failure.


@pytest.fixture(scope="module")
def shipped() -> Model:
    return load(SHIPPED)


def test_the_shipped_checkpoint_is_small_and_whole(shipped: Model) -> None:
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 12e6
    config = shipped.config
    assert config == TINY
    assert {"swa", "csa", "hca"} == set(config.layer_kinds[: config.num_hidden_layers])
    assert 0 < config.num_hash_layers < config.num_hidden_layers
    assert len(shipped.network.mtp) == 1
    gates = [layer.ffn.gate.hashed for layer in shipped.network.layers]
    assert set(gates) == {True, False}


def test_the_card_of_the_shipped_checkpoint_tells_progress() -> None:
    card = json.loads((SHIPPED / CARD).read_text())
    assert card["unigram"] > card["bigram"] > card["quantised_official"] > 1
    for quantised in ("quantised_official", *(name for name in card if "deployed" in name)):
        assert card["trained_fp32"] < card[quantised] < 1.01 * card["trained_fp32"], quantised


def test_the_shipped_checkpoint_beats_a_bigram_model_on_held_out_text(shipped: Model) -> None:
    card, corpus = json.loads((SHIPPED / CARD).read_text()), read_corpus()
    if corpus.digest != card["corpus_sha256"]:
        pytest.skip(
            "this Python's standard library is another corpus than the one the card was measured on"
        )
    backend = shipped.tokenizer._backend
    held_out = encode_documents(backend, corpus.held_out)[:2049]
    _, bigram = ngram_perplexities(
        encode_documents(backend, corpus.train), held_out, shipped.config.vocab_size
    )
    found = perplexity(shipped, held_out)
    assert found < bigram
    assert found < card["bigram"]
    assert found == pytest.approx(card["quantised_official"], rel=0.5)  # 2,048 of the card's tokens


def test_the_figures_of_the_deployment_profiles_are_true(shipped: Model) -> None:
    """On the first 4,096 tokens each is as far from the official one as the card says of all."""
    card, corpus = json.loads((SHIPPED / CARD).read_text()), read_corpus()
    if corpus.digest != card["corpus_sha256"]:
        pytest.skip(
            "this Python's standard library is another corpus than the one the card was measured on"
        )
    stream = encode_documents(shipped.tokenizer._backend, corpus.held_out)[:4097]
    official = perplexity(shipped, stream) / card["quantised_official"]
    for profile in ("bf16", "a2a3-int8", "a2a3-w4a8", "a5-mx"):
        figure = f"deployed_{profile.replace('-', '_')}"
        found = perplexity(load(SHIPPED, profile=profile), stream)
        assert found == pytest.approx(official * card[figure], rel=2e-3), profile


def test_the_shipped_checkpoint_writes_python(shipped: Model) -> None:
    (ids,) = shipped.generate("def ", max_new_tokens=96)
    pieces = list(shipped.tokenizer.stream(iter(ids)))
    text = "".join(pieces)
    assert text == shipped.tokenizer.decode(ids)
    assert "\ufffd" not in text
    assert all(c.isprintable() or c in "\n\t" for c in text)
    assert set(re.findall(r"[A-Za-z]+", text)) & set(keyword.kwlist)
