"""Profiles bf16, a2a3-int8 and a5-mx in whole runs: what caches keep,
and how far logits are from ideal ones (spec/deployments.md 4, 5, 7).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from deployments import both, on_chips
from quantised_networks import QUANTISED, write_quantised
from seeds import seed_of

from dsv4_ascend.model import profile as profile_module
from dsv4_ascend.model.model import Model, load
from dsv4_ascend.model.paged import BytePaged, CacheFormats
from dsv4_ascend.model.profile import A2A3_INT8, A5_MX, PROFILES
from dsv4_ascend.model.step import make_step
from dsv4_backend.ops.quant import act_qdq

LENGTH = 96
IDS = torch.randint(
    0, QUANTISED.vocab_size, (LENGTH,), generator=torch.Generator().manual_seed(seed_of(__name__))
).tolist()
SMOOTH = dataclasses.replace(QUANTISED, n_routed_experts=4, num_experts_per_tok=4, index_topk=64)
# Latent caches.


def with_caches(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: object) -> Model:
    """a5-mx with other latent caches."""
    monkeypatch.setitem(PROFILES, "a5-mx", dataclasses.replace(A5_MX, **changes))
    return load(folder, profile="a5-mx")


@pytest.mark.parametrize(
    ("form", "attend"),
    [
        ("a5", profile_module._attend),
        ("fp8_ds_mla", profile_module._attend),
        ("kv_epilog", A5_MX.attend),
    ],
    ids=("a5", "fp8_ds_mla", "kv_epilog"),
)
@pytest.mark.parametrize(
    "options", [{}, {"chunk": 7, "block_size": 5}, {"decode_from": 60, "block_size": 16}]
)
def test_latent_bytes_have_the_bits_of_the_qdq_path(
    folder: Path, monkeypatch: pytest.MonkeyPatch, form: str, attend: Callable, options: dict
) -> None:
    keys = A5_MX.caches.index_keys

    def logits(kept: str | None, **changes: object) -> torch.Tensor:
        changes |= {"caches": CacheFormats(kept, keys), "attend": attend}
        return with_caches(folder, monkeypatch, **changes).forward(IDS, **options)

    bytes_ = logits(form)
    assert torch.equal(bytes_, logits(None, latent=profile_module._fp8_latent))
    if not options:
        assert not torch.equal(bytes_, logits(None))


@both
def test_caches_are_what_the_chips_keep(models: dict[str, Model], name: str) -> None:
    model = models[name]
    cache = model.new_cache(
        max_sequences=1, max_tokens=LENGTH, max_step_tokens=LENGTH, block_size=16
    )
    step = make_step(cache, [cache.new_sequence()], [IDS])
    with torch.inference_mode():
        model.network.run_layers(*step)
    (csa,) = (layer for layer in step.layers if layer.index_keys is not None)
    nope = QUANTISED.head_dim - QUANTISED.qk_rope_head_dim
    if name == "a5-mx":
        assert all(
            isinstance(part, BytePaged) for part in (csa.window, csa.entries, csa.index_keys)
        )
        # a row: 64 RoPE channels of 2 bytes, 64 others of 1, a scale of 2, up to a multiple of 32
        assert csa.window.tensor.shape[1:] == (16 * 224,)
        assert csa.index_keys.tensor.shape[1:] == (16 * (64 + 4),)
    else:
        assert csa.window.tensor.dtype == csa.entries.tensor.dtype == torch.bfloat16
        rows = csa.window.tensor.flatten(0, 1)
        assert not torch.equal(act_qdq(rows, 64, nope), rows)  # C0: nothing rounds them
        assert csa.index_keys.tensor.shape[1:] == (16 * (64 + 2),)
    assert csa.state.tensor.dtype == torch.float32


# The whole model.


def distances(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """RMS error of each position relative to the spread of its logits."""
    return ((got - want).pow(2).mean(-1) / want.var(-1)).sqrt()


# As in test_official_profile.py: random weights amplify rounding; int8 has 7 bits, FP8 and MX-FP8
# have 3.
NOISE, WORST = 0.16, 0.3


@pytest.fixture(scope="module")
def smooth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quantised(tmp_path_factory.mktemp("smooth") / "checkpoint", SMOOTH)


@on_chips
def test_a_deployment_is_ideal_within_its_noise_however_tokens_come(
    smooth: Path, name: str
) -> None:
    model, want = load(smooth, profile=name), load(smooth, profile="ideal").forward(IDS)
    whole = model.forward(IDS)
    for options in ({}, {"chunk": 7}, {"decode_from": 60}):
        got = model.forward(IDS, **options)
        for reference in (want, whole):
            found = distances(got, reference)
            assert found.median() < NOISE
            assert found.max() < WORST
    assert distances(whole, want).median() > 0.01, "nothing was rounded"
    # Lost context is seen.
    assert distances(model.forward(IDS[60:]), whole[60:]).median() > 2 * NOISE


@both
def test_drafts_and_batches_run(models: dict[str, Model], name: str) -> None:
    found = models[name].generate(
        [IDS[:20], IDS[:5]], max_new_tokens=6, draft_tokens=2, stop_ids=()
    )
    assert [len(ids) for ids in found] == [6, 6]


def test_profiles_differ() -> None:
    assert A2A3_INT8.storage != A5_MX.storage
    assert list(PROFILES) == ["ideal", "official", "bf16", "a2a3-int8", "a2a3-w4a8", "a5-mx"]
