"""Caches, pages and what fits, against the planner's tables and worked example
(docs/spec/planner.md 3, 5, 6.1, 6.3).
"""

import pytest
from planned import candidate, planned, question, tabled_weights

from dsv4_ascend.plan.cache import COMPRESSED, cache_of, geometry
from dsv4_ascend.plan.formats import weight_bytes
from dsv4_ascend.plan.layout import Layout
from dsv4_ascend.plan.memory import FITS, NO, TIGHT, memory_of
from dsv4_ascend.plan.planner import exchange_window
from dsv4_ascend.plan.search import Judge

GIB = 2**30
A3, DT = {"device": "910C"}, {"device": "950DT"}


def cache(context=8192, **options):
    return Judge.of(question(**{"context": context, **options})).cache


@pytest.mark.parametrize(
    ("model", "megabytes"),
    [("flash", (68.8, 222, 832.9, 6540)), ("pro", (99.6, 318, 1194, 9360))],
)
def test_one_request_on_a3(model, megabytes):
    found = [cache(2**power, model=model).total / 1e6 for power in (13, 15, 17, 20)]
    assert found == pytest.approx(megabytes, rel=0.002)


def test_one_request_by_group():
    assert dict(cache(131072).rows) == {
        "csa": 704_643_072, "index": 89_456_640, "hca": 20_971_520, "window": 5_636_096,
        "csa state": 1_720_320, "hca state": 10_485_760,
    }  # fmt: skip
    assert cache(131072).total == 832_913_408


@pytest.mark.parametrize(
    ("model", "device", "per_token"),
    [
        ("flash", "910C", 6218), ("pro", "910C", 8903), ("flash", "950DT", 4153),
        ("pro", "950DT", 5945),
    ],
)  # fmt: skip
def test_bytes_per_token(model, device, per_token):
    more, less = (cache(2**power, model=model, device=device).total for power in (20, 19))
    assert (more - less) / 2**19 == pytest.approx(per_token, abs=0.5)


@pytest.mark.parametrize(
    ("device", "form", "entry", "index"),
    [
        ("910B3", None, 1024, 130), ("950DT", None, 640, 132), ("950PR", "c8-584", 584, 132),
        ("H20", None, 584, 132),
    ],
)  # fmt: skip
def test_bytes_of_a_row(device, form, entry, index):
    asked = question(device=device, cache=form)
    config = asked.shapes.config
    assert (asked.cache.entry_bytes(config), asked.cache.index_bytes(config)) == (entry, index)


@pytest.mark.parametrize(
    ("device", "block", "pages"),
    [
        ("910C", 128, (16_640, 131_072)), ("910C", 64, (8_320, 65_536)),
        ("910C", 32, (4_160, 32_768)), ("950DT", 128, (16_896, 81_920)),
        ("950DT", 64, (8_448, 40_960)), ("950DT", 32, (4_224, 20_480)),
    ],
)  # fmt: skip
def test_bytes_of_a_page(device, block, pages):
    """One page of index keys and one of the main cache, and states padded to the same."""
    asked = question(device=device, block_size=block)
    found = cache_of(asked.shapes, asked.cache, asked.pages, 4 * block, drafts=False)
    assert (found.paged["index"] / 21, found.paged["csa"] / 21) == pages
    per_state = -(-8 // asked.pages.csa_state) + 1
    assert found.paged["csa state"] == 21 * per_state * sum(pages)
    assert found.paged["hca state"] % pages[1] == 0
    assert found.paged["window"] == 43 * (128 // block + 1) * pages[1]


@pytest.mark.parametrize(
    ("block", "drafts", "unit"),
    [(128, 0, 16_384), (32, 0, 4096), (128, 1, 32_768), (32, 1, 8192), (64, 0, 8192)],
)
def test_unit_of_prefix_hits(block, drafts, unit):
    assert cache(block_size=block, draft_tokens=drafts).hit_unit == unit


def test_waste_of_a_short_request():
    short = cache(1000)
    paged = sum(short.paged[name] for name in COMPRESSED)
    rows = sum(short.rows[name] for name in COMPRESSED)
    assert (paged / 1e6, rows / 1e6) == pytest.approx((8.83, 6.20), abs=0.01)
    assert short.compressed_waste == pytest.approx(0.42, abs=0.005)


def test_no_waste_at_a_whole_number_of_pages():
    whole = cache(131072)
    assert sum(whole.paged[name] for name in COMPRESSED) == 815_071_232
    assert whole.compressed_waste == 0
    assert whole.waste > 0  # windows and states have a page more than they fill


def test_geometries_stand_for_all_chips():
    for chip in ("A2", "A3", "A5", "CUDA"):
        assert geometry(128, chip).csa_state == 8
    assert (geometry(128, "A3").hca_state, geometry(128, "A5").hca_state) == (32, 16)


COUNTS = (8, 16, 24, 32, 48, 64, 96, 128, 256)
SMALLEST = [
    ("flash", "w8a8", 61 * GIB, (8, 8, 8, 16), (8, 8, 8, 16)),
    ("flash", "w4a8", 61 * GIB, (8, 8, 8, 16), (8, 8, 8, 16)),
    ("pro", "w4a8", 61 * GIB, (48, 24, 24, 32), (96, 32, 32, 32)),
    ("pro", "w8a8", 61 * GIB, (96, 48, 48, 48), (256, 64, 64, 48)),
    ("flash", "w8a8", 30 * GIB, (24, 16, 16, 16), (48, 24, 24, 32)),
    ("flash", "w4a8", 30 * GIB, (16, 8, 8, 16), (24, 16, 16, 16)),
    ("pro", "w4a8", 30 * GIB, (None, 128, 96, 96), (None, None, None, 256)),
    ("flash", "mx", 94e9, (8, 8, 8, 16), (8, 8, 8, 16)),
    ("pro", "mx", 94e9, (24, 16, 16, 16), (24, 16, 16, 16)),
    ("pro", "mx", 141e9, (16, 8, 8, 16), (16, 16, 8, 16)),
    ("pro", "mx", 109e9, (16, 16, 16, 16), (16, 16, 16, 16)),
]
"""Section 3.3: fewest devices for tp 1, 4, 8, 16 at 128K and at 1M; memory alone, no operator."""


@pytest.mark.parametrize(("model", "precision", "visible", "at_128k", "at_1m"), SMALLEST)
def test_fewest_devices(model, precision, visible, at_128k, at_1m):
    device = "950DT" if precision == "mx" else "910C"
    for context, expected in ((2**17, at_128k), (2**20, at_1m)):
        asked = question(model=model, precision=precision, device=device, context=context)
        asked = asked.with_numbers([f"visible_gb={visible / 1e9}"])
        size, weights = (Judge.of(asked).cache.total,) * 2, tabled_weights(asked)

        def fits(tp, count, asked=asked, size=size, weights=weights):
            layout = Layout(tp, count // tp, count)
            return memory_of(layout, weights, asked.numbers, size, 1).held_per_group >= 1

        found = [
            next((n for n in COUNTS if n % tp == 0 and fits(tp, n)), None) for tp in (1, 4, 8, 16)
        ]
        assert found == list(expected), context


EXAMPLE = {"device": "910B3", "count": 8, "context": 131072}


@pytest.mark.parametrize(
    ("layout", "weights", "free", "requests"),
    [
        (Layout(8, 1, 8), 38.095, 14.255, 17), (Layout(1, 8, 8), 45.162, 7.188, 64),
        (Layout(2, 4, 8), 34.628 + 2.457 + 8.077 / 2, 11.226, 52),
        (Layout(4, 2, 8), 39.104, 13.245, 30),
    ],
)  # fmt: skip
def test_worked_example_of_a_fit(layout, weights, free, requests):
    """Section 6.1: Flash W8A8 on a node of 910B3."""
    memory = candidate(layout, **EXAMPLE).memory
    assert memory.budget / 1e9 == pytest.approx(58.948, rel=1e-4)
    assert memory.draft / 1e9 == pytest.approx(1.015, rel=0.01)
    assert (memory.comm / 1e9, memory.workspace / 1e9) == pytest.approx((2.147, 3.436), rel=1e-3)
    assert memory.weights / 1e9 == pytest.approx(weights, rel=0.01)
    assert memory.free / 1e9 == pytest.approx(free, rel=0.01)
    assert memory.requests == requests


def test_worked_example_of_a_fit_says_what_it_advises():
    found = planned(**EXAMPLE, batch=64, layout="tp=1,dp=8,ep=8")
    assert found.largest.layout == Layout(1, 8, 8)
    assert found.chosen.memory.verdict == TIGHT
    assert found.chosen.memory.head_room / 1e9 == pytest.approx(0.5, abs=0.05)
    small = planned(**{**EXAMPLE, "device": "910B4"}, precision="w8a8", batch=1)
    assert small.chosen.memory.verdict == NO
    assert "weights" in small.chosen.memory.breaks
    assert small.question.numbers["visible_gb"] * 1e9 < 277.025e9 / 8


def test_worked_example_of_pro_on_950dt():
    """Section 6.3: tp 1 needs the larger memory, tp 2 fits both."""
    options = {"model": "pro", **DT, "count": 16, "context": 8192, "batch": 64, "draft_tokens": 3}
    one, two = Layout(1, 16, 16), Layout(2, 8, 16)
    memory = candidate(one, **options).memory
    assert (memory.weights + memory.draft) / 1e9 == pytest.approx(82.1, rel=0.001)
    assert memory.verdict == NO
    assert candidate(one, **options, memory=144).memory.verdict == FITS
    shared = candidate(two, **options).memory
    assert (shared.weights + shared.draft) / 1e9 == pytest.approx(71.05, rel=0.001)
    assert shared.verdict != NO
    assert candidate(two, **options, memory=144).memory.verdict == FITS
    assert cache(8192, model="pro", **DT).total / 1e6 == pytest.approx(72.4, abs=0.05)


PUBLISHED = [
    ("flash", "w8a8", "910C", Layout(4, 4, 16), 2**20, 4),
    ("flash", "w8a8", "910C", Layout(4, 4, 16), 8192, 64),
    ("flash", "w8a8", "910B3", Layout(8, 1, 8), 133_000, 1),
    ("flash", "w8a8", "910C", Layout(1, 16, 16), 5000, 60 * 16),
    ("pro", "w4a8", "910C", Layout(16, 2, 32), 135_000, 2),
    ("pro", "w4a8", "910B3", Layout(8, 4, 32), 135_000, 4),
    ("pro", "w4a8", "910C", Layout(8, 4, 32), 2**20, 4),
    ("pro", "w4a8", "910C", Layout(2, 16, 32), 5000, 16),
    ("flash", "w8a8", "910C", Layout(1, 128, 128), 8192, 8192),
    ("flash", "mx", "950DT", Layout(1, 16, 16), 2**20, 64),
    ("pro", "w4a8", "910C", Layout(1, 64, 64), 8192, 64),
]
"""Section 5: layouts that are deployed."""


@pytest.mark.parametrize(("model", "precision", "device", "layout", "context", "batch"), PUBLISHED)
def test_deployed_layouts_fit(model, precision, device, layout, context, batch):
    found = candidate(
        layout, model=model, precision=precision, device=device, count=layout.devices,
        context=context, batch=batch,
    )  # fmt: skip
    assert not found.refused
    assert found.memory.verdict != NO, found.memory.breaks


def test_a_node_of_910b4_is_too_small_for_int8():
    for layout in (Layout(1, 8, 8), Layout(8, 1, 8)):
        options = {"device": "910B4", "count": 8, "context": 8192, "batch": 1}
        assert candidate(layout, **options, precision="w8a8").memory.verdict == NO
    assert candidate(Layout(8, 1, 8), **options, precision="w4a8").memory.verdict != NO


def test_requests_stop_at_captured_graphs():
    found = candidate(Layout(1, 16, 16), context=1024)
    assert found.memory.held_per_group > found.memory.requests_per_group == 256
    without = candidate(Layout(1, 16, 16), context=1024, graph=False)
    assert without.memory.requests_per_group == without.memory.held_per_group


def test_more_requests_than_captured_graphs_take():
    full, more = (candidate(Layout(1, 16, 16), context=1024, batch=n) for n in (4096, 4097))
    assert full.memory.verdict != NO
    assert more.memory.verdict == NO
    assert "captured graphs take 256" in more.memory.breaks
    eager = candidate(Layout(1, 16, 16), context=1024, batch=4097, graph=False)
    assert eager.memory.verdict != NO


@pytest.mark.parametrize("batch", [1, 16, 17, 500])
def test_head_room_is_what_is_left(batch):
    memory = candidate(Layout(1, 16, 16), batch=batch, context=131072).memory
    used = memory.weights + memory.draft + memory.comm + memory.workspace
    assert memory.per_group == -(-batch // 16)
    assert memory.head_room == pytest.approx(memory.budget - used - memory.per_group * memory.cache)
    assert (memory.verdict == NO) == (memory.head_room < 0)


def test_the_batch_that_keeps_the_head_room():
    memory = candidate(Layout(1, 16, 16), context=131072, batch=400).memory
    assert memory.verdict == TIGHT
    kept = memory.least_requests
    for batch, verdict in ((kept, FITS), (kept + 1, TIGHT)):
        options = {"context": 131072, "batch": batch}
        assert candidate(Layout(1, 16, 16), **options).memory.verdict == verdict


def test_what_the_exchange_needs_of_the_buffers():
    """512 tokens of Flash: 75 MB (docs/spec/planner.md 3.3); a device sends its share of a pass."""
    assert exchange_window(question(), 512) / 1e6 == pytest.approx(75, abs=0.6)
    for layout, told in (("tp=1", True), ("tp=2", False)):
        notes = planned(context=131072, layout=layout).notes
        assert any("HCCL_BUFFSIZE" in text for _, text in notes) == told


def test_one_device_needs_no_communication_buffers():
    assert candidate(Layout(1, 1, 1), count=1).memory.comm == 0
    assert candidate(Layout(1, 16, 16)).memory.comm > 0


def test_weights_are_those_of_the_precision():
    asked = question(model="pro", **DT, count=16)
    weights = weight_bytes(asked.shapes, asked.precision)
    assert weights.experts / 1e9 == pytest.approx(822.05, abs=0.01)
    assert weights.sharded / 1e9 == pytest.approx(22.065, abs=0.001)
    assert weights.replicated / 1e9 == pytest.approx(7.307, rel=0.01)
