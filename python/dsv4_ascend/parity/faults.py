"""Mutation testing of the cases:
they must catch named faults and automatic mutants of a contract.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dsv4_ascend.parity.mutants import mutants
from dsv4_ascend.parity.runner import RAISED, Function, Sample, samples
from dsv4_backend.contract import Operator
from dsv4_backend.errors import Dsv4Error

MUTANTS = 16
"""Automatic mutants per operator in the default tier."""
_EDITED_CODE_RAISES = (
    *RAISED,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    TypeError,
)


@dataclass(frozen=True)
class FaultResult:
    """One fault: the case that caught it and how, or no case (it survived)."""

    operator: str
    fault: str
    caught_by: str | None
    how: str
    raised: bool = False
    automatic: bool = False

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

    A fault is killed when a case differs beyond the tolerance or the mutant raises something other
    than Dsv4Error.
    """
    return hunt(
        operator, {fault: mutant for fault, mutant in operator.faults.items() if pattern in fault}
    )


def hunt(operator: Operator, faults: Mapping[str, Function]) -> Iterator[FaultResult]:
    """Run mutants of an operator through all its cases, by their names."""
    found = list(samples(operator)) if faults else []
    for fault, mutant in faults.items():
        yield _hunt(operator.name, fault, mutant, found)


def run_mutants(
    operator: Operator, pattern: str = "", count: int | None = MUTANTS
) -> Iterator[FaultResult]:
    """Run `count` automatic mutants of an operator's reference
    (None: all) whose name contains `pattern`.

    Those that the contract explains as equivalent are left out, and so are mutants that only ever
    raise: they would show nothing about the oracle.
    """
    wanted = [m for m in mutants(operator) if pattern in m.name and not operator.explains(m.name)]
    found = list(samples(operator)) if wanted else []
    for mutant in wanted:
        if count == 0:
            return
        result = _hunt(operator.name, mutant.name, mutant.run, found, _EDITED_CODE_RAISES)
        if not result.raised:
            count = None if count is None else count - 1
            yield replace(result, automatic=True)


def _hunt(
    operator: str,
    fault: str,
    mutant: Function,
    found: Sequence[Sample],
    raises: tuple[type[Exception], ...] = RAISED,
) -> FaultResult:
    raised: FaultResult | None = None
    for sample in found:
        try:
            comparison = sample.run(mutant)
        except Dsv4Error:
            continue
        except raises as error:
            raised = raised or FaultResult(
                operator, fault, sample.name, f"{type(error).__name__}: {error}", raised=True
            )
            continue
        if not comparison.ok:
            return FaultResult(operator, fault, sample.name, comparison.detail)
    return raised or FaultResult(operator, fault, None, "every case stays within the tolerance")
