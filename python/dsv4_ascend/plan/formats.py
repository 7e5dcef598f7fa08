"""Precisions of weights and formats of caches: bits, bytes per row, what an operator takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dsv4_ascend.checkpoint.config import V4Config
from dsv4_ascend.plan.shapes import SHARDED, Shapes
from dsv4_ascend.plan.tables import DEVICES, FORMATS
from dsv4_backend.errors import ArgumentError

PRECISIONS = tuple(FORMATS["precisions"])
CACHES = tuple(FORMATS["caches"])
_BITS_OF_8 = 9
"""Classes of fewer bits than this are multiplied at the rate of 8-bit products."""


@dataclass(frozen=True)
class Precision:
    """How weights are stored. bits: per parameter by class; rate: the key of 8-bit products."""

    name: str
    title: str
    rate: str
    source: str
    confidence: str
    bits: Mapping[str, float]

    def rate_of(self, weight_class: str) -> str:
        """The key of the rate at which a class is multiplied."""
        return self.rate if self.bits[weight_class] < _BITS_OF_8 else "bf16_tflops"

    def bytes_of(self, parameters: Mapping[str, int]) -> dict[str, float]:
        """Bytes by class."""
        return {name: count * self.bits[name] / 8 for name, count in parameters.items()}


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of all weights by what divides them: tensor parallelism, expert parallelism, or
    nothing. draft: of the draft blocks without experts, which nothing divides.
    """

    replicated: float
    sharded: float
    experts: float
    draft: float
    draft_experts: float


def weight_bytes(shapes: Shapes, precision: Precision) -> WeightBytes:
    """What the weights take, before they are divided."""
    main, draft = precision.bytes_of(shapes.main), precision.bytes_of(shapes.draft)
    sharded = sum(main[name] for name in SHARDED)
    return WeightBytes(
        replicated=sum(main.values()) - sharded - main["experts"],
        sharded=sharded,
        experts=main["experts"],
        draft=sum(draft.values()) - draft["experts"],
        draft_experts=draft["experts"],
    )


@dataclass(frozen=True)
class CacheFormat:
    """How keys and values are stored; see formats.toml."""

    name: str
    title: str
    chips: tuple[str, ...]
    operator: str
    rate: str
    source: str
    confidence: str
    value_bits: int
    scale_block: int
    scale_bytes: int
    align: int
    index_scale_bytes: int
    heads: tuple[int, ...]

    def entry_bytes(self, config: V4Config) -> int:
        """Bytes of one row of the main cache."""
        rope, plain = config.qk_rope_head_dim, config.head_dim - config.qk_rope_head_dim
        scales = -(-plain // self.scale_block) * self.scale_bytes if self.scale_block else 0
        size = 2 * rope + plain * self.value_bits // 8 + scales
        return -(-size // self.align) * self.align

    def index_bytes(self, config: V4Config) -> int:
        """Bytes of one row of index keys."""
        return config.index_head_dim + self.index_scale_bytes


def precision_named(name: str, device: str, numbers: Mapping[str, float]) -> Precision:
    """The precision, if the device multiplies it; else ArgumentError."""
    found = _choose("--precision", name, PRECISIONS)
    precision = Precision(name=found, **FORMATS["precisions"][found])
    if precision.rate not in numbers:
        usable = [one for one in PRECISIONS if FORMATS["precisions"][one]["rate"] in numbers]
        raise ArgumentError(
            f"--precision: {name} needs the rate {precision.rate}, which {device} lacks in "
            f"devices.toml; expected {', '.join(usable)}, or --set {precision.rate}=VALUE"
        )
    return precision


def cache_named(name: str, device: str) -> CacheFormat:
    """The cache format, if the device's chip has it; else ArgumentError."""
    found = _choose("--cache", name, CACHES)
    cache = _cache(found)
    chip = DEVICES["devices"][device]["chip"]
    if chip not in cache.chips:
        usable = [other for other in CACHES if chip in _cache(other).chips]
        raise ArgumentError(
            f"--cache: {name} is read by {cache.operator} of {', '.join(cache.chips)}, "
            f"not by {device}; expected {' or '.join(usable)}"
        )
    return cache


def caches_that_take(heads: int, chip: str) -> list[str]:
    """Cache formats of a chip whose attention takes so many query heads."""
    return [
        name
        for name in CACHES
        if chip in (cache := _cache(name)).chips and heads in (cache.heads or (heads,))
    ]


def _cache(name: str) -> CacheFormat:
    row = dict(FORMATS["caches"][name])
    return CacheFormat(
        name=name, chips=tuple(row.pop("chips")), heads=tuple(row.pop("heads")), **row
    )


def _choose(option: str, name: str, names: tuple[str, ...]) -> str:
    if name not in names:
        raise ArgumentError(f"{option}: found {name[:40]!r}, expected one of {', '.join(names)}")
    return name
