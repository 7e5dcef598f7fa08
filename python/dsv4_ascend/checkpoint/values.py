"""Values that no operator looks at later, checked when a checkpoint is opened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from dsv4_ascend.checkpoint.kinds import OFFSET
from dsv4_ascend.checkpoint.layout import FP32_NAMES, Layout
from dsv4_ascend.checkpoint.sources import Source, Sources

EXPERT_SCALE_BUDGET = 256 * 2**20
"""Bytes of the routed experts' scales up to which they are checked:
with FP4 experts a release has 8 GB of them.
"""
_FLOATS = ("norm.weight", *FP32_NAMES)


class Rule(NamedTuple):
    """What a tensor may hold: an interval as a test per element (E8M0: per byte),
    and how a message says it.
    """

    good: Callable[[torch.Tensor], torch.Tensor]
    expected: str


FINITE = Rule(torch.isfinite, "a finite number")
FLOAT_SCALE = Rule(lambda scale: (scale > 0) & (scale < torch.inf), "a positive finite scale")
ROW_SCALE = Rule(lambda scale: (scale >= 0) & (scale < torch.inf), "a finite scale, not negative")
"""A row of zeros has scale 0."""
NO_OFFSET = Rule(lambda offset: offset == 0, "0, as symmetric codes have it")
E8M0 = Rule(lambda byte: byte != 0xFF, "a positive finite scale")


def value_problems(sources: Sources, experts: int, entries: Layout) -> Iterator[str]:
    """One line per tensor with a bad value: where,
    how many more there are, what was found and expected.

    sources: every tensor by official name; experts: number of routed experts; entries: how weights
    are stored. Checked are: every `tid2eid` (expert ids in range), scales (positive and finite;
    E8M0 byte 0xFF is NaN), and the finiteness of norms, attention sinks, `ape`, gate biases and
    hyper-connection parameters. Not checked are weight matrices, and the routed experts' scales
    where they hold more than EXPERT_SCALE_BUDGET bytes together: a release of 160 GB is opened by
    reading 0.2 GB.
    """
    scales = {
        name for name in sources if ".ffn.experts." in name and name.endswith((".scale", OFFSET))
    }
    skipped = (
        scales if sum(sources[name].nbytes for name in scales) > EXPERT_SCALE_BUDGET else set()
    )
    for name, source in sources.items():
        rule = rule_of(name, source.dtype, experts, entries)
        if rule is not None and name not in skipped:
            yield from (
                f"{source.describe(name)}: {told}" for told in broken(source.tensor(), rule, source)
            )


def rule_of(name: str, dtype: str, experts: int, entries: Layout) -> Rule | None:
    """What every value of a tensor must be, None where this module has no rule."""
    if name.endswith(OFFSET):
        return NO_OFFSET
    if name.endswith(".scale"):
        weight = entries.get(name.removesuffix("scale") + "weight")
        by_row = weight is not None and weight.kind is not None and not weight.kind.block
        return E8M0 if dtype in ("F8_E8M0", "U8") else ROW_SCALE if by_row else FLOAT_SCALE
    if name.endswith("tid2eid"):
        return Rule(
            lambda ids: (ids >= 0) & (ids < experts),
            f"an expert id in [0, {experts}); rows are token ids",
        )
    return FINITE if name.endswith(_FLOATS) else None


def broken(tensor: torch.Tensor, rule: Rule, source: Source) -> Iterator[str]:
    """At most one line: the first value that breaks the rule, where, and how many more do."""
    wide = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e8m0fnu else tensor
    # Good values are an interval, and NaN comes out as both extremes: they decide without
    # a temporary.
    if tensor.numel() == 0 or bool(rule.good(torch.stack(torch.aminmax(wide))).all()):
        return
    bad = (~rule.good(wide)).nonzero()
    first = bad[0].tolist()
    more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
    value = tensor[tuple(first)].item()
    shown = f"{value:.9g}" if isinstance(value, float) else str(value)
    yield f"found {shown} at {source.place(first)}{more}, expected {rule.expected}"
