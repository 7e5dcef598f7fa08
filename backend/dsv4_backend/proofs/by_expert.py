"""Automatic mutants of the loop over experts that no case can tell from it, for all operators that use it."""

from __future__ import annotations

from dsv4_backend.contract import Operator

_TRACED_ONLY = (
    "by_expert: owner == e -> owner != e",
    "by_expert: True -> False",
    "by_expert: 1 -> 2",
    "by_expert: 1 -> 2 (2)",
    "by_expert: 1 -> 2 (3)",
    "by_expert: 0 -> 1 (2)",
)
"""Mutants of the branch for tracing, where offsets have no values; no case reaches it."""


def traced_only(function: str) -> tuple[str, ...]:
    """Mutants that only tracing tells apart, of `by_expert` and of the function that counts its rows and experts."""
    return (*_TRACED_ONLY, f"{function}: 0 -> 1", f"{function}: 0 -> 1 (2)")


def explain_experts(op: Operator, function: str) -> None:
    """Say why mutants of `by_expert`, called by `function`, compute what an operator's reference computes."""
    for name in traced_only(function):
        op.equivalent(name, "only tracing runs it; tests/backend/test_traced_experts.py tells them apart")
    op.equivalent(
        "by_expert: expert_offsets.device.type != 'meta' -> expert_offsets.device.type == 'meta'",
        "the branch for tracing, on real offsets: the same results by another way",
    )
    op.equivalent(
        "by_expert: span.start < span.stop -> span.start <= span.stop",
        "an expert without rows adds none",
    )
