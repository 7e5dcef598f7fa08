"""Layouts of devices, and what forbids one before memory does."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from dsv4_ascend.plan.formats import CacheFormat, caches_that_take
from dsv4_ascend.plan.shapes import Shapes
from dsv4_ascend.plan.tables import FORMATS
from dsv4_backend.errors import ArgumentError

TP_DEGREES = (1, 2, 4, 8, 16)
"""Tensor-parallel degrees that the search tries: divisors of 16 (planner.md 8)."""


@dataclass(frozen=True, order=True)
class Layout:
    """tp devices share a group's attention, dp groups have requests of their own,
    ep devices share the experts; tp * dp devices in all.
    """

    tp: int
    dp: int
    ep: int

    @property
    def devices(self) -> int:
        """How many there are."""
        return self.tp * self.dp

    def __str__(self) -> str:
        return f"tp={self.tp},dp={self.dp},ep={self.ep}"


def parse_layout(text: str, count: int) -> Layout:
    """`tp=..,dp=..,ep=..` in any order; dp follows from the others, ep is all devices if absent.

    ArgumentError for anything else, and unless tp * dp is `count` and ep divides it.
    """
    given: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in ("tp", "dp", "ep") or name in given or not _is_degree(value):
            raise ArgumentError(
                f"--layout: found {part[:40]!r} in {text[:60]!r}, "
                "expected tp=N,dp=N,ep=N with whole numbers >= 1"
            )
        given[name] = int(value)
    tp = given.get("tp", count // given["dp"] if "dp" in given else 1)
    dp = given.get("dp", count // tp if tp else 0)
    ep = given.get("ep", count)
    if tp * dp != count:
        raise ArgumentError(
            f"--layout: tp={tp} times dp={dp} is {tp * dp} devices, --count says {count}; "
            "give a tp and a dp whose product is the count"
        )
    if count % ep:
        raise ArgumentError(
            f"--layout: ep={ep} does not divide the {count} devices; "
            f"expected one of {', '.join(map(str, divisors(count)[:12]))}"
        )
    return Layout(tp, dp, ep)


def layouts(count: int) -> list[Layout]:
    """Every layout that the search tries."""
    return [
        Layout(tp, count // tp, ep)
        for tp in TP_DEGREES
        if count % tp == 0
        for ep in divisors(count)
    ]


def refusal(layout: Layout, shapes: Shapes, cache: CacheFormat, chip: str) -> str:
    """Why operators or shapes forbid a layout; empty if nothing does."""
    config = shapes.config
    heads, groups = config.num_attention_heads, config.o_groups
    if groups % layout.tp:
        return f"tp does not divide the {groups} groups of the output projection"
    local = heads // layout.tp
    if cache.heads and local not in cache.heads:
        others = caches_that_take(local, chip)
        way = f" (--cache {others[0]} takes fewer)" if others else ""
        return f"{cache.operator} needs {_range(cache.heads)} query heads on each device{way}"
    if config.n_routed_experts % layout.ep:
        return f"ep does not divide the {config.n_routed_experts} experts"
    return _exchange_refusal(layout.ep, config.hidden_size, chip)


def _exchange_refusal(ep: int, hidden: int, chip: str) -> str:
    rule = FORMATS["exchange"].get(chip)
    if rule is None or ep == 1:
        return ""
    degrees = rule.get("degrees") or range(rule["degree_range"][0], rule["degree_range"][1] + 1)
    if ep not in degrees:
        return f"MoeDistributeDispatch takes ep {_range(tuple(degrees))} on {chip}"
    low, high = rule["hidden"]
    if not low <= hidden <= high:
        return f"MoeDistributeDispatch takes rows of {low} to {high} on {chip}, not of {hidden}"
    return ""


def divisors(count: int) -> list[int]:
    """All divisors, the smallest first."""
    small = [n for n in range(1, int(count**0.5) + 1) if count % n == 0]
    return sorted({*small, *(count // n for n in small)})


def _range(values: tuple[int, ...]) -> str:
    if len(values) <= 3:
        return " or ".join(map(str, values))
    step = values[1] - values[0]
    even = all(b - a == step for a, b in pairwise(values))
    if even:
        return f"{values[0]} to {values[-1]}" + (f" in steps of {step}" if step > 1 else "")
    return ", ".join(map(str, values))


def _is_degree(text: str) -> bool:
    return text.isascii() and text.isdigit() and 1 <= len(text) <= 6 and int(text) >= 1
