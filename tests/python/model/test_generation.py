"""Generation: batches, speculative decoding,
sampling and paged-cache bookkeeping on random networks.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from seeds import generator, seed_of
from tiny_networks import random_model

from dsv4_ascend.model import generation
from dsv4_ascend.model.cache import PagedCache
from dsv4_ascend.model.model import Model, load
from dsv4_ascend.model.step import make_step
from dsv4_backend.errors import ArgumentError, EnvironmentFault

NEVER_STOP: frozenset[int] = frozenset()


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> Model:
    return random_model(seed=seed_of(request.node.nodeid))


def _ids(length: int, seed: int) -> list[int]:
    return torch.randint(2, 97, (length,), generator=generator(seed)).tolist()


@pytest.mark.parametrize("draft_tokens", [1, 2, 4])
def test_speculative_decoding_equals_plain_decoding(model: Model, draft_tokens: int) -> None:
    prompts = [_ids(n, n) for n in (1, 5, 16, 33)]
    options = {"max_new_tokens": 40, "stop_ids": NEVER_STOP}
    plain = model.generate(prompts, **options)
    drafted = model.generate(prompts, draft_tokens=draft_tokens, **options)
    assert drafted == plain
    assert all(len(tokens) == 40 for tokens in plain)


def test_drafts_of_a_perfect_drafter_are_accepted(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the true continuation as drafts,
    every draft is accepted: acceptance is bookkeeping, not luck.
    """
    prompt = _ids(9, 3)
    want = model.generate([prompt], max_new_tokens=24, stop_ids=NEVER_STOP)[0]
    sequence = prompt + want

    def oracle(network, cache, sequences, *step) -> list[list[int]]:
        at = sequences[0].length + 1
        return [sequence[at : at + 2]]

    for module in ("generation", "decoding"):
        monkeypatch.setattr(f"dsv4_ascend.model.{module}.drafts_after", oracle)
    got = model.generate([prompt], max_new_tokens=24, draft_tokens=2, stop_ids=NEVER_STOP)[0]
    assert got == want
    assert model.draft_acceptance == 1.0


@pytest.mark.parametrize("draft_tokens", [1, 3, 6])
@pytest.mark.parametrize("max_new_tokens", [1, 2, 5])
def test_accepted_drafts_may_reach_past_the_end(draft_tokens: int, max_new_tokens: int) -> None:
    """With a head of zeros every token and every draft is 0,
    so that the last step accepts all of its drafts.
    """
    agreeing = random_model(seed=torch.initial_seed())
    agreeing.network.head.weight.data.zero_()
    options = {
        "max_new_tokens": max_new_tokens,
        "draft_tokens": draft_tokens,
        "stop_ids": NEVER_STOP,
    }
    assert agreeing.generate([[3, 4, 5], [6] * 9], **options) == [[0] * max_new_tokens] * 2
    stopped = agreeing.generate([[3, 4, 5]], **{**options, "stop_ids": frozenset({0})})
    assert stopped == [[0]]


def test_drafts_do_not_depend_on_chunks_or_on_rejected_drafts(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After any number of steps the MTP block drafts what it drafts after one prefill
    of the same tokens.
    """
    seen: dict[int, list[int]] = {}
    keep = generation.keep_drafts

    def record(requests, drafts) -> None:
        keep(requests, drafts)
        seen.update({r.cached.length: list(r.drafts) for r in requests})

    monkeypatch.setattr(generation, "keep_drafts", record)
    prompt = _ids(21, 4)
    options = {"draft_tokens": 3, "stop_ids": NEVER_STOP}
    monkeypatch.setattr("dsv4_ascend.model.model.PREFILL_CHUNK", 5)
    tokens = prompt + model.generate([prompt], max_new_tokens=8, **options)[0]
    stepwise = {length: drafts for length, drafts in seen.items() if length >= len(prompt)}
    monkeypatch.setattr("dsv4_ascend.model.model.PREFILL_CHUNK", 512)
    assert len(stepwise) >= 3
    for length, drafts in stepwise.items():
        model.generate([tokens[:length]], max_new_tokens=4, **options)
        assert seen[length] == drafts


@pytest.mark.parametrize("chunk", [1, 7])
def test_prompts_longer_than_a_prefill_chunk(
    model: Model, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    prompts = [_ids(n, n) for n in (1, 6, 7, 8, 30)]
    options = {"max_new_tokens": 6, "stop_ids": NEVER_STOP}
    whole = model.generate(prompts, **options)
    monkeypatch.setattr("dsv4_ascend.model.model.PREFILL_CHUNK", chunk)
    assert model.generate(prompts, draft_tokens=2, **options) == whole


def test_batch_equals_each_alone(model: Model) -> None:
    prompts = [_ids(n, 100 + n) for n in (2, 4, 17, 40)]
    together = model.generate(prompts, max_new_tokens=12, stop_ids=NEVER_STOP)
    alone = [model.generate([p], max_new_tokens=12, stop_ids=NEVER_STOP)[0] for p in prompts]
    assert together == alone


def test_seed_fixes_sampling_and_temperature_zero_is_argmax(model: Model) -> None:
    prompt = _ids(7, 1)
    first, again, other = (
        model.generate([prompt], max_new_tokens=16, temperature=1.0, seed=s, stop_ids=NEVER_STOP)[0]
        for s in (5, 5, 6)
    )
    assert first == again
    assert first != other
    greedy = model.generate([prompt], max_new_tokens=1, stop_ids=NEVER_STOP)[0]
    assert greedy == [int(model.forward(prompt)[-1].argmax())]


def test_sampled_text_does_not_depend_on_batch_mates(model: Model) -> None:
    prompts = [_ids(n, n) for n in (3, 9, 20)]
    options = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3, "stop_ids": NEVER_STOP}
    together = model.generate(prompts, **options)
    assert together == [model.generate([p], **options)[0] for p in prompts]


def test_sequences_past_the_position_limit_are_refused(model: Model) -> None:
    short = random_model(replace(model.config, max_position_embeddings=16))
    with pytest.raises(ArgumentError, match="max_position_embeddings is 16"):
        short.forward(_ids(17, 0))
    with pytest.raises(ArgumentError, match="max_position_embeddings is 16"):
        short.generate([_ids(10, 0)], max_new_tokens=7)


def test_stop_token_ends_a_sequence_and_is_the_last(model: Model) -> None:
    prompt = _ids(7, 1)
    tokens = model.generate([prompt], max_new_tokens=30, stop_ids=NEVER_STOP)[0]
    stop = tokens[10]
    stopped = model.generate([prompt], max_new_tokens=30, stop_ids=frozenset({stop}))[0]
    assert stopped == tokens[: tokens.index(stop) + 1]


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([[]], {}, "no tokens"),
        ([[3]], {"temperature": 1.0, "draft_tokens": 1}, "greedy"),
        ([[97]], {}, "input_ids: found 97 in sequence 0 at 0, expected an id in .0, 97."),
        ([3, [4]], {}, "found 3 as sequence 0"),
        ([[3, 4.0]], {}, "found 4.0 in sequence 0 at 1"),
        ([[True]], {}, "found True"),
        ([[2**70]], {}, "expected an id"),
        (3, {}, "found 3, expected token ids"),
        (torch.tensor(3), {}, "found 3, expected token ids"),
        (torch.tensor([3.0]), {}, "found 3.0"),
        ([[3]], {"max_new_tokens": -1}, "max_new_tokens: found -1, expected an integer at least 0"),
        ([[3]], {"draft_tokens": -1}, "draft_tokens: found -1"),
        ([[-1]], {}, "input_ids"),
        ([[3]], {"top_p": 0.0}, "top_p"),
        ([[3]], {"temperature": -1.0}, "temperature"),
    ],
)
def test_bad_requests_are_named(model: Model, prompts: list, options: dict, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        model.generate(prompts, **{"max_new_tokens": 2, **options})


def test_no_tokens_give_no_logits_and_no_text(model: Model) -> None:
    assert model.forward([]).shape == (0, 97)
    assert model.forward([[], [3, 4], []]).shape == (2, 97)
    assert model.generate([[3]], max_new_tokens=0) == [[]]
    assert model.generate([]) == []


@pytest.mark.parametrize(
    "ids",
    [
        np.array([[3, 4], [5, 6]]),
        torch.tensor([[3, 4], [5, 6]]),
        [np.array([3, 4]), torch.tensor([5, 6])],
        [[np.int64(3), 4], range(5, 7)],
    ],
)
def test_token_ids_come_in_any_integer_container(model: Model, ids: object) -> None:
    assert torch.equal(model.forward(ids), model.forward([[3, 4], [5, 6]]))
    assert torch.equal(model.forward(np.array([3, 4])), model.forward([3, 4]))
    assert model.generate(ids, max_new_tokens=2) == model.generate(
        [[3, 4], [5, 6]], max_new_tokens=2
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chunk": 0}, "chunk: found 0"),
        ({"decode_from": -1}, "decode_from: found -1"),
        ({"block_size": 0}, "block_size"),
    ],
)
def test_bad_options_of_forward_are_named(model: Model, options: dict, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        model.forward([3], **options)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"dtype": torch.float16}, ArgumentError, "dtype: found torch.float16"),
        ({"dtype": "bfloat16"}, ArgumentError, "dtype: found 'bfloat16', expected torch.bfloat16"),
        ({"device": "cuda"}, ArgumentError, "device: found 'cuda', expected cpu or npu"),
        ({"device": "npu:77"}, EnvironmentFault, "device npu:77"),
    ],
)
def test_load_checks_its_options_before_the_files(
    options: dict, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        load("/nowhere", **options)


def _logits(model: Model, cache: PagedCache, ids: list[int], step: int) -> torch.Tensor:
    sequence = cache.new_sequence()
    parts = []
    with torch.inference_mode():
        for start in range(0, len(ids), step):
            inputs = make_step(cache, [sequence], [ids[start : start + step]])
            parts.append(model.network.logits(model.network.run_layers(*inputs)))
    cache.free(sequence)
    return torch.cat(parts)


@pytest.mark.parametrize("block_size", [1, 5, 64])
def test_shuffled_freed_and_reused_blocks_change_nothing(model: Model, block_size: int) -> None:
    ids = _ids(60, 8)
    plain = _logits(model, _cache(model, block_size, None), ids, 13)
    shuffled = _cache(model, block_size, 4)
    for other in range(3):
        # Leaves its rows behind in freed blocks.
        _logits(model, shuffled, _ids(50 + other, other), 13)
    assert torch.equal(_logits(model, shuffled, ids, 13), plain)


def _cache(model: Model, block_size: int, free_order: int | None) -> PagedCache:
    return PagedCache(
        model.config,
        max_sequences=1,
        max_tokens=60,
        max_step_tokens=13,
        dtype=model.dtype,
        block_size=block_size,
        free_order=free_order,
    )


def test_a_full_cache_says_so(model: Model) -> None:
    cache = _cache(model, 8, None)
    with pytest.raises(ArgumentError, match="at most 13"):
        make_step(cache, [cache.new_sequence()], [[1] * 14])
    first, second = cache.new_sequence(), cache.new_sequence()
    make_step(cache, [first], [[1] * 13])
    with pytest.raises(ArgumentError, match="out of blocks"):
        make_step(cache, [second], [[1]])


def test_official_profile_runs_the_same_generation(model: Model) -> None:
    official = random_model(dtype=torch.bfloat16)
    prompts = [_ids(n, n) for n in (3, 20)]
    plain = official.generate(prompts, max_new_tokens=10, stop_ids=NEVER_STOP)
    assert [len(t) for t in plain] == [10, 10]


def test_without_mtp_drafting_is_refused(model: Model) -> None:
    bare = random_model(model.config.without_mtp())
    with pytest.raises(ArgumentError, match="no MTP block"):
        bare.generate([[3]], max_new_tokens=2, draft_tokens=1)
