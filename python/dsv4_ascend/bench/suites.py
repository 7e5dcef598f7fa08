"""The suites of `dsv4-ascend bench`: what each runs, and what it tells."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsv4_ascend.bench import (
    against,
    decode,
    host,
    layers,
    long_context,
    ops,
    plots,
    transformers_models,
)
from dsv4_ascend.bench.dimensions import Dimensions
from dsv4_ascend.bench.plots import Plot
from dsv4_ascend.bench.sections import Section


@dataclass(frozen=True)
class Options:
    """pattern: part of an operator's name, for suites of operators; rounds: samples of a call;
    engine: what suite `ops` compares with instead of torch, and the Python of its environment.
    """

    pattern: str
    rounds: int
    dimensions: Dimensions
    engine: tuple[str, Path] | None = None


@dataclass(frozen=True)
class Found:
    """What a suite found: as JSON, as tables, and as pictures."""

    data: dict[str, Any]
    sections: tuple[Section, ...]
    plots: tuple[Plot, ...] = ()


def _host(options: Options) -> Found:
    rows = host.host(options.pattern, options.rounds)
    return Found({"calls": [asdict(row) for row in rows]}, (host.section(rows),))


def _ops(options: Options) -> Found:
    if options.engine is not None:
        beside = against.beside(
            *options.engine, options.pattern, options.rounds, options.dimensions
        )
        return Found(asdict(beside), against.sections(beside), _roofline(beside.found))
    found = ops.ops(options.pattern, options.rounds, options.dimensions)
    sections = ops.section(found), ops.verdicts(found)
    return Found(asdict(found), sections, _roofline(found))


def _roofline(found: ops.Ops) -> tuple[Plot, ...]:
    return (plots.roofline(found),) if any(row.flops for row in found.rows) else ()


def _decode(options: Options) -> Found:
    rows = decode.decode(options.rounds)
    return Found({"steps": [asdict(row) for row in rows]}, (decode.section(rows, "decode"),))


def _prefill(options: Options) -> Found:
    rows = decode.prefill(options.rounds)
    return Found({"prompts": [asdict(row) for row in rows]}, (decode.section(rows, "prefill"),))


def _long_context(options: Options) -> Found:
    rows = long_context.long_context(options.rounds)
    return Found(
        {"contexts": [asdict(row) for row in rows]},
        (long_context.section(rows),),
        (plots.attention(rows),),
    )


def _layer(options: Options) -> Found:
    experts = options.dimensions.experts
    rows = layers.layers(options.rounds, experts)
    data = {"layers": [asdict(row) for row in rows]}
    return Found(data, (layers.section(rows, experts),), (plots.whole_layers(rows),))


def _transformers(options: Options) -> Found:
    rows = transformers_models.transformers_models(options.rounds)
    return Found({"runs": [asdict(row) for row in rows]}, (transformers_models.section(rows),))


SUITES: Mapping[str, Callable[[Options], Found]] = {
    "host": _host,
    "ops": _ops,
    "decode": _decode,
    "prefill": _prefill,
    "long-context": _long_context,
    "layer": _layer,
    "transformers": _transformers,
}
PLOTTED = "ops", "long-context", "layer"
"""Suites of which there are pictures."""
NAMED: Mapping[str, Callable[[str], list[str]]] = {"host": host.named, "ops": ops.named}
"""Suites of operators -> what of them a pattern names."""
