"""What a decode step and a prefill have to do, by class of operator (planner.md 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dsv4_ascend.plan.formats import CacheFormat, Precision
from dsv4_ascend.plan.layout import Layout
from dsv4_ascend.plan.shapes import DENSE, Shapes

_MULTIPLY_ADD = 2
_BF16, _FP32 = 2, 4
_EXCHANGED = 3
"""Bytes of a channel that the experts exchange: one there (8 bit), two back (bf16)."""


@dataclass(frozen=True)
class Load:
    """Rows of one group, and what of the caches they look at; sums over rows and requests.

    passes: how often weights are read; head_rows: rows whose logits are wanted; attended: keys by
    kind of layer; gathered: cache rows read by kind; scored: index scores; scored_rows: index keys
    read. Per layer of the kind.
    """

    rows: int
    passes: int
    head_rows: int
    attended: Mapping[str, float]
    gathered: Mapping[str, float]
    scored: float
    scored_rows: float


@dataclass(frozen=True)
class Work:
    """One class on one device. flops: by key of the rate; link, far: bytes over the fabric and
    behind it; waits: by key of a latency in us, how many.
    """

    name: str
    flops: Mapping[str, float] = field(default_factory=dict)
    traffic: float = 0.0
    link: float = 0.0
    far: float = 0.0
    waits: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Site:
    """What all classes need to know: model, formats, layout, and how far the fabric reaches."""

    shapes: Shapes
    precision: Precision
    cache: CacheFormat
    layout: Layout
    fabric: int


def decode_load(shapes: Shapes, context: int, requests: int, rows_each: int) -> Load:
    """`requests` of a group at `context` tokens, `rows_each` = 1 + drafts rows of each."""
    config = shapes.config
    rows = requests * rows_each
    window = min(config.sliding_window, context)
    seen = {kind: _entries(shapes, kind, context) for kind in ("swa", "csa", "hca")}
    chosen = {**seen, "csa": min(config.index_topk, seen["csa"])}
    near = requests * (config.sliding_window + rows_each)
    return Load(
        rows=rows,
        passes=1,
        head_rows=rows,
        attended={kind: float(rows * (window + chosen[kind])) for kind in chosen},
        gathered={
            "swa": near,
            "csa": near + rows * chosen["csa"],  # every row gathers its own
            "hca": near + requests * chosen["hca"],
        },
        scored=rows * seen["csa"],
        scored_rows=requests * seen["csa"],
    )


def prefill_load(shapes: Shapes, tokens: int, chunk: int) -> Load:
    """A prompt of `tokens` in passes of `chunk`, one prompt in each group."""
    config = shapes.config
    passes = -(-tokens // chunk)
    ends = [min((i + 1) * chunk, tokens) for i in range(passes)]
    csa, hca = (shapes_ratio(shapes, kind) for kind in ("csa", "hca"))
    window = capped_sum(tokens, 1, config.sliding_window)
    chosen = capped_sum(tokens, csa, config.index_topk)
    near = tokens + passes * config.sliding_window
    return Load(
        rows=tokens,
        passes=passes,
        head_rows=1,
        attended={
            "swa": window,
            "csa": window + chosen,
            "hca": window + capped_sum(tokens, hca, tokens),
        },
        gathered={
            "swa": near,
            "csa": near + chosen,
            "hca": near + float(sum(end // hca for end in ends)),
        },
        scored=capped_sum(tokens, csa, tokens),
        scored_rows=float(sum(end // csa for end in ends)),
    )


def capped_sum(tokens: int, ratio: int, most: int) -> float:
    """Sum over t = 1..tokens of min(most, t // ratio)."""
    below = min(tokens, most * ratio - 1)
    whole = below // ratio
    rising = ratio * whole * (whole - 1) // 2 + whole * (below - whole * ratio + 1)
    return float(rising + most * (tokens - below))


def shapes_ratio(shapes: Shapes, kind: str) -> int:
    """Compression ratio of the layers of a kind; where there are none, one that sees nothing."""
    config = shapes.config
    return next((config.ratio(i) for i in range(shapes.layers) if config.kind(i) == kind), 2**31)


def _entries(shapes: Shapes, kind: str, context: int) -> int:
    return 0 if kind == "swa" else context // shapes_ratio(shapes, kind)


def works(site: Site, load: Load, numbers: Mapping[str, float]) -> list[Work]:
    """The classes of one pass or step on one device, in the order of the table."""
    makers = (_dense, _index, _core, _mhc, _experts, _exchange, _allreduce, _head, _launch)
    return [maker(site, load, numbers) for maker in makers]


def _dense(site: Site, load: Load, numbers: Mapping[str, float]) -> Work:
    flops: dict[str, float] = {}
    traffic = 0.0
    divided = ("q_b", "o_a", "o_b", "index_q", "index_w")
    for name in DENSE:
        count = site.shapes.main[name] / (site.layout.tp if name in divided else 1)
        rate = site.precision.rate_of(name)
        flops[rate] = flops.get(rate, 0.0) + _MULTIPLY_ADD * load.rows * count
        traffic += load.passes * count * site.precision.bits[name] / 8
    return Work("dense", flops, traffic)


def _index(site: Site, load: Load, numbers: Mapping[str, float]) -> Work:
    shapes, config = site.shapes, site.shapes.config
    per_score = _MULTIPLY_ADD * config.index_n_heads * config.index_head_dim
    flops = shapes.csa * per_score * load.scored / site.layout.tp
    traffic = shapes.csa * load.scored_rows * site.cache.index_bytes(config)
    return Work("index", {site.cache.rate: flops}, traffic)


def _core(site: Site, load: Load, numbers: Mapping[str, float]) -> Work:
    shapes, config = site.shapes, site.shapes.config
    layers = {"swa": shapes.swa, "csa": shapes.csa, "hca": shapes.hca}
    heads = config.num_attention_heads / site.layout.tp
    per_key = 2 * _MULTIPLY_ADD * config.head_dim * heads  # q k and p v
    flops = sum(count * per_key * load.attended[kind] for kind, count in layers.items())
    rows = sum(count * load.gathered[kind] for kind, count in layers.items())
    return Work("core", {"bf16_tflops": flops}, rows * site.cache.entry_bytes(config))


def _mhc(site: Site, load: Load, numbers: Mapping[str, float]) -> Work:
    """Two mixes per layer; the streams cross memory seven times."""
    shapes, config = site.shapes, site.shapes.config
    n, d = config.hc_mult, config.hidden_size
    mixed = 2 * (2 + n) * n * n * d
    traffic = 7 * n * d * _BF16 * load.rows + mixed * _FP32 * load.passes
    flops = shapes.layers * _MULTIPLY_ADD * mixed * load.rows
    return Work("mHC", {"hf32": flops}, shapes.layers * traffic)


def _experts(site: Site, load: Load, numbers: Mapping[str, float]) -> Work:
    shapes, config, layout = site.shapes, site.shapes.config, site.layout
    routed, chosen = config.n_routed_experts, config.num_experts_per_tok
    values = 3 * config.hidden_size * config.moe_intermediate_size
    together = load.rows * layout.dp * layout.ep / layout.devices
    flops = shapes.layers * _MULTIPLY_ADD * values * chosen * together / layout.ep
    read = touched(together / load.passes, routed, chosen) * numbers["touched_share"]
    size = shapes.layers * routed / layout.ep * values * site.precision.bits["experts"] / 8
    rate = site.precision.rate_of("experts")
    return Work("experts", {rate: flops}, load.passes * read * size)


def touched(rows: float, experts: int, chosen: int) -> float:
    """The share of experts that `rows` rows reach under uniform routing."""
    missed: float = (1.0 - chosen / experts) ** rows
    return 1.0 - missed


def _exchange(site: Site, load: Load, numbers: Mapping[str, float]) -> Work:
    """Dispatch and combine; what leaves the fabric goes at the same time, at its own rate."""
    config, layout, fabric = site.shapes.config, site.layout, site.fabric
    if layout.ep == 1:
        return Work("exchange")
    own = load.rows * layout.dp / layout.devices
    size = site.shapes.layers * own * config.num_experts_per_tok * config.hidden_size * _EXCHANGED
    near = min(layout.ep, fabric)
    return Work(
        "exchange",
        link=size * (near - 1) / layout.ep,
        far=size * (layout.ep - near) / layout.ep,
        waits={"exchange_us": 2 * site.shapes.layers * load.passes},
    )


def _allreduce(site: Site, load: Load, numbers: Mapping[str, float]) -> Work:
    tp, layers = site.layout.tp, site.shapes.layers
    if tp == 1:
        return Work("all-reduce")
    size = layers * 2 * (tp - 1) / tp * load.rows * site.shapes.config.hidden_size * _BF16
    inside = tp <= site.fabric
    return Work(
        "all-reduce",
        link=size if inside else 0.0,
        far=0.0 if inside else size,
        waits={"allreduce_us": 2 * layers * load.passes},
    )


def head_tp(layout: Layout, numbers: Mapping[str, float]) -> float:
    """Devices that share the LM head's product: the group, or as many as deployments use."""
    return max(layout.tp, min(numbers["head_tp"], layout.devices))


def _head(site: Site, load: Load, numbers: Mapping[str, float]) -> Work:
    size = site.shapes.main["head"] / head_tp(site.layout, numbers)
    bits = site.precision.bits["head"]
    return Work("head", {"bf16_tflops": _MULTIPLY_ADD * load.head_rows * size}, size * bits / 8)


def _launch(site: Site, load: Load, numbers: Mapping[str, float]) -> Work:
    launches = site.shapes.layers * numbers["kernels"] * load.passes
    return Work("launch", waits={"gap_us": launches})
