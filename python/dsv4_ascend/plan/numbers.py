"""The numbers of a device, of what its rates reach and of what is assumed besides:
each with its unit, source and confidence, and each open to `--set`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from dsv4_ascend.plan.tables import DEVICES, Table
from dsv4_backend.errors import ArgumentError

CONFIDENCES = (
    "published", "third-party", "derived", "fit", "conflict", "assumed", "yours",
)  # fmt: skip
"""How far a number can be trusted; see devices.toml. `yours`: given with --set."""


@dataclass(frozen=True)
class Key:
    """What a number means: its unit, and the values it can have."""

    unit: str
    meaning: str
    low: float = 0.0
    high: float = 1e9
    whole: bool = False


def _rate(unit: str, meaning: str) -> Key:
    return Key(unit, meaning, low=1e-3)


def _share(unit: str, meaning: str) -> Key:
    return Key(unit, meaning, low=1e-3, high=1.0)


def _count(unit: str, meaning: str) -> Key:
    return Key(unit, meaning, low=1, high=1e6, whole=True)


KEYS: Mapping[str, Key] = MappingProxyType({
    "visible_gb": _rate("GB", "memory that the runtime shows"),
    "bf16_tflops": _rate("TFLOP/s", "bf16 products"),
    "int8_tops": _rate("TOP/s", "int8 products"),
    "fp8_tflops": _rate("TFLOP/s", "FP8 products, of FP4 weights too"),
    "mxfp4_tflops": _rate("TFLOP/s", "FP4 products; no deployment uses them"),
    "hbm_gbps": _rate("GB/s", "memory bandwidth"),
    "link_gbps": _rate("GB/s", "fabric, one way"),
    "far_gbps": _rate("GB/s", "network behind the fabric, one way"),
    "node_devices": _count("devices", "in a node"),
    "fabric_devices": _count("devices", "that one fabric joins"),
    "package_devices": _count("devices", "in what one buys"),
    "eta_compute": _share("of peak", "that products reach"),
    "eta_hbm": _share("of peak", "that memory reads reach"),
    "eta_link": _share("of peak", "that exchanges reach"),
    "kernels": Key("per layer", "kernels that streams do not hide", high=1e4),
    "gap_us": Key("us", "per such kernel, in a captured graph", high=1e6),
    "exchange_us": Key("us", "latency of a dispatch or a combine", high=1e6),
    "allreduce_us": Key("us", "latency of an all-reduce", high=1e6),
    "utilisation": _share("of visible", "memory that may be used"),
    "workspace_gib": Key("GiB", "activations and operators' workspace", high=1e4),
    "comm_mib": Key("MiB", "HCCL_BUFFSIZE; allocated twice", high=1e6),
    "headroom_gib": Key("GiB", "free memory below which a fit is tight", high=1e4),
    "head_tp": _count("devices", "that share the LM head's product"),
    "accepted_1": Key("tokens", "accepted of one draft", high=1.0),
    "accepted_2": Key("tokens", "accepted of two drafts", high=2.0),
    "accepted_3": Key("tokens", "accepted of three drafts", high=3.0),
    "draft_layer": Key("of a layer", "time of an MTP block", high=100.0),
    "eager_us": Key("us", "per kernel without a captured graph", high=1e6),
    "captured_requests": _count("requests", "per group that captured graphs take"),
    "prefill_chunk": Key("tokens", "of a prompt in one pass", low=128, high=2**20, whole=True),
    "touched_share": _share("of uniform", "experts that a step reads"),
    "exchange_overlap": Key("of the shorter", "exchange hidden under the experts", high=1.0),
    "hf32_share": _share("of bf16", "rate of the hyper-connections' products"),
})  # fmt: skip
"""Every number there is; a device lacks the rates of products it cannot do."""


@dataclass(frozen=True)
class Number:
    """A value and where it is from. others: what other sources say."""

    key: str
    value: float
    source: str
    confidence: str
    others: str = ""

    @property
    def unit(self) -> str:
        """The unit of its key."""
        return KEYS[self.key].unit


class Numbers(Mapping[str, float]):
    """Value by key; `of(key)` has the source. A missing key is an ArgumentError."""

    def __init__(self, numbers: Mapping[str, Number]) -> None:
        self._numbers = dict(numbers)

    def of(self, key: str) -> Number:
        """The number with its source."""
        if key not in self._numbers:
            raise ArgumentError(
                f"{key}: no source gives it for this device; "
                f"give it with --set {key}=VALUE ({KEYS[key].unit})"
            )
        return self._numbers[key]

    def __getitem__(self, key: str) -> float:
        return self.of(key).value

    def __contains__(self, key: object) -> bool:
        return key in self._numbers

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def with_preset(self, table: Table) -> Numbers:
        """The same with another row of `presets`."""
        return Numbers(self._numbers | _read(table))

    def changed(self, assignments: Sequence[str]) -> Numbers:
        """The same after `KEY=VALUE` and `KEY=2x` (times what it is);
        ArgumentError names what is wrong.
        """
        numbers = dict(self._numbers)
        for assignment in assignments:
            key, equals, text = assignment.partition("=")
            if not equals or not text:
                raise ArgumentError(
                    f"--set: found {assignment[:80]!r}, expected KEY=VALUE or KEY=2x"
                )
            if key not in KEYS:
                raise ArgumentError(f"--set: unknown key {key[:40]!r}, {_suggest(key)}")
            before = numbers.get(key) or Number(key, math.nan, "", "yours")
            value = _value(key, text, before.value)
            source = f"--set; was {before.value:g} ({before.source})" if before.source else "--set"
            numbers[key] = replace(
                before, key=key, value=value, source=source, confidence="yours", others=""
            )
        return Numbers(numbers)

    def as_if(self, key: str, other: str, why: str) -> Numbers:
        """The same with one number in the place of another."""
        taken = self.of(other)
        return Numbers(self._numbers | {
            key: replace(taken, key=key, source=f"{why}: {other}, {taken.source}")
        })  # fmt: skip

    def times(self, **factors: float) -> Numbers:
        """The same with some values multiplied."""
        return Numbers(self._numbers | {
            key: replace(self.of(key), value=self[key] * factor) for key, factor in factors.items()
        })  # fmt: skip


def device_numbers(device: str, visible_gb: Number, preset: str) -> Numbers:
    """All numbers of a device of devices.toml under a preset."""
    rows = (DEVICES["devices"][device], DEVICES["presets"][preset], DEVICES["common"])
    numbers: dict[str, Number] = {"visible_gb": visible_gb}
    for row in rows:
        numbers |= _read(row)
    return Numbers(numbers)


def _read(row: Table) -> dict[str, Number]:
    return {key: Number(key, **row[key]) for key in row if key in KEYS}


def _value(key: str, text: str, before: float) -> float:
    rule = KEYS[key]
    try:
        number = float(text.removesuffix("x"))
    except ValueError:
        number = math.nan
    value = number * before if text.endswith("x") else number
    whole = not rule.whole or value == round(value) if math.isfinite(value) else False
    if not math.isfinite(value) or not rule.low <= value <= rule.high or not whole:
        kind = "a whole number" if rule.whole else "a number"
        raise ArgumentError(
            f"--set: {key}: found {text[:40]!r}, expected {kind} in "
            f"[{rule.low:g}, {rule.high:g}] {rule.unit}"
            + (", or a factor of what it is, such as 2x" if math.isfinite(before) else "")
        )
    return value


def _suggest(key: str) -> str:
    near = difflib.get_close_matches(key, KEYS, n=3, cutoff=0.5)
    known = f"is it {' or '.join(near)}?" if near else f"expected one of {', '.join(KEYS)};"
    return f"{known} --explain lists them with their values"
