"""The search finds the best of all layouts, and says what forbids the others."""

import itertools

import pytest
from planned import candidate, planned, question

from dsv4_ascend.plan.layout import Layout, layouts, parse_layout
from dsv4_ascend.plan.memory import NO
from dsv4_ascend.plan.search import Judge
from dsv4_backend.errors import ArgumentError

CASES = [
    {"model": "flash", "device": "910B3", "count": 8, "context": 131072},
    {"model": "flash", "device": "910B3", "count": 8, "context": 131072, "batch": 64},
    {"model": "flash", "device": "910C", "count": 16, "context": 1048576, "batch": 8},
    {"model": "pro", "device": "910C", "count": 32, "context": 135000, "precision": "w4a8"},
    {"model": "pro", "device": "910B3", "count": 64, "context": 8192, "precision": "w4a8"},
    {"model": "pro", "device": "950DT", "count": 16, "context": 8192, "batch": 64},
    {"model": "flash", "device": "950PR", "count": 24, "context": 8192, "batch": 500},
    {"model": "flash", "device": "910C", "count": 12, "context": 65536},
    {"model": "flash", "device": "H20", "count": 8, "context": 65536, "batch": 100},
]
EXCHANGE = {
    "A2": {*range(2, 9), 16, 32, 64, 128, 192, 256, 384},
    "A3": set(range(2, 769)),
    "A5": set(range(2, 1025)),
}
"""Degrees that the dispatch takes (docs/spec/ascend-operators.md 5.1)."""


def allowed(asked, tp, ep):
    """Whether operators and shapes take a layout: a second formula of the rules."""
    config = asked.shapes.config
    heads = config.num_attention_heads // tp
    taken = {"c8-640": heads in (64, 128), "c16": heads % 4 == 0, "cuda-584": True}
    return (
        config.o_groups % tp == 0
        and config.n_routed_experts % ep == 0
        and taken[asked.cache.name]
        and (ep == 1 or ep in EXCHANGE.get(asked.chip, {ep}))
    )


@pytest.mark.parametrize("options", CASES)
def test_the_best_is_the_best_of_all(options):
    asked = question(**options)
    judge, count = Judge.of(asked), asked.count
    every = [
        judge.candidate(Layout(tp, count // tp, ep))
        for tp, ep in itertools.product(range(1, count + 1), repeat=2)
        if count % tp == 0 and count % ep == 0 and allowed(asked, tp, ep)
    ]
    weights, numbers = judge.weights, asked.numbers
    budget = numbers["visible_gb"] * 1e9 * numbers["utilisation"]
    fixed = numbers["workspace_gib"] * 2**30 + 2 * numbers["comm_mib"] * 2**20

    def free(one):
        tp, ep = one.layout.tp, one.layout.ep
        experts = (weights.experts + weights.draft_experts) / ep
        rest = weights.replicated + weights.sharded / tp + weights.draft
        return budget - fixed - experts - rest

    def requests(one):
        groups = count // one.layout.tp
        return groups * min(max(0, int(free(one) // judge.cache.total)), 256)

    found = planned(**options)
    able = [
        one for one in every if requests(one) >= -(-asked.batch // one.layout.dp) * one.layout.dp
    ]
    if able:
        assert found.fastest.decode.seconds == min(one.decode.seconds for one in able)
    else:
        assert found.fastest is None
    most = max(map(requests, every))
    assert (found.largest.memory.requests if found.largest else 0) == most
    assert {one.layout for one in found.candidates if not one.refused} == {
        one.layout for one in every
    }


def test_reasons_of_the_best():
    found = planned(device="910B3", count=8, context=131072)
    assert found.fastest.layout.tp > 1  # one request a device: the weights decide
    assert found.largest.layout == Layout(1, 8, 8)  # the cache is whole in every group
    assert (
        3.5
        < found.largest.memory.requests
        / candidate(Layout(8, 1, 8), device="910B3", count=8, context=131072).memory.requests
        < 4
    )  # 3.8 times TP8 (docs/spec/planner.md 6.1)


def test_groups_of_one_are_best_at_large_batches():
    """Section 5 rule 1: decode with tp 1 wherever weights fit, but for a few requests."""
    found = planned(count=16, batch=2048, context=8192)
    assert found.fastest.layout.tp == 1


@pytest.mark.parametrize(
    ("layout", "options", "words"),
    [
        (Layout(2, 4, 8), {"device": "950DT", "count": 8}, "64 or 128 query heads"),
        (Layout(4, 4, 16), {"model": "pro", "device": "950DT"}, "64 or 128 query heads"),
        (Layout(16, 1, 16), {}, "8 groups"),
        (Layout(1, 24, 24), {"count": 24}, "256 experts"),
        (Layout(1, 12, 12), {"model": "pro", "device": "910B3", "count": 12}, "takes ep"),
    ],
)
def test_what_operators_forbid(layout, options, words):
    assert words in candidate(layout, **options).refused


def test_another_cache_format_lifts_the_limit_of_heads():
    options = {"device": "950DT", "count": 8, "memory": 144}
    refused = candidate(Layout(2, 4, 8), **options)
    assert "--cache c8-584" in refused.refused
    assert not candidate(Layout(2, 4, 8), **options, cache="c8-584").refused


@pytest.mark.parametrize("layout", [Layout(1, 16, 16), Layout(8, 2, 16), Layout(4, 4, 4)])
def test_tokens_of_all_devices(layout):
    """Every request yields 1 + accepted tokens a step, whatever the layout."""
    one = candidate(layout, batch=64, draft_tokens=3)
    rate = one.tokens_per_second(one.decode, one.memory.per_group) * 16
    assert rate == pytest.approx(64 * 2.44 / one.decode.seconds)


@pytest.mark.parametrize("count", [1, 7, 12, 16, 96, 8192])
def test_layouts_use_every_device(count):
    found = layouts(count)
    assert len(set(found)) == len(found)
    assert all(one.devices == count and count % one.ep == 0 for one in found)


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("tp=2,dp=4,ep=8", Layout(2, 4, 8)), ("tp=2", Layout(2, 4, 8)), ("dp=2", Layout(4, 2, 8)),
        (" ep=2 , tp=8", Layout(8, 1, 2)),
    ],
)  # fmt: skip
def test_layouts_are_read(text, layout):
    assert parse_layout(text, 8) == layout


@pytest.mark.parametrize(
    "text",
    ["", "tp", "tp=", "tp=0", "tp=-1", "tp=2.5", "tp=2,tp=2", "pp=2", "tp=3", "tp=16", "dp=3",
     "tp=2,dp=2", "ep=3", "ep=16", "tp=9999999", "tp=²", "tp=2;dp=4"],
)  # fmt: skip
def test_no_layouts(text):
    with pytest.raises(ArgumentError, match=r"--layout: .*(expected|give)"):
        parse_layout(text, 8)


def test_ways_to_fit_do_fit():
    found = planned(device="910B4", count=8, context=131072, precision="w8a8")
    assert found.chosen.memory.verdict == NO
    assert any(way.startswith("--precision w4a8") for way in found.ways)
    assert any(way.startswith("--count") for way in found.ways)
    for way in found.ways:
        words = dict(itertools.pairwise(way.split()))
        changes = {
            name.lstrip("-"): int(value) if value.isdigit() else value
            for name, value in words.items()
            if name.startswith("--")
        }
        options = {"device": "910B4", "count": 8, "context": 131072, "precision": "w8a8"}
        assert planned(**{**options, **changes}).fits, way
