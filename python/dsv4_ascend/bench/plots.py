"""Pictures of what suites found: a roofline of operators, and time against context.

Curves are plain data; `draw` alone needs matplotlib (extra `plot`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv4_ascend.bench import layers, long_context
from dsv4_ascend.bench.ops import Ops

_COLOURS, _MARKERS = 10, "os^"
"""Of matplotlib's cycle; what comes after them gets another marker."""


@dataclass(frozen=True)
class Curve:
    """Points (x, y), joined where one follows from the other."""

    label: str
    points: tuple[tuple[float, float], ...]
    joined: bool = True


@dataclass(frozen=True)
class Plot:
    """Curves over logarithmic axes. name: of the file, without its ending."""

    name: str
    title: str
    x: str
    y: str
    curves: tuple[Curve, ...]


def roofline(found: Ops) -> Plot:
    """Operations per second of every row over its operations per byte, below the machine's limits.

    Rows of an operator are one colour; those without operations are left out.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for row in found.rows:
        if row.flops:
            point = row.flops / row.traffic, row.flops_per_second / 1e9
            points.setdefault(row.operator, []).append(point)
    intensities = [x for of in points.values() for x, _ in of]
    least, most = min(intensities), max(intensities)
    reads, computes = found.limits.bytes_per_second, found.limits.flops_per_second
    corners = sorted({least, most, min(max(computes / reads, least), most)})
    roof = tuple((x, min(x * reads, computes) / 1e9) for x in corners)
    of_operators = [Curve(name, tuple(of), joined=False) for name, of in points.items()]
    return Plot(
        "roofline",
        "Operators at Flash dimensions",
        "operations per byte that must be moved",
        "GFLOP/s",
        (Curve("what torch reads and computes", roof), *of_operators),
    )


def attention(rows: Sequence[long_context.Growth]) -> Plot:
    """A token's attention in a layer against the context."""
    x = tuple(row.context for row in rows)
    curves = {
        "CSA: indexer": [row.indexer for row in rows],
        "CSA: attention": [row.csa for row in rows],
        "HCA: attention": [row.hca for row in rows],
    }
    return _times("attention", "Attention of one token, one layer", x, {
        label: [timing.median for timing in timings] for label, timings in curves.items()
    })  # fmt: skip


def whole_layers(rows: Sequence[layers.Row]) -> Plot:
    """A token's time in a whole layer of each kind against the context."""
    one = [row for row in rows if row.tokens == 1]
    x = tuple(dict.fromkeys(row.context for row in one))
    kinds = dict.fromkeys(row.layer for row in one)
    medians = {k: [row.timing.median for row in one if row.layer == k] for k in kinds}
    return _times("layers", "One token behind a context, Flash dimensions", x, medians)


def _times(
    name: str, title: str, contexts: tuple[int, ...], medians: dict[str, list[float]]
) -> Plot:
    curves = [
        Curve(label, tuple((n, 1e3 * s) for n, s in zip(contexts, of, strict=True)))
        for label, of in medians.items()
    ]
    return Plot(name, title, "tokens of context", "ms", tuple(curves))


def draw(plot: Plot, folder: Path) -> Path:
    """The plot as `folder`/name.svg. ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel=plot.x, ylabel=plot.y)
    axes.set_title(plot.title)
    for i, curve in enumerate(plot.curves):
        style, marker = "-" if curve.joined else "", _MARKERS[i // _COLOURS]
        x, y = zip(*curve.points, strict=True)
        axes.plot(x, y, linestyle=style, marker=marker, markersize=4, label=curve.label)
    axes.grid(which="major", alpha=0.3)
    axes.legend(fontsize="small")
    path = folder / f"{plot.name}.svg"
    figure.savefig(path)
    return path
