"""Every layout judged, and the best of them by decode time and by requests at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from dsv4_ascend.plan.cache import Cache, cache_of
from dsv4_ascend.plan.formats import WeightBytes, weight_bytes
from dsv4_ascend.plan.layout import Layout, layouts, refusal
from dsv4_ascend.plan.memory import NO, Memory, memory_of
from dsv4_ascend.plan.question import MOST_REQUESTS, Question
from dsv4_ascend.plan.times import Step, step
from dsv4_ascend.plan.work import Load, Site, decode_load, prefill_load


@dataclass(frozen=True)
class Judge:
    """What a question comes to, whatever the layout."""

    question: Question
    weights: WeightBytes
    cache: Cache

    @classmethod
    def of(cls, question: Question) -> Judge:
        """Count weights and caches once."""
        cache = cache_of(
            question.shapes, question.cache, question.pages, question.context,
            bool(question.drafts),
        )  # fmt: skip
        return cls(question, weight_bytes(question.shapes, question.precision), cache)

    def candidate(self, layout: Layout) -> Candidate:
        """A layout, judged."""
        question = self.question
        numbers: dict[str, float] = dict(question.numbers)
        if not question.graph:
            numbers["captured_requests"] = MOST_REQUESTS
        sizes = self.cache.total, self.cache.total_paged
        memory = memory_of(layout, self.weights, numbers, sizes, question.batch)
        why_not = refusal(layout, question.shapes, question.cache, question.chip)
        return Candidate(question, layout, why_not, memory)

    def candidates(self) -> list[Candidate]:
        """All layouts of the search."""
        return [self.candidate(layout) for layout in layouts(self.question.count)]


@dataclass(frozen=True)
class Candidate:
    """A layout with what it holds and how long it takes. refused: why operators forbid it."""

    question: Question
    layout: Layout
    refused: str
    memory: Memory

    @property
    def feasible(self) -> bool:
        """Whether it runs and holds the requests that were asked for."""
        return not self.refused and self.memory.verdict != NO

    @cached_property
    def decode(self) -> Step:
        """A decode step at the batch that was asked for."""
        return self.decode_at(self.memory.per_group)

    def decode_at(
        self, per_group: int, numbers: Mapping[str, float] | None = None, context: int | None = None
    ) -> Step:
        """A decode step with `per_group` requests in each group."""
        question = self.question
        load = decode_load(
            question.shapes, context or question.context, per_group, 1 + question.drafts
        )
        used = question.numbers if numbers is None else numbers
        return step(self.site(), load, used, question.drafts)

    def prefill(self, numbers: Mapping[str, float] | None = None) -> Step:
        """The prefill of one prompt of the context's length in each group."""
        used = self.question.numbers if numbers is None else numbers
        chunk = int(used["prefill_chunk"])
        load = prefill_load(self.question.shapes, self.question.context, chunk)
        return step(self.site(), load, used)

    def loads(self) -> tuple[tuple[str, Load], tuple[str, Load]]:
        """What a group does in a decode step and in a prefill."""
        question = self.question
        rows = 1 + question.drafts
        decode = decode_load(question.shapes, question.context, self.memory.per_group, rows)
        chunk = int(question.numbers["prefill_chunk"])
        prefill = prefill_load(question.shapes, question.context, chunk)
        return ("decode", decode), ("prefill", prefill)

    def site(self) -> Site:
        """Where its operators run."""
        question = self.question
        fabric = int(question.numbers["fabric_devices"])
        return Site(question.shapes, question.precision, question.cache, self.layout, fabric)

    def tpot(self, decode: Step) -> float:
        """Seconds per token of a request."""
        return decode.seconds / (1 + self.question.accepted)

    def tokens_per_second(self, decode: Step, per_group: int) -> float:
        """Tokens per second of one device."""
        return per_group / self.layout.tp / self.tpot(decode)


def fastest(candidates: Sequence[Candidate]) -> Candidate | None:
    """The feasible layout with the shortest decode step; among equals the one that holds most."""
    return min(
        (one for one in candidates if one.feasible),
        key=lambda one: (one.decode.seconds, -one.memory.requests, one.layout),
        default=None,
    )


def largest(candidates: Sequence[Candidate]) -> Candidate | None:
    """The layout that holds most requests at once; among equals the fastest then."""
    able = [one for one in candidates if not one.refused and one.memory.requests]
    return min(
        able,
        key=lambda one: (
            -one.memory.requests,
            one.decode_at(one.memory.requests_per_group).seconds,
            one.layout,
        ),
        default=None,
    )


def nearest(candidates: Sequence[Candidate]) -> Candidate:
    """The layout that lacks least, where none is feasible."""
    able = [one for one in candidates if not one.refused] or list(candidates)
    return max(able, key=lambda one: (one.memory.head_room, one.layout))
