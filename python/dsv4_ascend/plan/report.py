"""A plan as tables of text: every column or row names the rule behind its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsv4_ascend.plan.memory import TIGHT
from dsv4_ascend.plan.planner import Plan, rows_per_expert
from dsv4_ascend.plan.reasons import why_fastest, why_largest
from dsv4_ascend.plan.search import Candidate
from dsv4_ascend.plan.times import Step
from dsv4_ascend.plan.work import head_tp

ENGINE = (
    "operator time, not served throughput: an engine's scheduler, and prefill beside decode, "
    "can cost several times as much"
)


@dataclass(frozen=True)
class Row:
    """Cells of a table; rule: of all of them, where the columns do not say."""

    cells: tuple[str, ...]
    rule: str = ""


@dataclass(frozen=True)
class Note:
    """A line of text with the rules of its numbers."""

    text: str
    rule: str


@dataclass(frozen=True)
class Table:
    """rules: one per column, of `RULES`, several with commas; empty leaves it to the row.
    notes: lines below.
    """

    title: str
    columns: tuple[str, ...]
    rules: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[Note, ...] = ()


def tables(plan: Plan) -> list[Table]:
    """All tables, in the order of the terminal."""
    found = [layout_table(plan), memory_table(plan), cache_table(plan)]
    return [*found, step_table(plan), change_table(plan)] if plan.fits else found


def headline(plan: Plan) -> list[Note]:
    """The answer first: what was asked, does it fit, and what it gives."""
    question, chosen, memory = plan.question, plan.chosen, plan.chosen.memory
    numbers = question.numbers
    packages = question.count / numbers["package_devices"]
    system = f"{question.count} x {question.device}"
    if numbers["package_devices"] > 1:
        system += f" ({packages:g} packages)"
    asked = Note(
        f"{question.model}, {question.precision.name} on {system}, {question.size_gb:g} GB each: "
        f"{question.context:,} tokens, {counted(question.batch, 'request')} in flight, "
        f"{counted(question.drafts, 'draft token')}",
        "asked",
    )
    if not plan.fits:
        verdict = Note(f"NO: {memory.breaks} with {chosen.layout}", "head-room, budget")
        ways = [Note(f"it fits with {words}", "head-room") for words in plan.ways]
        return [asked, verdict, *ways]
    decode = chosen.decode
    rate = chosen.tokens_per_second(decode, memory.per_group)
    whole = numbers["package_devices"]
    step = f"{ms(decode.seconds)} ms (roofline {ms(plan.decode_roofline.seconds)})"
    if question.preset == "roofline":
        step = f"{ms(decode.seconds)} ms at best (no preset for {question.device}: a lower bound)"
    package = f" ({whole * rate:,.0f} a package)" if whole > 1 else ""
    return [
        asked,
        Note(verdict_line(plan), "head-room"),
        Note(
            f"{chosen.layout}: decode step {step}, {ms(chosen.tpot(decode))} ms per token, "
            f"{rate:,.0f} tokens/s a device{package}; a prompt of {question.context:,} tokens "
            f"in {ms(plan.prefill.seconds)} ms; at most {memory.requests:,} requests at once",
            "step, tpot, tokens, prefill, requests",
        ),
        Note(bottleneck(decode), "share"),
    ]


def verdict_line(plan: Plan) -> str:
    """FITS, or TIGHT with how little is left and what would leave more."""
    memory = plan.chosen.memory
    if memory.verdict != TIGHT:
        return f"{memory.verdict}: {gb(memory.head_room)} GB of head-room a device"
    more = (
        f"{counted(memory.least_requests, 'request')} would keep it"
        if memory.least_requests
        else "no batch keeps it in this layout"
    )
    return (
        f"{TIGHT}: {gb(memory.head_room)} GB of head-room a device, under the "
        f"{gb(memory.least_free)} GB below which prefill was seen to slow down; {more}"
    )


def counted(count: int, thing: str) -> str:
    """`1 request`, `1,024 requests`, `no requests`."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}" if count else f"no {thing}s"


def bottleneck(decode: Step) -> str:
    """Which class takes longest and what bounds the step, in one line."""
    worst = decode.bottleneck
    parts = decode.parts()
    shares = ", ".join(
        f"{bound} {part / decode.seconds:.0%}"
        for bound, part in sorted(parts.items(), key=lambda item: -item[1])
        if part / decode.seconds >= 0.005
    )
    share = worst.seconds / decode.seconds
    why = "" if worst.bound == worst.name else f"{worst.bound}, "
    return f"bottleneck: {worst.name} ({why}{share:.0%} of the step); waiting for {shares}"


def layout_table(plan: Plan) -> Table:
    """The best layout of each tensor-parallel degree, and what forbids the others."""
    shown: list[Candidate] = []
    for one in plan.candidates:
        marked = one.layout in _marked(plan)
        if marked or (not one.refused and one.layout.tp not in {s.layout.tp for s in shown}):
            shown.append(one)
    refused: dict[str, list[str]] = {}
    for one in plan.candidates:
        degree = str(one.layout.tp)
        if one.refused and one.layout.tp not in {s.layout.tp for s in shown}:
            degrees = refused.setdefault(one.refused, [])
            degrees += [degree] * (degree not in degrees)
    return Table(
        "layouts: taken by weights, left for caches, requests at once, operator time",
        (
            "layout", "", "taken GB", "left GB", "requests",
            "step ms", "ms a token", "tok/s a device", "best",
        ),
        (
            "asked", "head-room", "weights, draft", "free", "requests", "step", "tpot", "tokens",
            "asked",
        ),
        tuple(_layout_row(plan, one) for one in shown),
        (
            *(Note(words, "step") for words in why_fastest(plan)),
            *(Note(words, "requests, step, tpot, tokens") for words in why_largest(plan)),
            *(
                Note(f"no tp {', '.join(sorted(degrees, key=int))}: {reason}", "limits")
                for reason, degrees in refused.items()
            ),
        ),
    )  # fmt: skip


def _marked(plan: Plan) -> list[object]:
    return [one.layout for one in (plan.chosen, plan.fastest, plan.largest) if one is not None]


def _layout_row(plan: Plan, one: Candidate) -> Row:
    memory, decode = one.memory, one.decode
    marks = [
        words
        for words, best in (("time", plan.fastest), ("room", plan.largest))
        if best is not None and best.layout == one.layout
    ]
    if not one.feasible:
        times = ("-", "-", "-")
    else:
        rate = one.tokens_per_second(decode, memory.per_group)
        times = (ms(decode.seconds), ms(one.tpot(decode)), f"{rate:,.0f}")
    taken = memory.weights + memory.draft
    return Row((
        str(one.layout), memory.verdict, gb(taken), gb(memory.free), f"{memory.requests:,}", *times,
        ", ".join(marks),
    ))  # fmt: skip


def memory_table(plan: Plan) -> Table:
    """One device of the chosen layout."""
    memory = plan.chosen.memory
    pages = f", in pages {memory.held_in_pages:,}" if memory.requests else ""
    caches = memory.per_group * memory.cache
    lines = (
        ("budget", memory.budget, "budget"),
        ("weights", memory.weights, "weights"),
        ("draft block", memory.draft, "draft"),
        ("communication buffers", memory.comm, "comm"),
        ("workspace", memory.workspace, "workspace"),
        (f"caches of {memory.per_group:,} requests", caches, "cache"),
        ("head-room", memory.head_room, "head-room"),
    )
    return Table(
        f"memory of one device, {plan.chosen.layout}",
        ("", "GB"),
        ("asked", ""),
        tuple(Row((name, gb(size)), rule) for name, size, rule in lines),
        (
            Note(
                f"at once: {memory.groups} x {memory.requests_per_group:,} = "
                f"{counted(memory.requests, 'request')}{pages}",
                "requests, pages",
            ),
        ),
    )


def cache_table(plan: Plan) -> Table:
    """One request by group."""
    cache = plan.cache
    rows = [
        Row((name, mb(size), mb(cache.paged[name])))
        for name, size in cache.rows.items()
        if size or cache.paged[name]
    ]
    rows.append(Row(("one request", mb(cache.total), mb(cache.total_paged))))
    unit = cache.hit_unit
    return Table(
        f"cache of one request, {plan.question.cache.name}",
        ("group", "rows MB", f"pages MB (block {plan.question.pages.block})"),
        ("asked", "cache", "pages"),
        tuple(rows),
        (
            Note(
                f"pages waste {cache.waste:.1%}, {cache.compressed_waste:.1%} of csa, index, hca",
                "waste",
            ),
            Note(f"a shared prefix is found in units of {unit:,} tokens", "hit"),
        ),
    )


def step_table(plan: Plan) -> Table:
    """Decode step and prefill of the chosen layout by class."""
    decode, prefill = plan.chosen.decode, plan.prefill
    rows = []
    for one in decode.classes:
        first = plan.prefill.of(one.name)
        if not one.seconds and not first.seconds:
            continue
        low, low_first = plan.decode_roofline.of(one.name), plan.prefill_roofline.of(one.name)
        name = f"head (tp {head_tp(plan.chosen.layout, plan.question.numbers):g})"
        rows.append(
            Row(
                (
                    name if one.name == "head" else one.name,
                    ms(low.seconds), ms(one.seconds), f"{one.seconds / decode.seconds:.0%}",
                    one.bound, ms(low_first.seconds), ms(first.seconds), first.bound,
                ),
                "draft time" if one.name == "draft" else one.name,
            )
        )  # fmt: skip
    rows.append(
        Row(
            (
                "all", ms(plan.decode_roofline.seconds), ms(decode.seconds), "100%",
                "", ms(plan.prefill_roofline.seconds), ms(prefill.seconds), "",
            ),
            "step",
        )
    )  # fmt: skip
    return Table(
        f"operator time: decode step, and prefill of {counted(plan.question.context, 'token')}; "
        f"{plan.chosen.layout}",
        (
            "class", "decode roofline ms", "decode preset ms", "share", "bound",
            "prefill roofline ms", "prefill preset ms", "bound",
        ),
        ("asked", "", "", "share", "asked", "prefill", "prefill", "asked"),
        tuple(rows),
        tuple(_step_notes(plan)),
    )  # fmt: skip


def _step_notes(plan: Plan) -> Sequence[Note]:
    question, chosen = plan.question, plan.chosen
    tokens = question.context / plan.prefill.seconds / chosen.layout.tp
    rows = rows_per_expert(question)
    config = question.shapes.config
    reached = rows * config.n_routed_experts / config.num_experts_per_tok
    found = "; ".join(
        f"{one.name} {one.found:,.0f} ({'hidden' if one.hidden else 'exposed'})"
        for one in plan.ratios
    )
    return (
        Note(
            f"prefill: {tokens:,.0f} tokens/s a device, one prompt in each group; "
            "no published prefill of V4 to compare it with",
            "prefill",
        ),
        Note(
            f"compute / communication: the exchange hides under the experts up to "
            f"{plan.ratios[0].most:,.0f} FLOP per byte; {found}",
            "ratio",
        ),
        Note(
            f"experts are read, not computed, below {rows:,.0f} rows each "
            f"({reached:,.0f} rows a step): until then more requests cost little",
            "rows",
        ),
        Note(f"preset {question.preset}: {question.preset_note}", "preset"),
        Note(ENGINE, "preset"),
    )


def change_table(plan: Plan) -> Table:
    """What would change the decode step."""
    before = plan.chosen.decode.seconds
    rows = tuple(
        Row((one.name, one.option, ms(one.step.seconds), change(one.step.seconds / before)))
        for one in sorted(plan.what_ifs, key=lambda one: one.step.seconds)
    )
    return Table(
        "what would change the decode step",
        ("change", "option", "step ms", ""),
        ("asked", "asked", "what-if", "what-if"),
        rows,
    )


def change(ratio: float) -> str:
    """A ratio as what it adds, in percent."""
    return f"{ratio - 1:+.0%}" if abs(ratio - 1) >= 0.005 else "0%"


def gb(size: float) -> str:
    """Bytes as GB with two digits."""
    return f"{size / 1e9:.2f}"


def mb(size: float) -> str:
    """Bytes as MB; small ones with more digits."""
    return f"{size / 1e6:,.1f}" if size >= 1e5 else f"{size / 1e6:.4f}"


def ms(seconds: float) -> str:
    """Seconds as ms; more digits the fewer there are."""
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
