"""One question answered: the layouts, the chosen one's memory and times, and why."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dsv4_ascend.plan.advice import WhatIf, ways_to_fit, what_ifs
from dsv4_ascend.plan.cache import Cache
from dsv4_ascend.plan.formats import WeightBytes
from dsv4_ascend.plan.question import Question, variants
from dsv4_ascend.plan.search import Candidate, Judge, fastest, largest, nearest
from dsv4_ascend.plan.tables import DEVICES
from dsv4_ascend.plan.times import Step
from dsv4_backend.errors import ArgumentError

_BYTES_EXCHANGED = 3


@dataclass(frozen=True)
class Ratio:
    """FLOP per byte of the fabric beside what hides the exchange under the experts' products
    (planner.md 4.2): hidden where `found` <= `most`.
    """

    name: str
    found: float
    most: float

    @property
    def hidden(self) -> bool:
        """Whether a perfect overlap would hide the exchange."""
        return self.found <= self.most


@dataclass(frozen=True)
class Plan:
    """The answer. chosen: the layout that was asked for, or the fastest, or the one that lacks
    least; candidates: all, the fastest first, refused ones last; notes: with their rules.
    """

    question: Question
    weights: WeightBytes
    cache: Cache
    candidates: tuple[Candidate, ...]
    chosen: Candidate
    fastest: Candidate | None
    largest: Candidate | None
    decode_roofline: Step
    prefill: Step
    prefill_roofline: Step
    what_ifs: tuple[WhatIf, ...]
    ratios: tuple[Ratio, ...]
    ways: tuple[str, ...]
    notes: tuple[tuple[str, str], ...]

    @property
    def fits(self) -> bool:
        """Whether the chosen layout runs and holds what was asked for."""
        return self.chosen.feasible


def plan(question: Question) -> Plan:
    """Answer; ArgumentError when operators forbid every layout."""
    judge = Judge.of(question)
    candidates = judge.candidates()
    if question.layout and question.layout not in [one.layout for one in candidates]:
        candidates.append(judge.candidate(question.layout))
    asked = [one for one in candidates if one.layout == question.layout]
    if asked and asked[0].refused:
        raise ArgumentError(
            f"--layout: {question.layout}: {asked[0].refused}; {_instead(candidates)}"
        )
    if all(one.refused for one in candidates):
        reasons = "; ".join(dict.fromkeys(one.refused for one in candidates))
        raise ArgumentError(f"--count: no layout of {question.count} devices runs: {reasons}")
    quick, many = fastest(candidates), largest(candidates)
    chosen = asked[0] if asked else quick or nearest(candidates)
    roofline = question.roofline
    return Plan(
        question=question,
        weights=judge.weights,
        cache=judge.cache,
        candidates=tuple(sorted(candidates, key=_order)),
        chosen=chosen,
        fastest=quick,
        largest=many,
        decode_roofline=chosen.decode_at(chosen.memory.per_group, roofline),
        prefill=chosen.prefill(),
        prefill_roofline=chosen.prefill(roofline),
        what_ifs=tuple(what_ifs(chosen)),
        ratios=tuple(ratios(chosen)),
        ways=() if chosen.feasible else tuple(ways_to_fit(question)),
        notes=tuple(_notes(judge, chosen)),
    )


def _order(one: Candidate) -> tuple[bool, bool, float]:
    weight = one.decode.seconds if one.feasible else -one.memory.head_room
    return bool(one.refused), not one.feasible, weight


def _instead(candidates: list[Candidate]) -> str:
    usable = sorted((-one.layout.ep, one.layout) for one in candidates if not one.refused)
    names = " or ".join(str(layout) for _, layout in usable[:3])
    return f"expected {names}" if names else "no layout of these devices runs"


def ratios(candidate: Candidate) -> list[Ratio]:
    """Compute beside communication: at peak, as the preset reaches them, and at the FP4 rate."""
    question = candidate.question
    numbers = question.numbers
    most = 2.0 * question.shapes.config.moe_intermediate_size
    wide = candidate.layout.ep > numbers["fabric_devices"]
    link = numbers["far_gbps" if wide else "link_gbps"] * 1e9
    peak = numbers[question.precision.rate_of("experts")] * 1e12
    reached = numbers["eta_compute"] / numbers["eta_link"]
    found = [Ratio("at peak", peak / link, most), Ratio("preset", reached * peak / link, most)]
    if question.precision.bits["experts"] < 5 and "mxfp4_tflops" in numbers:
        found.append(Ratio("at the FP4 rate", numbers["mxfp4_tflops"] * 1e12 / link, most))
    return found


def rows_per_expert(question: Question) -> float:
    """Rows of an expert above which its product costs more than reading it (planner.md 4)."""
    numbers, precision = question.numbers, question.precision
    peak = numbers[precision.rate_of("experts")] * 1e12
    return peak * precision.bits["experts"] / 8 / (2 * numbers["hbm_gbps"] * 1e9)


def exchange_window(question: Question, tokens: float) -> float:
    """Bytes of HCCL_BUFFSIZE that `tokens` of a device need (planner.md 3.3, UNCONFIRMED)."""
    config = question.shapes.config
    return tokens * config.num_experts_per_tok * config.hidden_size * _BYTES_EXCHANGED * 2


def _notes(judge: Judge, chosen: Candidate) -> list[tuple[str, str]]:
    makers = {
        _variant_note: "head-room, requests",
        _far_note: "exchange, all-reduce",
        _window_note: "window",
        _hit_note: "hit",
        _engine_note: "requests",
        _batch_note: "asked",
        _doubt_note: "doubt",
    }
    found = [("asked", f"model: {note}") for note in judge.question.notes]
    for maker, rule in makers.items():
        found += [(rule, text) for text in maker(judge, chosen)]
    return found


def _variant_note(judge: Judge, chosen: Candidate) -> list[str]:
    """Verdicts with the memory that other sources give the device."""
    question = judge.question
    rows = variants(question.device)
    if question.numbers.of("visible_gb").confidence == "yours" or len(rows) == 1:
        return []
    found = []
    for row in rows:
        if row["size_gb"] != question.size_gb:
            changed = question.numbers.changed([f"visible_gb={row['visible_gb']}"])
            other = Judge.of(replace(question, numbers=changed)).candidate(chosen.layout)
            found.append(
                f"memory: sources disagree; planned with {question.size_gb:g} GB, "
                f"with {row['size_gb']:g} GB (--memory {row['size_gb']:g}) "
                f"it is {other.memory.verdict} with room for {other.memory.requests:,} requests"
            )
    return found


def _far_note(judge: Judge, chosen: Candidate) -> list[str]:
    """What crosses the network behind the fabric; its latency stands in no source."""
    fabric = judge.question.numbers["fabric_devices"]
    layout = chosen.layout
    crossing = [
        name for name, size in (("ep", layout.ep), ("tp", layout.tp)) if size > fabric
    ]  # fmt: skip
    if not crossing:
        return []
    return [
        f"{' and '.join(crossing)} of {layout} crosses the fabric of {fabric:,.0f} devices: its "
        "rate there is far_gbps, its latency is in no source; measure before you decide"
    ]


def _window_note(judge: Judge, chosen: Candidate) -> list[str]:
    question = judge.question
    if chosen.layout.ep == 1:
        return []
    chunk = min(question.numbers["prefill_chunk"], question.context)
    need = exchange_window(question, chunk / chosen.layout.tp) / 2**20
    have = question.numbers["comm_mib"]
    if need <= have:
        return []
    return [
        f"prefill of {chunk:,.0f} tokens a pass needs HCCL_BUFFSIZE {need:,.0f} MiB, {have:,.0f} "
        "are planned (the rule is unconfirmed): --set comm_mib=... or --set prefill_chunk=..."
    ]


def _hit_note(judge: Judge, chosen: Candidate) -> list[str]:
    unit = judge.cache.hit_unit
    if unit <= judge.question.context:
        return []
    return [
        f"no prompt of {judge.question.context:,} tokens ever hits the prefix cache: "
        f"its unit is {unit:,} tokens (a smaller --block-size makes it smaller)"
    ]


def _engine_note(judge: Judge, chosen: Candidate) -> list[str]:
    memory = chosen.memory
    if memory.held_per_group <= memory.captured:
        return []
    return [
        f"memory holds {memory.held_per_group:,} requests a group, captured graphs "
        f"{memory.captured} (--set captured_requests=...): the graphs are the limit"
    ]


def _batch_note(judge: Judge, chosen: Candidate) -> list[str]:
    batch, groups = judge.question.batch, chosen.layout.dp
    if batch % groups == 0:
        return []
    return [
        f"{batch} requests are not a multiple of {groups} groups: "
        f"the fullest has {chosen.memory.per_group}, and decides"
    ]


def _doubt_note(judge: Judge, chosen: Candidate) -> list[str]:
    """Numbers of the device that sources do not agree on."""
    numbers = judge.question.numbers
    used = set(DEVICES["devices"][judge.question.device]) & set(numbers)
    unused = {"mxfp4_tflops", "package_devices", "node_devices"}
    if (
        chosen.layout.ep <= numbers["fabric_devices"]
        and chosen.layout.tp <= numbers["fabric_devices"]
    ):
        unused.add("far_gbps")
    doubtful = [
        f"{key} {numbers[key]:g}" + (f" (or {one.others})" if one.others else " (assumed)")
        for key in sorted(used - unused)
        if (one := numbers.of(key)).confidence in ("conflict", "assumed")
    ]
    return [f"in doubt, try with --set: {', '.join(doubtful)}"] if doubtful else []
