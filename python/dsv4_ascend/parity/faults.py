"""Mutation testing of the cases: every named fault of a contract must be caught by a case of the contract."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dsv4_ascend.parity.runner import RAISED, Function, Sample, samples
from dsv4_backend.contract import Operator
from dsv4_backend.errors import Dsv4Error


@dataclass(frozen=True)
class FaultResult:
    """One fault: the case that caught it and how, or no case (it survived)."""

    operator: str
    fault: str
    caught_by: str | None
    how: str
    raised: bool = False

    @property
    def killed(self) -> bool:
        """Whether some case tells the mutant from the reference."""
        return self.caught_by is not None

    @property
    def name(self) -> str:
        """OPERATOR/FAULT, what `-k` matches."""
        return f"{self.operator}/{self.fault}"


def run_faults(operator: Operator, pattern: str = "") -> Iterator[FaultResult]:
    """Run the faults of an operator whose name contains `pattern` through all its cases.

    A fault is killed when a case differs beyond the tolerance or the mutant raises something other than Dsv4Error.
    """
    wanted = {fault: mutant for fault, mutant in operator.faults.items() if pattern in fault}
    found = list(samples(operator)) if wanted else []
    for fault, mutant in wanted.items():
        yield _hunt(operator.name, fault, mutant, found)


def _hunt(operator: str, fault: str, mutant: Function, found: Sequence[Sample]) -> FaultResult:
    raised: FaultResult | None = None
    for sample in found:
        try:
            comparison = sample.run(mutant)
        except Dsv4Error:
            continue
        except RAISED as error:
            raised = raised or FaultResult(
                operator, fault, sample.name, f"{type(error).__name__}: {error}", raised=True
            )
            continue
        if not comparison.ok:
            return FaultResult(operator, fault, sample.name, comparison.detail)
    return raised or FaultResult(operator, fault, None, "every case stays within the tolerance")
