"""transformers' DeepSeek V4 on our operators computes what its eager attention computes."""

from __future__ import annotations

import subprocess
import sys

import oracle
import pytest
import tfm
import torch
from seeds import seed_of
from tfm import assert_close, greedy, padded, positions_of, random_pair, sparse_copy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, monkey_patching
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling
from transformers.monkey_patching import get_patch_mapping

from dsv4_ascend.integrations.transformers import register, seams, sparse
from dsv4_backend.errors import ArgumentError, EnvironmentFault, UnsupportedError

CONFIGS = range(10)
FEW = [
    seed if seed in (1, 5, 6) else pytest.param(seed, marks=pytest.mark.long) for seed in CONFIGS
]
"""Slower tests take the others in the long tier: of one to three prompts here too."""


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(seed_of(__name__))
    eager = oracle.make_model(oracle.T1, torch.initial_seed())
    eager.generation_config.pad_token_id = 0
    return eager, sparse_copy(eager)


@pytest.mark.parametrize("seed", CONFIGS)
@torch.no_grad()
def test_logits_of_padded_batches(seed: int) -> None:
    eager, ours = random_pair(seed)
    given = padded(eager, tfm.prompts_of(seed))
    given["position_ids"] = positions_of(given["attention_mask"])
    want = eager(**given).logits
    assert want.std() > 0.3, "logits near zero would prove nothing"
    assert_close(ours(**given).logits, want)
    register()
    eager.set_attn_implementation("dsv4")
    eager.set_experts_implementation("dsv4")
    assert_close(eager(**given).logits, want)


@pytest.mark.parametrize("seed", FEW)
@torch.no_grad()
def test_chunks_and_decode_in_the_models_own_cache(seed: int) -> None:
    """Two chunks, then tokens one by one across the ends of blocks of every ratio."""
    eager, ours = random_pair(seed)
    given = padded(eager, [n + 20 for n in tfm.prompts_of(seed)])
    mask, ids = given["attention_mask"], given["input_ids"]
    positions, total = positions_of(mask), ids.shape[1]
    first = (total - 17) // 3
    steps = [slice(0, first), slice(first, total - 17)]
    steps += [slice(t, t + 1) for t in range(total - 17, total)]
    caches = [None, None]
    for step in steps:
        logits = []
        for i, model in enumerate((eager, ours)):
            out = model(
                input_ids=ids[:, step],
                attention_mask=mask[:, : step.stop],
                position_ids=positions[:, step],
                past_key_values=caches[i],
                use_cache=True,
            )
            caches[i] = out.past_key_values
            logits.append(out.logits)
        assert_close(logits[1], logits[0])
    for theirs, mine in zip(caches[0].layers, caches[1].layers, strict=True):
        assert type(theirs) is type(mine)
        assert theirs.keys.shape == mine.keys.shape


@pytest.mark.parametrize("seed", CONFIGS)
def test_greedy_text(seed: int) -> None:
    eager, ours = random_pair(seed)
    given = padded(eager, tfm.prompts_of(seed))
    assert greedy(ours, 10, **given) == greedy(eager, 10, **given)


@pytest.mark.parametrize("seed", FEW)
def test_greedy_text_by_the_registries(seed: int) -> None:
    eager, _ = random_pair(seed)
    given = padded(eager, tfm.prompts_of(seed))
    want = greedy(eager, 20, **given)
    register()
    eager.set_attn_implementation("dsv4")
    eager.set_experts_implementation("dsv4")
    assert greedy(eager, 20, **given) == want


def test_beams(pair) -> None:
    given = padded(pair[0], [33, 21])
    texts = [greedy(model, 18, num_beams=3, **given) for model in pair]
    assert texts[0] == texts[1]


@torch.no_grad()
def test_a_cache_that_eager_filled_goes_on(pair) -> None:
    eager, ours = pair
    ids = padded(eager, [45])["input_ids"]
    want = eager(input_ids=ids).logits
    cache = eager(input_ids=ids[:, :30], use_cache=True).past_key_values
    assert_close(ours(input_ids=ids[:, 30:], past_key_values=cache).logits, want[:, 30:])


@pytest.mark.parametrize("kind", ["packed", "right padding", "holes", "positions from 100"])
@torch.no_grad()
def test_other_masks_and_positions(pair, kind: str) -> None:
    eager, ours = pair
    given = {"input_ids": padded(eager, [50, 50])["input_ids"]}
    if kind == "packed":
        given["position_ids"] = torch.cat([torch.arange(23), torch.arange(27)]).expand(2, -1)
    elif kind == "right padding":
        given["attention_mask"] = (torch.arange(50) < torch.tensor([[50], [31]])).long()
    elif kind == "holes":
        given["attention_mask"] = (torch.arange(50) % 7 != 3).long().expand(2, -1)
    else:
        given["position_ids"] = torch.arange(100, 150)[None]
    assert_close(ours(**given).logits, eager(**given).logits)


def test_gradients(pair) -> None:
    ids = padded(pair[0], [40, 40])["input_ids"]
    losses, gradients = [], []
    for model in pair:
        loss = model(input_ids=ids, labels=ids).loss
        names, weights = zip(*model.named_parameters(), strict=True)
        gradients.append(torch.autograd.grad(loss, weights, allow_unused=True))
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for name, want, got in zip(names, *gradients, strict=True):
        assert (want is None) == (got is None), name
        if want is not None:
            assert (want - got).abs().max() <= 1e-4 * max(1, want.abs().max().item()), name


def test_parameters_are_transformers_own(pair, tmp_path) -> None:
    eager, ours = pair
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in pair]
    assert shapes[0] == shapes[1]
    ours.save_pretrained(tmp_path)
    ids = padded(eager, [20])["input_ids"]
    with sparse():
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(plain.model.layers[0].self_attn) is modeling.DeepseekV4Attention
    with torch.no_grad():
        want = eager(input_ids=ids).logits
        assert_close(again(input_ids=ids).logits, want)
        assert_close(plain(input_ids=ids).logits, want)


class _Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, torch.Tensor):
                self.numel = max(self.numel, one.numel())
        return out


@torch.no_grad()
def test_no_tensor_grows_with_pairs_of_tokens(pair) -> None:
    """Twice the tokens: twice the largest tensor, where eager's is four times as large."""
    ratios = []
    for model in pair:
        largest = []
        for tokens in (768, 1536):
            with _Largest() as seen:
                model(input_ids=torch.randint(2, 97, (1, tokens)), logits_to_keep=1)
            largest.append(seen.numel)
        ratios.append(largest[1] / largest[0])
    assert ratios[0] > 3.5
    assert ratios[1] < 2.05


# What is outside


def test_importing_does_nothing() -> None:
    code = (
        "import sys, dsv4_ascend.integrations.transformers, dsv4_ascend; "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def _world() -> tuple[object, ...]:
    recorders = dict(modeling.DeepseekV4PreTrainedModel._can_record_outputs)
    return modeling.DeepseekV4Attention, get_patch_mapping(), recorders


def test_nothing_is_changed_outside(pair, tmp_path) -> None:
    before = _world()
    with sparse():
        AutoModelForCausalLM.from_config(oracle.make_config(oracle.T1))
        assert _world() != before
    assert _world() == before
    with pytest.raises(ValueError, match="model_type"), sparse():
        AutoModelForCausalLM.from_pretrained(tmp_path)
    broken = oracle.make_config(oracle.T1)
    broken.layer_types = ["of no kind"] * 5
    with pytest.raises(KeyError, match="of no kind"), sparse():
        AutoModelForCausalLM.from_config(broken)
    assert _world() == before
    out = pair[0](input_ids=torch.tensor([[5, 6, 7]]), output_attentions=True)
    assert out.attentions[0].shape == (1, 4, 3, 3)


def test_the_class_is_replaced_once() -> None:
    before = _world()
    words = r"replaced by dsv4_ascend.*\.SparseAttention already"
    with sparse(), pytest.raises(EnvironmentFault, match=words), sparse():
        pass
    assert _world() == before


# Errors name what was wrong


def test_transformers_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seams, "version", lambda: None)
    with pytest.raises(EnvironmentFault, match="not installed: pip install transformers==5"):
        register()


def test_a_transformers_without_our_seams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seams, "version", lambda: "4.50.0")
    monkeypatch.delattr(monkey_patching, "register_patch_mapping")
    words = r"4\.50\.0 has no transformers\.monkey_patching\.register_patch_mapping; tested with 5"
    with pytest.raises(EnvironmentFault, match=words), sparse():
        pass


def test_sparse_attention_takes_bands_only(pair) -> None:
    ours = pair[1]
    ids = torch.tensor([[5, 6, 7]])
    dense = torch.zeros(1, 1, 3, 3)
    with pytest.raises(ArgumentError, match=r"'dsv4_sparse'.*float32 \[1, 1, 3, 3\].*band \[1, 3"):
        ours(input_ids=ids, attention_mask=dense)
    with pytest.raises(ArgumentError, match="attention_mask is None; expected the band"):
        ours.model.layers[0].self_attn(
            torch.zeros(1, 3, 64), {"main": (torch.zeros(1, 3, 4),) * 2}, ids, None
        )


def test_only_eager_gives_probabilities(pair) -> None:
    ours = pair[1]
    with pytest.raises(UnsupportedError, match="'dsv4_sparse': output_attentions=True"):
        ours(input_ids=torch.tensor([[5, 6]]), output_attentions=True)
    ours.config.attention_dropout = 0.1
    try:
        with pytest.raises(UnsupportedError, match=r"attention_dropout=0\.1 while training"):
            ours.train()(input_ids=torch.tensor([[5, 6]]))
    finally:
        ours.config.attention_dropout = 0.0
        ours.eval()


def test_a_configuration_of_a_sparse_model_makes_no_other(pair) -> None:
    other = modeling.DeepseekV4ForCausalLM(pair[1].config).eval()
    with pytest.raises(UnsupportedError, match=r"configuration object.*give each its own"):
        other(input_ids=torch.tensor([[5, 6]]))


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (None, "attention_mask is None"),
        (torch.ones(1, 1, 3, 3, dtype=torch.bool), r"torch\.bool, as sdpa_mask makes it"),
        (torch.full((1, 1, 3, 3), 0.5), "adds to scores"),
        (torch.zeros(1, 4, 3, 3), r"attention_mask \[1, 4, 3, 3\]; expected float \[1 or 1, 1, 3"),
    ],
)
def test_masks_that_say_something_else(pair, mask, words: str) -> None:
    from dsv4_ascend.integrations.transformers import attention

    layer = pair[0].model.layers[0].self_attn
    q, kv = torch.randn(1, 4, 3, 32), torch.randn(1, 1, 3, 32)
    with pytest.raises(ArgumentError, match=words):
        attention.attend(layer, q, kv, kv, mask, layer.scaling, s_aux=layer.sinks)


def test_another_models_attention(pair) -> None:
    from dsv4_ascend.integrations.transformers import attention

    layer = pair[0].model.layers[0].self_attn
    q, kv = torch.randn(1, 4, 3, 32), torch.randn(1, 2, 3, 32)
    with pytest.raises(UnsupportedError, match=r"2 key heads.*no sinks"):
        attention.attend(layer, q, kv, kv, None, layer.scaling)


def test_experts_of_another_form(pair) -> None:
    from dsv4_ascend.integrations.transformers import experts

    module = pair[0].model.layers[0].mlp.experts
    given = torch.randn(2, 64), torch.tensor([[0, 1]] * 2), torch.rand(2, 2)
    assert experts.forward(module, *given).shape == (2, 64)
    module.has_bias = True
    try:
        with pytest.raises(UnsupportedError, match=r"DeepseekV4Experts has biases: use experts"):
            experts.forward(module, *given)
    finally:
        module.has_bias = False
