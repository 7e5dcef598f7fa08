"""Several ranks give what one gives: logits, texts, drafts, chunks; rows go to their experts."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import pytest
import torch
from quantised_networks import QUANTISED, write_quantised
from rank_processes import on_ranks

from dsv4_ascend.model.model import Model, load
from dsv4_ascend.model.ranks import connected
from dsv4_ascend.tiny.release import SHIPPED
from dsv4_backend.errors import ArgumentError

TEXTS = ("def spread(values):\n    total = sum(values)\n    return", "class Cache:", "import")
CHUNK, DECODE_FROM, NEW = 8, 16, 5
TWO = {
    "tp2": {"tp": 2, "ep": 1},
    "ep2": {"tp": 1, "dp": 1, "ep": 2},
    "tp2 x ep2": {"tp": 2, "ep": 2},
    "dp2, ep2": {"dp": 2, "ep": 2},
}
FOUR = {
    "tp2 x dp2, ep4": {"tp": 2, "dp": 2},
    "tp2 twice, ep4": {"tp": 2, "dp": 1},
    "tp2 x dp2, ep2": {"tp": 2, "dp": 2, "ep": 2},
    "dp4, ep4": {"dp": 4},
}
LONG = pytest.mark.long
DEPLOYED = "bf16", "a2a3-int8", "a5-mx"
SAME_BITS = "ep2", "dp2, ep2"
"""Where no sum is divided: two choices per token are added by two ranks as by one."""


@cache
def alone(profile: str, folder: Path = SHIPPED) -> Model:
    return load(folder, profile=profile)


def prompts(model: Model) -> list[list[int]]:
    return [model.tokenizer.encode(text, bos=True) for text in TEXTS]


def logits(model: Model, ids: list[list[int]]) -> torch.Tensor:
    return model.forward(ids, chunk=CHUNK, decode_from=DECODE_FROM)


def greedy(model: Model, ids: list[list[int]], drafts: int) -> list[list[int]]:
    return model.generate(ids, max_new_tokens=NEW, draft_tokens=drafts, stop_ids=())


def outcome(model: Model, ids: list[list[int]]) -> tuple[object, ...]:
    return logits(model, ids).numpy(), greedy(model, ids, 0), greedy(model, ids, 2)


def unchanged(model: Model) -> None:
    """Leave it as it is."""


@cache
def outcome_of_one(profile, folder, ids, change) -> tuple[object, ...]:
    model = load(folder, profile=profile)
    change(model)
    return outcome(model, [list(p) for p in ids])


def ran(world, layout, profile, ids, folder=SHIPPED, change=unchanged):
    """The outcome on every rank."""

    def work(rank):
        with connected(**layout) as parallel:
            model = load(folder, profile=profile, parallel=parallel)
            change(model)
            return outcome(model, ids)

    return on_ranks(world, work)


def only_logits(world, layout, profile, ids):
    """Logits on every rank."""

    def work(rank):
        with connected(**layout) as parallel:
            return logits(load(SHIPPED, profile=profile, parallel=parallel), ids).numpy()

    return on_ranks(world, work)


def check(world, layout, profile, ids, *, folder=SHIPPED, exact=False, change=unchanged):
    """The outcome of every rank is that of one."""
    expected = outcome_of_one(profile, folder, tuple(map(tuple, ids)), change)
    assert len(set(map(tuple, expected[1]))) == len(ids)  # or prompts could be confused
    for found in ran(world, layout, profile, ids, folder, change):
        distance = abs(found[0] - expected[0]).max()
        assert distance == 0 if exact else distance <= 1e-4
        assert found[1:] == expected[1:]


@pytest.mark.parametrize("name", TWO)
def test_two_ranks_give_the_logits_and_texts_of_one(name):
    check(2, TWO[name], "ideal", prompts(alone("ideal")), exact=name in SAME_BITS)


@pytest.mark.parametrize("name", SAME_BITS)
def test_divided_experts_give_the_bits_of_one_rank_in_official(name):
    check(2, TWO[name], "official", prompts(alone("official")), exact=True)


@pytest.mark.parametrize("profile", ["official", *(pytest.param(p, marks=LONG) for p in DEPLOYED)])
def test_divided_attention_is_as_far_from_one_rank_as_rounding_takes_it(profile):
    """Each rank rounds its part of wo_b's sums to bf16, and what is quantised behind it flips. The
    distance of a profile to `ideal` is what all of its roundings cost.
    """
    ids = prompts(alone(profile))
    one, ideal = (logits(alone(p), ids) for p in (profile, "ideal"))
    found = [torch.from_numpy(f) for f in only_logits(2, TWO["tp2"], profile, ids)]
    assert torch.equal(*found)
    distance, cost = (
        (other - one).square().mean().sqrt() / one.std() for other in (found[0], ideal)
    )
    assert 0 < distance < 2 * cost


@pytest.mark.long
@pytest.mark.parametrize("name", SAME_BITS)
@pytest.mark.parametrize("profile", DEPLOYED)
def test_divided_experts_give_the_bits_of_one_rank_in_deployments(profile, name):
    """Operators of whole layers are taken apart: each step rounds as inside of them."""
    ids = prompts(alone(profile))
    expected = logits(alone(profile), ids)
    for found in only_logits(2, TWO[name], profile, ids):
        assert torch.equal(torch.from_numpy(found), expected)


def test_a_rank_without_prompts_takes_part():
    model = alone("ideal")
    check(2, TWO["dp2, ep2"], "ideal", prompts(model)[:1], exact=True)


@pytest.mark.parametrize("other", [{"max_new_tokens": 3}, {"prompts": [[0, 5]]}])
def test_ranks_that_are_called_differently_all_learn_it(other):
    def work(rank):
        with connected(dp=2) as parallel:
            model = load(SHIPPED, profile="ideal", parallel=parallel)
            call = {"prompts": [[0, 4]], "max_new_tokens": 2} | (other if rank else {})
            with pytest.raises(ArgumentError, match=f"rank {rank}: found prompts or options that"):
                model.generate(call.pop("prompts"), **call)

    on_ranks(2, work)


def to_one_rank(model: Model) -> None:
    """Have every token choose the experts 0 and 1, which one rank has."""
    for block in [*model.network.layers, *model.network.mtp]:
        gate = block.ffn.gate
        if gate.hashed:
            chosen = torch.tensor([0, 1]).expand(gate.tid2eid.shape).contiguous()
            gate.tid2eid = torch.nn.Parameter(chosen, requires_grad=False)
        else:
            gate.bias = torch.nn.Parameter(1e4 * (torch.arange(len(gate.bias)) < 2).float())


@pytest.mark.parametrize("name", SAME_BITS)
def test_all_tokens_may_choose_the_experts_of_one_rank(name):
    ids = prompts(alone("ideal"))
    check(2, TWO[name], "ideal", ids, exact=True, change=to_one_rank)


@pytest.mark.long
@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_give_the_logits_and_texts_of_one(name):
    check(4, FOUR[name], "ideal", prompts(alone("ideal")))


@pytest.mark.long
@pytest.mark.parametrize("layout", [{"tp": 4, "ep": 1}, {"tp": 1, "dp": 1, "ep": 4}, {}])
def test_a_model_of_four_groups_on_four_ranks(layout, tmp_path):
    folder = write_quantised(
        tmp_path / "checkpoint",
        dataclasses.replace(QUANTISED, o_groups=4, num_attention_heads=4, vocab_size=128),
    )
    check(4, layout, "ideal", [[5, 9, 3] * 9, [7], [1, 2]], folder=folder)
