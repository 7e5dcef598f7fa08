"""The charts of a plan: roofline, a step against batch and context, memory against context."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from dsv4_ascend.plan.charts import WIDTH, Bar, Chart, horizontal, legend, short, stacked, vertical
from dsv4_ascend.plan.memory import NO
from dsv4_ascend.plan.planner import Plan
from dsv4_ascend.plan.search import Judge
from dsv4_ascend.plan.times import Step, rate
from dsv4_ascend.plan.work import Work, works

CLASS_COLOURS = {
    "dense": "#4269d0", "index": "#97bbf5", "core": "#3ca951", "mHC": "#a463f2",
    "experts": "#ff725c", "exchange": "#efb118", "all-reduce": "#9c6b4e", "head": "#6cc5b0",
    "launch": "#9498a0", "draft": "#ff8ab7",
}  # fmt: skip
MEMORY_COLOURS = {
    "weights": "#4269d0", "draft block": "#97bbf5", "communication": "#efb118",
    "workspace": "#9498a0", "caches": "#ff725c",
}  # fmt: skip
_MOST_BARS = 11
_CONTEXTS = tuple(1024 * 4**power for power in range(6))


def figures(plan: Plan) -> list[tuple[str, str, str]]:
    """(title, what it shows, SVG with its legend) of every chart."""
    return [
        (
            "Roofline",
            "One device. Solid: what the device can do; dashed: what the preset reaches. "
            "A class left of the bend waits for memory, right of it for compute. "
            "Filled: decode, hollow: prefill.",
            roofline(plan),
        ),
        (
            "Decode step against batch",
            f"Operator time by class at {plan.question.context:,} tokens; "
            "faded where the caches do not fit.",
            by_batch(plan) + legend(_classes(plan)),
        ),
        (
            "Decode step against context",
            f"Operator time by class with {plan.question.batch:,} requests; "
            "faded where the caches do not fit.",
            by_context(plan) + legend(_classes(plan)),
        ),
        (
            "Memory against context",
            f"One device with {plan.chosen.memory.per_group:,} requests in its group.",
            memory(plan) + legend(MEMORY_COLOURS),
        ),
    ]


def _classes(plan: Plan) -> dict[str, str]:
    present = {one.name for one in plan.chosen.decode.classes if one.seconds}
    return {name: colour for name, colour in CLASS_COLOURS.items() if name in present}


def batches(plan: Plan) -> list[int]:
    """Requests of a group: powers of two up to twice what fits, at most a few."""
    memory = plan.chosen.memory
    last = max(memory.requests_per_group, memory.per_group, 1)
    powers = [2**power for power in range(last.bit_length() + 1)]
    return powers[-_MOST_BARS:]


def by_batch(plan: Plan) -> str:
    """Step time by class at each batch."""
    chosen, groups = plan.chosen, plan.chosen.layout.dp
    held = chosen.memory.requests_per_group
    bars = [
        Bar(f"{per_group * groups:,}", _parts(chosen.decode_at(per_group)), per_group > held)
        for per_group in batches(plan)
    ]
    label = f"decode step by class against requests, {chosen.layout}"
    return stacked(
        label, bars, CLASS_COLOURS, ("requests in flight on all devices", "ms", "ms"), {}
    )


def contexts(plan: Plan) -> list[int]:
    """Contexts of the bars: by fours, within what the model is made for, with the one asked for."""
    most = plan.question.shapes.config.max_position_embeddings
    return sorted({*(c for c in _CONTEXTS if c <= most), plan.question.context})


def by_context(plan: Plan) -> str:
    """Step time by class at each context."""
    chosen = plan.chosen
    bars = [
        Bar(_tokens(context), _parts(chosen.decode_at(chosen.memory.per_group, None, context)),
            _lacks(plan, context))
        for context in contexts(plan)
    ]  # fmt: skip
    label = f"decode step by class against context, {chosen.layout}"
    return stacked(label, bars, CLASS_COLOURS, ("tokens of a request", "ms", "ms"), {})


def _lacks(plan: Plan, context: int) -> bool:
    judge = Judge.of(replace(plan.question, context=context))
    return judge.candidate(plan.chosen.layout).memory.verdict == NO


def memory(plan: Plan) -> str:
    """Bytes of one device at each context."""
    bars = []
    for context in contexts(plan):
        judge = Judge.of(replace(plan.question, context=context))
        one = judge.candidate(plan.chosen.layout).memory
        sizes = (one.weights, one.draft, one.comm, one.workspace, one.per_group * one.cache)
        parts = dict(zip(MEMORY_COLOURS, (size / 1e9 for size in sizes), strict=True))
        bars.append(Bar(_tokens(context), parts, one.verdict == NO))
    chosen = plan.chosen.memory
    limits = {"budget": chosen.budget / 1e9, "visible": chosen.visible / 1e9}
    label = f"memory of a device against context, {plan.chosen.layout}"
    return stacked(label, bars, MEMORY_COLOURS, ("tokens of a request", "GB", "GB"), limits)


def _parts(step: Step) -> dict[str, float]:
    return {one.name: 1e3 * one.seconds for one in step.classes if one.seconds}


def _tokens(context: int) -> str:
    for size, letter in ((2**20, "M"), (2**10, "K")):
        if context % size == 0:
            return f"{context // size}{letter}"
    return f"{context:,}"


def roofline(plan: Plan) -> str:
    """Classes by FLOP per byte, below what the device and the preset allow."""
    question, low, peak = plan.question, plan.question.numbers, plan.question.roofline
    chart = Chart(f"roofline of one {question.device}")
    points = list(_points(plan))
    most = rate(question.precision.rate, peak) / 1e12
    least = min([0.5, *(y for _, _, y, _ in points)])
    x = horizontal(0.5, max([2e4, *(30 * x for _, x, _, _ in points)]), log=True)
    y = vertical(least / 3, 3 * most, log=True)
    chart.y_axis(y, "TFLOP/s")
    chart.x_axis(x, "FLOP per byte of memory")
    keys = dict.fromkeys((question.precision.rate, "bf16_tflops"))
    for numbers, style in ((peak, ""), (low, "; stroke-dasharray: 5 4")):
        bandwidth = numbers["hbm_gbps"] * numbers["eta_hbm"] / 1e3
        for key in keys:
            top = rate(key, numbers) / 1e12
            bend = min(max(top / bandwidth, x.low), x.high)
            start = max(x.low, y.low / bandwidth)
            line = [(start, start * bandwidth), (bend, top), (x.high, top)]
            chart.line([(x(a), y(b)) for a, b in line], f"stroke: var(--roof){style}")
            if not style:
                words = f"{key.partition('_')[0]} {short(top)}"
                chart.text(x(x.high) - 2, y(top) - 5, words, "end", "value")
    _draw_points(chart, [(name, x(a), y(b), hollow) for name, a, b, hollow in points])
    return chart.svg()


def _points(plan: Plan) -> Iterable[tuple[str, float, float, bool]]:
    """(class, FLOP per byte, TFLOP/s under the preset, whether of prefill)."""
    chosen = plan.chosen
    steps = {"decode": chosen.decode, "prefill": plan.prefill}
    for name, load in chosen.loads():
        step, hollow = steps[name], name == "prefill"
        for work in works(chosen.site(), load, plan.question.numbers):
            flops, seconds = sum(work.flops.values()), _busy(step, work)
            if flops and work.traffic and seconds:
                yield work.name, flops / work.traffic, flops / seconds / 1e12, hollow


def _busy(step: Step, work: Work) -> float:
    one = step.of(work.name)
    return max(one.compute, one.memory)


def _draw_points(chart: Chart, points: list[tuple[str, float, float, bool]]) -> None:
    """Circles, then their names where neither a circle nor another name is."""
    taken = [(x - 7, y - 7, x + 7, y + 7) for _, x, y, _ in points]
    for name, x, y, hollow in points:
        colour = CLASS_COLOURS[name]
        fill = "var(--page)" if hollow else colour
        chart.parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{fill}" stroke="{colour}" '
            f'stroke-width="2"><title>{"prefill" if hollow else "decode"}: {name}</title></circle>'
        )
    for name, x, y, _ in points:
        boxes = [_name_box(name, x + right, y + down) for right, down in _PLACES]
        free = (box for box in boxes if not any(_overlap(box, other) for other in taken))
        box = next(free, boxes[0])
        taken.append(box)
        left, top, right, bottom = box
        if left - x > _NEAR or top - y > _NEAR:
            end = (left - 2, (top + bottom) / 2) if left > x else ((left + right) / 2, top)
            chart.line([(x + 4, y + 4), end], "stroke: var(--soft); stroke-width: 0.7")
        chart.text(left, bottom - 3, name, "start")


_PLACES = tuple(
    place
    for far in (0, 14, 28, 42, 56, 70, 84, 98)
    for place in ((9 + far, 8 + far / 2), (-14, 14 + far), (9 + far, 14 + far))
)
"""Where a name may begin, from its point: right and below, where no roof is."""
_NEAR = 16
_GLYPH, _LINE = 7.4, 14
Box = tuple[float, float, float, float]


def _name_box(name: str, x: float, y: float) -> Box:
    left = min(x, WIDTH - 18 - _GLYPH * len(name))
    return left, y - _LINE / 2, left + _GLYPH * len(name) + 5, y + _LINE / 2


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
