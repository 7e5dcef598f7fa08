"""Charts as inline SVG: axes, stacked bars, lines and points, with no library and no network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 640, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 16, 14, 46
_PLOT_WIDTH, _PLOT_HEIGHT = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM
_LIMIT_NAMES = 78
"""Width right of bars for the names of limits."""


@dataclass(frozen=True)
class Scale:
    """From values to pixels, linear or logarithmic."""

    low: float
    high: float
    first: float
    last: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Where a value is."""
        if self.log:
            low, high, value = (math.log10(v) for v in (self.low, self.high, value))
        else:
            low, high = self.low, self.high
        return self.first + (value - low) / (high - low) * (self.last - self.first)

    def ticks(self) -> list[float]:
        """Round values between the ends: powers of ten, or four to seven steps."""
        if self.log:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            return [10.0**power for power in range(first, last + 1)]
        return [step * i for step in [_round_step(self.high)] for i in range(_steps(self.high))]


def _round_step(high: float) -> float:
    raw = high / 7
    power = 10.0 ** math.floor(math.log10(raw))
    return next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw)


def _steps(high: float) -> int:
    return int(high / _round_step(high) + 1e-9) + 1


def horizontal(low: float, high: float, log: bool = False) -> Scale:
    """A scale over the plot's width."""
    return Scale(low, high, _LEFT, WIDTH - _RIGHT, log)


def vertical(low: float, high: float, log: bool = False) -> Scale:
    """A scale over the plot's height, upwards."""
    return Scale(low, high, HEIGHT - _BOTTOM, _TOP, log)


@dataclass
class Chart:
    """Parts of one SVG; `svg` closes it. label: what a reader who sees no picture is told."""

    label: str
    parts: list[str] = field(default_factory=list)

    def text(self, x: float, y: float, words: str, anchor: str = "middle", kind: str = "") -> None:
        """Words at a point."""
        named = f' class="{kind}"' if kind else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}>{escape(words)}</text>'
        )

    def line(self, points: Sequence[tuple[float, float]], style: str) -> None:
        """A polyline."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" fill="none" style="{style}"/>')

    def y_axis(self, scale: Scale, title: str) -> None:
        """Grid lines with their values, and the title above them."""
        for value in scale.ticks():
            y = scale(value)
            self.parts.append(
                f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            self.text(_LEFT - 8, y + 4, short(value), "end")
        middle = _TOP + _PLOT_HEIGHT / 2
        self.parts.append(
            f'<text transform="translate(15 {middle:.0f}) rotate(-90)" text-anchor="middle" '
            f'class="title">{escape(title)}</text>'
        )

    def x_title(self, title: str) -> None:
        """The title below the plot."""
        self.text(_LEFT + _PLOT_WIDTH / 2, HEIGHT - 8, title, kind="title")

    def x_axis(self, scale: Scale, title: str) -> None:
        """Values of a continuous axis."""
        for value in scale.ticks():
            self.text(scale(value), HEIGHT - _BOTTOM + 18, short(value))
        self.x_title(title)

    def svg(self) -> str:
        """The finished picture."""
        body = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            f'aria-label="{escape(self.label, quote=True)}">\n{body}\n</svg>'
        )


@dataclass(frozen=True)
class Bar:
    """A stacked bar: parts by name, from below; faded where it cannot be reached."""

    label: str
    parts: Mapping[str, float]
    faded: bool = False

    @property
    def total(self) -> float:
        """Its height."""
        return sum(self.parts.values())


def stacked(
    label: str,
    bars: Sequence[Bar],
    colours: Mapping[str, str],
    titles: tuple[str, str, str],
    limits: Mapping[str, float],
) -> str:
    """Stacked bars, with horizontal lines at `limits`, the lowest first; titles: of x, of y, and
    the unit of a part in its tooltip.
    """
    x_title, y_title, unit = titles
    chart = Chart(label)
    scale = vertical(0.0, 1.08 * max([bar.total for bar in bars] + list(limits.values())))
    chart.y_axis(scale, y_title)
    slot = (_PLOT_WIDTH - (_LIMIT_NAMES if limits else 0)) / len(bars)
    width = 0.7 * slot
    for i, bar in enumerate(bars):
        x, below = _LEFT + i * slot + (slot - width) / 2, 0.0
        chart.parts.append(f'<g class="{"faded" if bar.faded else "bar"}">')
        for name, value in bar.parts.items():
            top, bottom = scale(below + value), scale(below)
            below += value
            if value > 0:
                tip = escape(f"{bar.label}: {name} {value:.4g} {unit}")
                chart.parts.append(
                    f'<rect x="{x:.1f}" y="{top:.2f}" width="{width:.1f}" '
                    f'height="{bottom - top:.2f}" fill="{colours[name]}" '
                    f'data-value="{value:.6g}"><title>{tip}</title></rect>'
                )
        chart.parts.append("</g>")
    for i, (name, value) in enumerate(limits.items()):
        y = scale(value)
        chart.line([(_LEFT, y), (WIDTH - _RIGHT, y)], "stroke: var(--limit); stroke-dasharray: 6 4")
        below = y + 15 if i == 0 else y - 5
        chart.text(WIDTH - _RIGHT, below, f"{name} {short(value)}", "end", "limit")
    for i, bar in enumerate(bars):
        middle = _LEFT + (i + 0.5) * slot
        chart.text(middle, HEIGHT - _BOTTOM + 18, bar.label)
        chart.text(middle, scale(bar.total) - 5, short(bar.total), kind="value")
    chart.x_title(x_title)
    return chart.svg()


def legend(colours: Mapping[str, str]) -> str:
    """Names beside their colours, as HTML."""
    items = "".join(
        f'<span><i style="background: {colour}"></i>{escape(name)}</span>'
        for name, colour in colours.items()
    )
    return f'<p class="legend">{items}</p>'


def short(value: float) -> str:
    """A value with at most three digits: 0.5, 12, 340, 1.2k, 3M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
