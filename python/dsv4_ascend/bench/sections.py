"""A table with its notes, as the terminal and the page show it."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4_ascend.bench.timing import Timing


@dataclass(frozen=True)
class Section:
    """text: columns of words, which stand left; the others are numbers."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]
    notes: tuple[str, ...]
    text: tuple[int, ...] = (0,)


def seconds(value: float) -> str:
    """A time with three digits and its unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{_three(value / size)} {unit}"
    return f"{_three(value / 1e-9)} ns"


def quartiles(timing: Timing) -> str:
    """Both, each with its unit."""
    return f"{seconds(timing.low)} to {seconds(timing.high)}"


def rate(per_second: float) -> str:
    """Billions a second."""
    return _three(per_second / 1e9)


def _three(value: float) -> str:
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:,.{digits}f}"
