"""Run the parity cases of operator contracts against their oracles."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch

from dsv4_ascend.parity.arrays import to_array, to_tensor
from dsv4_ascend.parity.compare import Comparison, compare, miscounted, raised, unlike
from dsv4_backend import dispatch
from dsv4_backend.contract import Case, Operator
from dsv4_backend.errors import Dsv4Error

Function = Callable[..., Any]

RAISED = (RuntimeError, IndexError, ValueError)
"""What tensor code raises on unfit arguments.
Anything else is a defect of the caller's code and passes through.
"""


@dataclass(frozen=True)
class CaseResult:
    """One case on one implementation: the worst of its compared tensors,
    or why it could not run.
    """

    operator: str
    profile: str
    case: str
    device: str
    implementation: str
    seconds: float
    comparison: Comparison

    @property
    def name(self) -> str:
        """OPERATOR/PROFILE/CASE, what `-k` matches."""
        return f"{self.operator}/{self.profile}/{self.case}"


class Sample:
    """A case of an operator with its golden values,
    computed once and shared by parity and by every fault.
    """

    def __init__(self, operator: Operator, case: Case) -> None:
        self.operator = operator
        self.case = case
        self.name = f"{operator.name}/{case.profile}/{case.name}"

    @cached_property
    def golden(self) -> tuple[object, ...]:
        """Compared tensors of the oracle, which knows nothing of the reference."""
        return self.measured(self._of_oracle)

    @cached_property
    def _of_oracle(self) -> tuple[object, ...]:
        arguments = tuple(map(to_array, self.case.arguments))
        with np.errstate(all="ignore"):  # special values are part of the cases
            result = self.operator.golden(*arguments)
        return tuple(map(to_tensor, self._compared(arguments, result)))

    def run(self, function: Function, device: str = "cpu") -> Comparison:
        """Call `function` on copies of the arguments and compare outputs and mutated arguments."""
        return self.judge(self.call(function, device), self.case.decided and device == "cpu")

    def call(self, function: Function, device: str = "cpu") -> tuple[object, ...]:
        """Outputs of `function` on copies of the arguments, then the mutated arguments,
        on the CPU.
        """
        arguments = tuple(
            map_tensors(lambda t: _copy(t).to(device), a) for a in self.case.arguments
        )
        compared = self._compared(arguments, function(*arguments))
        return tuple(map_tensors(lambda t: t.detach().cpu(), c) for c in compared)

    def judge(self, compared: tuple[object, ...], bits: bool = False) -> Comparison:
        """The worst of what `call` gave, here or elsewhere, beside the oracle's: within the
        tolerance, or bit for bit.
        """
        if len(compared) != len(self._of_oracle):
            return miscounted(len(compared), len(self._of_oracle))
        if self.operator.measure is not None:  # it trusts kinds, shapes and dtypes
            pairs = zip(compared, self._of_oracle, strict=True)
            different = next(filter(None, (unlike(g, w) for g, w in pairs)), None)
            if different is not None:
                return different
        if bits:
            got, want, limits = compared, self._of_oracle, (0.0, 0.0)
        else:
            got, want = self.measured(compared), self.golden
            limits = self.operator.tolerance.limits(self.case.profile)
        parts = [compare(g, w, limits) for g, w in zip(got, want, strict=True)]
        return max(parts, key=lambda part: part.limit_use)

    def measured(self, compared: tuple[object, ...]) -> tuple[object, ...]:
        """What a measure of the operator makes of its outputs, where it has one."""
        measure = self.operator.measure
        if measure is None:
            return compared
        arguments = map(to_array, self.case.arguments)
        outputs = map(to_array, compared)
        with np.errstate(all="ignore"):
            measured = measure(*arguments, *outputs)
        return tuple(map(to_tensor, measured if isinstance(measured, tuple) else (measured,)))

    def _compared(self, arguments: tuple[Any, ...], result: Any) -> tuple[object, ...]:
        """Outputs, then the mutated arguments."""
        outputs = result if isinstance(result, tuple) else () if result is None else (result,)
        return outputs + tuple(arguments[i] for i in mutated_arguments(self.operator))


def mutated_arguments(operator: Operator) -> tuple[int, ...]:
    """Positions of the arguments that the schema marks as written."""
    schema = getattr(torch.ops.dsv4, operator.name).default._schema
    return tuple(
        i
        for i, a in enumerate(schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    )


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], argument: Any) -> Any:
    """Apply `function` to an argument that is a tensor; others stay as they are."""
    return function(argument) if isinstance(argument, torch.Tensor) else argument


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with its own storage and the same strides and offset,
    as `clone` does not keep them.
    """
    fresh = torch.empty(0, dtype=tensor.dtype)
    storage = tensor.untyped_storage().clone()
    return fresh.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def samples(operator: Operator, profile: str | None = None, pattern: str = "") -> Iterator[Sample]:
    """Cases of an operator whose PROFILE/CASE contains `pattern`, in one profile or in all."""
    for case in operator.iterate_cases():
        if profile in (None, case.profile) and pattern in f"{case.profile}/{case.name}":
            yield Sample(operator, case)


def implementations(sample: Sample, device: str) -> dict[str, Function]:
    """Every implementation of a device that takes the sample's arguments: candidates best first,
    then the reference.
    """
    operator, arguments = sample.operator, sample.case.arguments
    admitted = [
        candidate.name
        for candidate in dispatch.candidates(operator.name, *arguments, device=device)
        if candidate.reason is None
    ]
    forced = {name: _forced(operator, "strict", name) for name in admitted}
    return forced | {"reference": _forced(operator, "reference")}


def _forced(operator: Operator, policy: str, only: str = "") -> Function:
    def call(*args: Any) -> Any:
        with dispatch.use(policy, only=only):
            return operator(*args)

    return call


@dataclass(frozen=True)
class LeftOut:
    """A case that a device cannot take, and why."""

    name: str
    reason: str


def left_out(sample: Sample, device: str) -> LeftOut | None:
    """Why a sample is not run on a device: it has fp64 arguments and the device no fp64; else None.

    An NPU holds fp64 but computes in none: torch_npu makes fp32 of a cast to it.
    """
    tensors = (a for a in sample.case.arguments if isinstance(a, torch.Tensor))
    if all(t.dtype != torch.float64 for t in tensors) or _computes_in_fp64(device):
        return None
    return LeftOut(sample.name, f"not on {device}: fp64 arguments, and a cast to fp64 gives fp32")


@cache
def _computes_in_fp64(device: str) -> bool:
    return torch.ones(1, device=device).to(torch.float64).dtype == torch.float64


@dataclass(frozen=True)
class Outcome:
    """What a call of an implementation gave: what is compared, or the error that it raised."""

    compared: tuple[object, ...] = ()
    error: str = ""


Observer = Callable[[Sample, str, float, Outcome], None]
"""Is told every outcome, with the implementation's name and the seconds that it took."""


def run_cases(
    found: Sequence[Sample], device: str = "cpu", observe: Observer | None = None
) -> Iterator[CaseResult]:
    """Run each sample on each implementation of the device."""
    for sample in found:
        for name, function in implementations(sample, device).items():
            start = time.perf_counter()
            outcome = _attempt(sample, function, device)
            comparison = verdict(sample, outcome)
            seconds = time.perf_counter() - start
            if observe is not None:
                observe(sample, name, seconds, outcome)
            yield case_result(sample, device, name, seconds, comparison)


def case_result(
    sample: Sample, device: str, implementation: str, seconds: float, comparison: Comparison
) -> CaseResult:
    """A comparison with the names of what was compared."""
    name, case = sample.operator.name, sample.case
    return CaseResult(name, case.profile, case.name, device, implementation, seconds, comparison)


def _attempt(sample: Sample, function: Function, device: str) -> Outcome:
    try:
        return Outcome(sample.call(function, device))
    except (Dsv4Error, *RAISED) as error:
        return Outcome(error=f"{type(error).__name__}: {error}")


def verdict(sample: Sample, outcome: Outcome) -> Comparison:
    """An outcome beside the sample's golden values; an error is beyond every limit."""
    if outcome.error:
        return raised(outcome.error)
    try:
        return sample.judge(outcome.compared)
    except (Dsv4Error, *RAISED) as error:
        return raised(f"{type(error).__name__}: {error}")
