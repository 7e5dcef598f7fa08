"""Why the best layouts are the best, in one line each."""

from __future__ import annotations

from collections.abc import Iterator

from dsv4_ascend.plan.planner import Plan
from dsv4_ascend.plan.search import Candidate

_TOLD = 2
"""Classes that a comparison names."""
_TOLD_APART = 0.05
"""Steps of two layouts that differ by less are no reason: presets are right to some 20 %."""


def why_fastest(plan: Plan) -> Iterator[str]:
    """The fastest beside the next one of another tp, or of another ep where there is none."""
    best = plan.fastest
    if best is None:
        return
    others = [one for one in plan.candidates if one.feasible and one.layout != best.layout]
    other = next((one for one in others if one.layout.tp != best.layout.tp), None)
    other = other or next(iter(others), None)
    if other is None:
        yield f"fastest: only {best.layout} holds {plan.question.batch:,} requests"
        return
    close = other.decode.seconds / best.decode.seconds - 1 < _TOLD_APART
    doubt = ", closer than these estimates can tell" if close else ""
    yield f"fastest: {best.layout}; {other.layout} takes {_difference(best, other)}{doubt}"


def _difference(best: Candidate, other: Candidate) -> str:
    """What costs the other one time, and what saves it some."""
    ours, theirs = best.decode, other.decode
    changes = {one.name: theirs.of(one.name).seconds - one.seconds for one in ours.classes}
    told = sorted(changes, key=lambda name: -abs(changes[name]))[:_TOLD]
    shown = [f"{name} {1e3 * changes[name]:+.1f}" for name in told if abs(changes[name]) >= 5e-5]
    words = f" ({', '.join(shown)} ms)" if shown else ""
    return f"{1e3 * (theirs.seconds - ours.seconds):.1f} ms more{words}"


def why_largest(plan: Plan) -> Iterator[str]:
    """The layout that holds most, what it gives then, and why others hold less."""
    best = plan.largest
    if best is None:
        return
    memory = best.memory
    step = best.decode_at(memory.requests_per_group)
    full = (
        f"most requests: {best.layout} holds {memory.requests:,}, then "
        f"{1e3 * step.seconds:.1f} ms a step, {1e3 * best.tpot(step):.1f} ms per token, "
        f"{best.tokens_per_second(step, memory.requests_per_group):,.0f} tokens/s a device"
    )
    worse = [
        one
        for one in plan.candidates
        if not one.refused and one.layout.tp > best.layout.tp and memory.requests
    ]
    if memory.held_per_group > memory.captured:
        yield f"{full}; captured graphs are the limit"
    elif worse:
        yield (
            f"{full}; with more tp every device of a group keeps the whole cache "
            f"({worse[0].layout} holds {worse[0].memory.requests:,})"
        )
    elif best.layout.tp > 1:
        yield f"{full}; with less tp the weights that tp divides leave no room"
    else:
        yield full
