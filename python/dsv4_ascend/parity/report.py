"""A parity run over operators: what to run, one report per operator,
and the report as data for tables and JSON.
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dsv4_ascend.parity.faults import FaultResult, run_faults, run_mutants
from dsv4_ascend.parity.runner import (
    CaseResult,
    LeftOut,
    Observer,
    left_out,
    run_cases,
    samples,
)
from dsv4_backend import OPERATORS
from dsv4_backend.contract import Operator


@dataclass(frozen=True)
class Selection:
    """What to run: a pattern, one profile or all, a device,
    with faults and automatic mutants or without.

    pattern: part of an operator's name, or OPERATOR/ and a part of PROFILE/CASE or of a fault's or
    mutant's name; what no operator is called is looked for in those of all operators.
    """

    pattern: str = ""
    profile: str | None = None
    device: str = "cpu"
    faults: bool = False
    mutants: bool = False

    def operators(self) -> list[Operator]:
        """Operators that match the pattern up to its slash: by name, or by a part of it;
        all when none does; in the order of the spec.
        """
        return sorted(self._named or OPERATORS.values(), key=lambda op: (op.rows, op.name))

    @property
    def part(self) -> str:
        """What the names of cases, faults and mutants must contain."""
        return self.pattern.partition("/")[2] if self._named else self.pattern

    @property
    def _named(self) -> list[Operator]:
        name = self.pattern.partition("/")[0]
        if "/" in self.pattern and name in OPERATORS:
            return [OPERATORS[name]]
        return [op for op in OPERATORS.values() if name in op.name]


@dataclass
class OperatorReport:
    """Everything measured about one operator."""

    operator: str
    rows: tuple[int, ...]
    cases: list[CaseResult] = field(default_factory=list)
    faults: list[FaultResult] = field(default_factory=list)
    mutants: list[FaultResult] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    unjudged: list[LeftOut] = field(default_factory=list)
    """Of a bundle: what cannot be judged here, and why."""
    other_inputs: set[str] = field(default_factory=set)
    """Of a bundle: names of the cases whose inputs this machine draws otherwise."""
    seconds: float = 0.0

    @property
    def failures(self) -> list[CaseResult]:
        """Cases beyond the tolerance."""
        return [c for c in self.cases if not c.comparison.ok]

    @property
    def survivors(self) -> list[FaultResult]:
        """Faults and mutants that no case caught."""
        return [f for f in (*self.faults, *self.mutants) if not f.killed]

    @property
    def mean_use(self) -> float:
        """Mean over the cases of the mean error / limit."""
        return sum(c.comparison.mean_use for c in self.cases) / max(1, len(self.cases))

    @property
    def max_use(self) -> float:
        """Largest error / limit of any element of any case."""
        return max((c.comparison.limit_use for c in self.cases), default=0.0)

    def to_json(self) -> dict[str, Any]:
        """Plain data: numbers that JSON cannot say (infinity) become null."""
        return {
            "operator": self.operator,
            "spec_rows": list(self.rows),
            "cases": len(self.cases),
            "failed": len(self.failures),
            "left_out": [asdict(case) for case in self.left_out],
            "unjudged": [asdict(case) for case in self.unjudged],
            "other_inputs": sorted(self.other_inputs),
            "mean_limit_use": _finite(self.mean_use),
            "max_limit_use": _finite(self.max_use),
            "faults": len(self.faults),
            "faults_killed": _killed(self.faults),
            "mutants": len(self.mutants),
            "mutants_killed": _killed(self.mutants),
            "seconds": round(self.seconds, 3),
            "results": [_case_json(c) for c in self.cases],
            "fault_results": [asdict(f) | {"killed": f.killed} for f in self.faults],
            "mutant_results": [asdict(f) | {"killed": f.killed} for f in self.mutants],
        }


def measure(
    operator: Operator, selection: Selection, observe: Observer | None = None
) -> OperatorReport:
    """Run the selected cases of one operator, and its faults if asked for.

    observe: is told every case's outcome.
    """
    start = time.perf_counter()
    report = OperatorReport(operator.name, operator.rows)
    fit = []
    for sample in samples(operator, selection.profile, selection.part):
        unfit = left_out(sample, selection.device)
        if unfit is None:
            fit.append(sample)
        else:
            report.left_out.append(unfit)
    report.cases += run_cases(fit, selection.device, observe)
    if selection.faults:
        report.faults += run_faults(operator, selection.part)
    if selection.mutants:
        report.mutants += run_mutants(operator, selection.part)
    report.seconds = time.perf_counter() - start
    return report


def _case_json(result: CaseResult) -> dict[str, Any]:
    comparison = result.comparison
    return {
        "case": result.case,
        "profile": result.profile,
        "implementation": result.implementation,
        "ok": comparison.ok,
        "limit_use": _finite(comparison.limit_use),
        "mean_limit_use": _finite(comparison.mean_use),
        "pass_rate": comparison.pass_rate,
        "detail": comparison.detail,
        "seconds": round(result.seconds, 6),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _killed(results: Sequence[FaultResult]) -> int:
    return sum(result.killed for result in results)


def _score(results: Sequence[FaultResult]) -> float:
    """Killed over all, 1.0 when there are none."""
    return _killed(results) / len(results) if results else 1.0


def mutation_score(reports: Sequence[OperatorReport]) -> float:
    """Killed named faults over all of them, 1.0 when there are none."""
    return _score([fault for report in reports for fault in report.faults])


def reference_mutation_score(reports: Sequence[OperatorReport]) -> float:
    """Killed automatic mutants of the references over all of them, 1.0 when there are none."""
    return _score([mutant for report in reports for mutant in report.mutants])


def totals(reports: Sequence[OperatorReport]) -> dict[str, Any]:
    """Sums over all operators, and the verdict."""
    return {
        "operators": len(reports),
        "cases": sum(len(r.cases) for r in reports),
        "failed": sum(len(r.failures) for r in reports),
        "left_out": sum(len(r.left_out) for r in reports),
        "unjudged": sum(len(r.unjudged) for r in reports),
        "other_inputs": sum(len(r.other_inputs) for r in reports),
        "faults": sum(len(r.faults) for r in reports),
        "faults_survived": sum(len(r.faults) - _killed(r.faults) for r in reports),
        "mutation_score": mutation_score(reports),
        "mutants": sum(len(r.mutants) for r in reports),
        "mutants_survived": sum(len(r.mutants) - _killed(r.mutants) for r in reports),
        "reference_mutation_score": reference_mutation_score(reports),
        "seconds": round(sum(r.seconds for r in reports), 3),
    }


def reproduce(result: CaseResult | FaultResult, replayed: str | None = None) -> str:
    """The command that shows one failing case or surviving fault again.

    replayed: the bundle that the case was read from.
    """
    pattern = shlex.quote(result.name)
    if replayed is not None:
        return f"dsv4-ascend parity --replay {shlex.quote(replayed)} -k {pattern}"
    if isinstance(result, FaultResult):
        return f"dsv4-ascend parity {'--mutants' if result.automatic else '--faults'} -k {pattern}"
    device = "" if result.device == "cpu" else f" --device {result.device}"
    return f"dsv4-ascend parity -k {pattern}{device}"
