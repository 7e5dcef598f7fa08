"""The suites of `dsv4-ascend bench`: what each runs, and what it tells."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dsv4_ascend.bench import decode, host, layers, long_context, ops, transformers_models
from dsv4_ascend.bench.dimensions import Dimensions
from dsv4_ascend.bench.sections import Section


@dataclass(frozen=True)
class Options:
    """pattern: part of an operator's name, for suites of operators; rounds: samples of a call."""

    pattern: str
    rounds: int
    dimensions: Dimensions


@dataclass(frozen=True)
class Found:
    """What a suite found: as JSON, and as tables."""

    data: dict[str, Any]
    sections: tuple[Section, ...]


def _host(options: Options) -> Found:
    rows = host.host(options.pattern, options.rounds)
    return Found({"calls": [asdict(row) for row in rows]}, (host.section(rows),))


def _ops(options: Options) -> Found:
    found = ops.ops(options.pattern, options.rounds, options.dimensions)
    return Found(asdict(found), (ops.section(found), ops.verdicts(found)))


def _decode(options: Options) -> Found:
    rows = decode.decode(options.rounds)
    return Found({"steps": [asdict(row) for row in rows]}, (decode.section(rows),))


def _long_context(options: Options) -> Found:
    rows = long_context.long_context(options.rounds)
    return Found({"contexts": [asdict(row) for row in rows]}, (long_context.section(rows),))


def _layer(options: Options) -> Found:
    experts = options.dimensions.experts
    rows = layers.layers(options.rounds, experts)
    return Found({"layers": [asdict(row) for row in rows]}, (layers.section(rows, experts),))


def _transformers(options: Options) -> Found:
    rows = transformers_models.transformers_models(options.rounds)
    return Found({"runs": [asdict(row) for row in rows]}, (transformers_models.section(rows),))


SUITES: Mapping[str, Callable[[Options], Found]] = {
    "host": _host,
    "ops": _ops,
    "decode": _decode,
    "long-context": _long_context,
    "layer": _layer,
    "transformers": _transformers,
}
NAMED: Mapping[str, Callable[[str], list[str]]] = {"host": host.named, "ops": ops.named}
"""Suites of operators -> what of them a pattern names."""
