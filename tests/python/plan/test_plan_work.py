"""The work of every class against a second formula, layer by layer and token by token, over
layouts with tensor parallelism, small expert groups and a fabric that ends
(docs/spec/planner.md 4).
"""

import functools
import math

import pytest
from planned import candidate, question

from dsv4_ascend.checkpoint.layout import layout as tensors
from dsv4_ascend.plan.layout import Layout
from dsv4_ascend.plan.work import decode_load, head_tp, prefill_load, works

LAYOUTS = [
    (Layout(1, 16, 16), {}), (Layout(8, 2, 16), {}), (Layout(2, 8, 4), {}), (Layout(4, 4, 1), {}),
    (Layout(1, 1, 1), {"count": 1}), (Layout(8, 4, 32), {"device": "910B3", "count": 32}),
    (Layout(16, 2, 32), {"device": "910B3", "count": 32, "model": "pro", "precision": "w4a8"}),
    (Layout(2, 8, 16), {"device": "950DT", "model": "pro", "memory": 144}),
]  # fmt: skip
SPLIT = ("wq_b", "wo_a", "wo_b", "indexer.weights_proj")
EIGHT_BITS = {
    "w8a8": ("attn.wq_b", "wo_b", "indexer.wq_b", "shared_experts"),
    "w4a8": ("attn.wq_b", "wo_b", "indexer.wq_b", "shared_experts"),
    "mx": ("wq_a", "wq_b", "attn.wkv", "wo_a", "wo_b", "shared_experts"),
}
DENSE = (".attn.w", "compressor.wkv", "compressor.wgate", "indexer.w", "gate.weight", "shared")


def read(asked, kind, position):
    """Window keys and compressed entries of a token in a layer, and those it attends to."""
    config = asked.shapes.config
    ratio = {"swa": 2**40, "csa": 4, "hca": 128}[kind]
    entries = position // ratio
    return (
        min(128, position),
        entries,
        min(config.index_topk, entries) if kind == "csa" else entries,
    )


@functools.cache
def dense_sizes(config):
    """Parameters of the tensors that every row is multiplied with."""
    return {
        name: math.prod(entry.shape)
        for name, entry in tensors(config).items()
        if any(part in name for part in DENSE) and "norm" not in name and name[:3] != "mtp"
    }


def dense(asked, layout, rows, passes):
    """FLOP by rate and bytes of every dense tensor."""
    eight = asked.precision.rate
    flops, traffic = {"bf16_tflops": 0.0, eight: 0.0}, 0.0
    bits = {"mx": 8.25}.get(asked.precision.name, 8)
    for name, size in dense_sizes(asked.shapes.config).items():
        count = size / (layout.tp if any(p in name for p in SPLIT) else 1)
        small = any(part in name for part in EIGHT_BITS[asked.precision.name])
        flops[eight if small else "bf16_tflops"] += 2 * rows * count
        traffic += passes * count * (bits if small else 16) / 8
    return flops, traffic


def compare(found, flops=None, traffic=0.0, link=0.0, far=0.0, waits=None):
    for rate, count in (flops or {}).items():
        assert found.flops.get(rate, 0.0) == pytest.approx(count, rel=1e-9), (found.name, rate)
    assert sum(found.flops.values()) == pytest.approx(sum((flops or {}).values()), rel=1e-9)
    moved = (found.traffic, found.link, found.far)
    assert moved == pytest.approx((traffic, link, far), rel=1e-9), found.name
    assert {key: n for key, n in found.waits.items() if n} == (waits or {}), found.name


def check(asked, layout, found, tokens, chunks, groups, head_rows):
    """tokens: positions of a group's rows, with the request and the pass of each."""
    config, t = asked.shapes.config, layout.tp
    count, passes = asked.count, len(chunks)
    rows, d, layers = len(tokens), config.hidden_size, config.num_hidden_layers
    entry, index = asked.cache.entry_bytes(config), config.index_head_dim
    index += {"c16": 2, "c8-640": 4}[asked.cache.name]
    kinds = config.layer_kinds[:layers]
    by_name = {one.name: one for one in found}
    compare(by_name["dense"], *dense(asked, layout, rows, passes))
    scores = core = 0.0
    core_rows = index_rows = 0
    for kind in kinds:
        for position in tokens:
            near, entries, attended = read(asked, kind, position)
            scores += 2 * 64 * 128 * entries * (kind == "csa")
            core += 4 * 512 * config.num_attention_heads / t * (near + attended)
            core_rows += attended * (kind == "csa")
        for end, own, requests in chunks:
            core_rows += requests * (128 + own)
            entries = read(asked, kind, end)[1]
            core_rows += requests * entries * (kind == "hca")
            index_rows += requests * entries * (kind == "csa")
    compare(by_name["index"], {asked.cache.rate: scores / t}, index_rows * index)
    compare(by_name["core"], {"bf16_tflops": core}, core_rows * entry)
    mixed = 2 * 24 * 4 * d
    streams = layers * (56 * d * rows + mixed * 4 * passes)
    compare(by_name["mHC"], {"hf32": layers * 2 * mixed * rows}, streams)
    m, k, routed = config.moe_intermediate_size, config.num_experts_per_tok, config.n_routed_experts
    in_group = rows * groups / (count / layout.ep)
    missed = (1 - k / routed) ** (in_group / passes)
    stored = {"w8a8": 1, "w4a8": 0.5, "mx": 4.25 / 8}[asked.precision.name]
    compare(
        by_name["experts"],
        {asked.precision.rate: layers * 6 * d * m * k * in_group / layout.ep},
        passes * layers * routed / layout.ep * (1 - missed) * 3 * d * m * stored,
    )
    sent = layers * rows * groups / count * k * d * 3
    fabric = {"910B3": 8}.get(asked.device, 768)
    inside = min(fabric, layout.ep)
    if layout.ep == 1:
        compare(by_name["exchange"])
    else:
        here, there = (inside - 1) / layout.ep, (layout.ep - inside) / layout.ep
        waits = {"exchange_us": 2 * layers * passes}
        compare(by_name["exchange"], None, 0.0, sent * here, sent * there, waits)
    reduced = layers * 2 * (t - 1) / t * rows * d * 2
    crossing = t > fabric
    waits = {"allreduce_us": 2 * layers * passes} if t > 1 else {}
    compare(by_name["all-reduce"], None, 0.0, reduced * (not crossing), reduced * crossing, waits)
    share = max(t, min(4, count))
    assert head_tp(layout, asked.numbers) == share
    values = config.vocab_size * d / share
    compare(by_name["head"], {"bf16_tflops": 2 * head_rows * values}, values * 2)
    compare(by_name["launch"], waits={"gap_us": layers * 60 * passes})


@pytest.mark.parametrize(("layout", "options"), LAYOUTS, ids=[str(one) for one, _ in LAYOUTS])
@pytest.mark.parametrize("context", [100, 5000])
def test_a_decode_step(layout, options, context):
    asked = question(**options)
    one, requests, rows_each = candidate(layout, **options), 3, 2
    load = decode_load(asked.shapes, context, requests, rows_each)
    found = works(one.site(), load, asked.numbers)
    tokens = [context] * (requests * rows_each)
    chunks = [(context, rows_each, requests)]
    check(asked, layout, found, tokens, chunks, layout.dp, len(tokens))


@pytest.mark.parametrize(("layout", "options"), LAYOUTS, ids=[str(one) for one, _ in LAYOUTS])
@pytest.mark.parametrize(("length", "chunk"), [(300, 128), (2500, 1024), (64, 128)])
def test_a_prefill(layout, options, length, chunk):
    asked = question(**options)
    one = candidate(layout, **options)
    found = works(one.site(), prefill_load(asked.shapes, length, chunk), asked.numbers)
    starts = range(0, length, chunk)
    chunks = [(min(start + chunk, length), min(chunk, length - start), 1) for start in starts]
    check(asked, layout, found, range(1, length + 1), chunks, layout.dp, 1)
