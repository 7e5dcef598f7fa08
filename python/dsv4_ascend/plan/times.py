"""From work to time: roofline and preset, by class and by what bounds it (planner.md 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dsv4_ascend.plan.work import Load, Site, Work, works

BOUNDS = ("compute", "HBM", "link", "latency", "launch")
"""What a class can wait for."""
_TERA, _GIGA, _MICRO = 1e12, 1e9, 1e-6
_LAUNCHES = ("gap_us",)


@dataclass(frozen=True)
class ClassTime:
    """Seconds of one class. parts: by bound, they add up to the class; of compute and HBM only
    the longer counts, `compute` and `memory` keep both.
    """

    name: str
    parts: Mapping[str, float]
    compute: float = 0.0
    memory: float = 0.0

    @property
    def seconds(self) -> float:
        """The whole class."""
        return sum(self.parts.values())

    @property
    def bound(self) -> str:
        """The greatest part, or nothing where the class takes no time."""
        greatest = max(BOUNDS, key=lambda bound: self.parts.get(bound, 0.0))
        return greatest if self.parts.get(greatest, 0.0) > 0 else ""


@dataclass(frozen=True)
class Step:
    """A decode step or a prefill by class."""

    classes: tuple[ClassTime, ...]

    @property
    def seconds(self) -> float:
        """Operator time."""
        return sum(one.seconds for one in self.classes)

    def of(self, name: str) -> ClassTime:
        """A class by name; one that is not there takes no time."""
        return next((one for one in self.classes if one.name == name), ClassTime(name, {}))

    def parts(self) -> dict[str, float]:
        """Seconds by bound."""
        return {bound: sum(one.parts.get(bound, 0.0) for one in self.classes) for bound in BOUNDS}

    @property
    def bottleneck(self) -> ClassTime:
        """The class that takes longest."""
        return max(self.classes, key=lambda one: one.seconds)


def step(site: Site, load: Load, numbers: Mapping[str, float], drafts: int = 0) -> Step:
    """The time of a load under the efficiencies in `numbers`, with `drafts` passes of the MTP
    block behind it.
    """
    classes = [class_time(one, numbers) for one in works(site, load, numbers)]
    classes = _overlapped(classes, numbers["exchange_overlap"])
    if drafts:
        classes.append(_draft(classes, site.shapes.layers, drafts, numbers["draft_layer"]))
    return Step(tuple(classes))


def class_time(work: Work, numbers: Mapping[str, float]) -> ClassTime:
    """The time of one class: the longer of compute and memory, plus exchange, plus waits."""
    compute = sum(flops / rate(key, numbers) for key, flops in work.flops.items())
    memory = work.traffic / (numbers["hbm_gbps"] * _GIGA * numbers["eta_hbm"])
    link = numbers["eta_link"] * _GIGA
    moved = max(work.link / (numbers["link_gbps"] * link), work.far / (numbers["far_gbps"] * link))
    waits = {key: _MICRO * numbers[key] * count for key, count in work.waits.items()}
    parts = {
        "compute": compute if compute > memory else 0.0,
        "HBM": 0.0 if compute > memory else memory,
        "link": moved,
        "latency": sum(t for key, t in waits.items() if key not in _LAUNCHES),
        "launch": sum(t for key, t in waits.items() if key in _LAUNCHES),
    }
    return ClassTime(work.name, parts, compute, memory)


def rate(key: str, numbers: Mapping[str, float]) -> float:
    """FLOP/s that products of a kind reach."""
    share = numbers["hf32_share"] if key == "hf32" else 1.0
    peak = numbers["bf16_tflops"] if key == "hf32" else numbers[key]
    return peak * share * _TERA * numbers["eta_compute"]


def _overlapped(classes: Sequence[ClassTime], share: float) -> list[ClassTime]:
    """With a share of the exchange hidden under the experts, as far as they last."""
    experts = next(one for one in classes if one.name == "experts").seconds
    found = []
    for one in classes:
        if one.name == "exchange" and share:
            link = one.parts["link"]
            parts = {**one.parts, "link": link - share * min(link, experts)}
            found.append(ClassTime(one.name, parts, one.compute, one.memory))
        else:
            found.append(one)
    return found


def _draft(classes: Sequence[ClassTime], layers: int, drafts: int, share: float) -> ClassTime:
    """Passes of the MTP block, one after the other: a share of an average layer, and the head."""
    parts = dict.fromkeys(BOUNDS, 0.0)
    for one in classes:
        weight = drafts * (1.0 if one.name == "head" else share / layers)
        for bound, seconds in one.parts.items():
            parts[bound] += weight * seconds
    return ClassTime("draft", parts)
