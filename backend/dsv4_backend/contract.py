"""What an operator is: a schema, a reference, argument specifications,
parity cases, named faults and a tolerance.

    @operator(
        "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
        rows=(5,),
        arguments={"x": "float [..., d]", "weight": "float [d]"},
        tolerance=Tolerance(...),
    )
    def rms_norm(x, weight, eps): ...   # the reference; its docstring is the specification

and proved beside it, in `proofs/<family>.py`, which is loaded when somebody asks for a proof:

    @rms_norm.cases
    def _(draw): yield Case("3x7", "ideal", (draw.normal(3, 7), draw.normal(7), 1e-6))

    @rms_norm.oracle
    def _(x, weight, eps): ...          # the same result by another formula, in NumPy

    rms_norm.wrong_arguments({"epsilon left out": {"eps": 0.0}})   # named faults: see `faults`

Registration with torch, fake kernel, autograd, opcheck samples, fuzzing, parity and the coverage
table follow from it.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

import torch
from typing_extensions import ParamSpec, TypeVar

from dsv4_backend import argspec, declared
from dsv4_backend.argspec import Spec
from dsv4_backend.errors import ProofError, argument_error
from dsv4_backend.faults import Faults
from dsv4_backend.relations import Compiled, Relation, compiled

PROFILES = {
    "ideal": "fp32, no quantise-dequantise",
    "official": "bf16 tensors and the rounding points of spec section 10",
    "bf16": "what every Ascend chip computes in bf16, nothing quantised (spec/deployments.md)",
    "a2a3-int8": "what Ascend A2 and A3 compute in deployment (spec/deployments.md)",
    "a5-mx": "what Ascend A5 computes in deployment (spec/deployments.md)",
}
"""Name -> what it is. The only place that says which profiles there are."""
DEPLOYMENTS = ("a2a3-int8", "a5-mx")

Limits = tuple[float, float]
Reference = Callable[..., Any]
Oracle = Callable[..., Any]
_Parameters = ParamSpec("_Parameters", default=...)
_Result = TypeVar("_Result", default=Any)
# mypy loses the link between the arguments of `operator` and its result when defaults are set.
_P = ParamSpec("_P")
_R = TypeVar("_R")


class Tolerance:
    """Limit on |got - want| <= atol + rtol * |want|, elementwise, per profile,
    with the reason for the numbers.

    limits: (atol, rtol) by profile; (0, 0), which a profile without limits has, means bit equality.
    NaN and infinities must sit at the same places. No element is exempt. ValueError for a name that
    is no profile, for no reason, and for limits that are no two finite numbers >= 0.
    """

    def __init__(self, reason: str, **limits: Limits) -> None:
        if not reason.strip():
            raise ValueError("tolerance: found no reason, expected one that a reader can check")
        for name, pair in limits.items():
            _check_profile(name)
            if not _is_limits(pair):
                expected = "(atol, rtol), two finite numbers >= 0"
                raise ValueError(f"tolerance of {name}: found {pair!r}, expected {expected}")
        self.reason = reason
        self._limits = limits

    def limits(self, profile: str) -> Limits:
        """(atol, rtol) for a profile; ValueError for a name that is none."""
        return self._limits.get(_check_profile(profile), (0.0, 0.0))


@dataclass(frozen=True)
class Case:
    """One parity case: arguments in schema order, mutated ones cloned by whoever runs it.

    decided: sums in any order round to the same bits, the oracle's, which are then compared on the
    CPU, whatever the tolerance. ValueError for a name that is no profile.
    """

    name: str
    profile: str
    arguments: tuple[Any, ...]
    decided: bool = False

    def __post_init__(self) -> None:
        _check_profile(self.profile)


def _is_limits(pair: object) -> bool:
    if not isinstance(pair, tuple) or len(pair) != 2:
        return False
    return all(isinstance(x, int | float) and math.isfinite(x) and x >= 0 for x in pair)


def _check_profile(name: str) -> str:
    if name not in PROFILES:
        raise ValueError(f"{name!r} is no profile; profiles are {', '.join(PROFILES)}")
    return name


class Draw:
    """Seeded source of test tensors, always on the CPU; the seed comes from the operator's name."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(
        self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0
    ) -> torch.Tensor:
        """Normal values times `scale`."""
        return (torch.randn(shape, generator=self._generator) * scale).to(dtype)

    def spread(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Signed values whose scale differs by orders of magnitude from row to row."""
        rows = torch.exp2(torch.randint(-8, 9, (*shape[:-1], 1), generator=self._generator).float())
        return (torch.randn(shape, generator=self._generator) * rows).to(dtype)

    def uniform(
        self, *shape: int, low: float = 0.0, high: float = 1.0, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Uniform values in [low, high)."""
        return (torch.rand(shape, generator=self._generator) * (high - low) + low).to(dtype)

    def integers(
        self, *shape: int, low: int = 0, high: int, dtype: torch.dtype = torch.int32
    ) -> torch.Tensor:
        """Uniform integers in [low, high)."""
        return torch.randint(low, high, shape, generator=self._generator).to(dtype)

    def permutation(self, n: int) -> torch.Tensor:
        """A random permutation of 0..n-1, int64."""
        return torch.randperm(n, generator=self._generator)

    def bytes(self, *shape: int) -> torch.Tensor:
        """Uniform bytes, uint8."""
        return torch.randint(0, 256, shape, generator=self._generator, dtype=torch.uint8)


Cases = Callable[[Draw], Iterator[Case]]
Check = Callable[..., None]


@dataclass
class Operator(Faults, Generic[_Parameters, _Result]):
    """One operator contract. Calling it calls `torch.ops.dsv4.<name>`."""

    schema: str
    rows: tuple[int, ...]
    reference: Callable[_Parameters, _Result]
    specs: Mapping[str, Spec]
    tolerance: Tolerance
    relations: Sequence[Relation] = ()
    make_cases: Cases | None = None
    make_golden: Oracle | None = None
    measure: Oracle | None = None
    check_shapes: Check | None = None
    check_contents: Check | None = None
    _equivalents: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        Faults.__init__(self, self.schema, self.reference)
        self.name = self.schema[: self.schema.index("(")]
        self.__doc__ = self.reference.__doc__
        self._proof = self.reference.__module__.replace(".ops.", ".proofs.")
        parameters = inspect.signature(self.reference).parameters
        self._parameters = tuple(parameters)
        self._optional = frozenset(re.findall(r"Tensor\? (\w+)", self.schema))
        self._written = tuple(re.findall(r"Tensor\(\w!\) (\w+)", self.schema))
        self._defaults = tuple(p.default for p in parameters.values())
        self._call: Any = None

    def __call__(self, *args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        """Run through the dispatcher, exactly as `torch.ops.dsv4.<name>`."""
        if self._call is None:
            self._call = getattr(torch.ops.dsv4, self.name).default
        result: _Result = self._call(*args, **kwargs)
        return result

    def cases(self, make: Cases) -> Cases:
        """Decorator: the generator of parity cases."""
        self.make_cases = make
        return make

    def oracle(self, golden: Oracle) -> Oracle:
        """Decorator: a second formula of the result, in NumPy,
        from the specification and not from the reference.

        It gets the arguments as arrays: bf16, FP8 and E8M0 tensors with ml_dtypes' types of the
        same bits, fp32 ones widened to float64 (so that `ideal` results are exact), None and
        numbers as they are. It returns one array or a tuple, float64 where the operator returns
        fp32, and writes the arguments that the operator writes.
        """
        self.make_golden = golden
        return golden

    def measured(self, measure: Oracle) -> Oracle:
        """Decorator: what is compared in place of the result, where several results are right.

        It gets the arguments, the results and the arguments that the operator writes, as it left
        them, as arrays, in NumPy, and returns one array or a tuple.
        """
        self.measure = measure
        return measure

    def equivalent(self, mutant: str, why: str) -> None:
        """Say why an automatic mutant of the reference computes
        what the reference computes (see parity/mutants.py).

        mutant: its name, or "FUNCTION: *" for all edits of a function that decides no value.
        """
        self._equivalents[mutant] = why

    def explain(self, *tables: Mapping[str, str]) -> None:
        """Say which automatic mutants are equivalent, by tables of mutant and reason."""
        for table in tables:
            self._equivalents |= table

    def explains(self, mutant: str) -> bool:
        """Whether a mutant is explained as equivalent, by its name or by its function."""
        return bool({mutant, f"{mutant.partition(':')[0]}: *"} & set(self.equivalents))

    @property
    def faults(self) -> dict[str, Reference]:
        """Named mutants that the cases must tell from the oracle."""
        self.load_proof()
        return self.all_faults()

    @property
    def equivalents(self) -> dict[str, str]:
        """Automatic mutants that no case can tell from the reference, each with its reason."""
        self.load_proof()
        return self._equivalents

    @property
    def golden(self) -> Oracle:
        """The oracle."""
        self.load_proof()
        assert self.make_golden is not None
        return self.make_golden

    def load_proof(self) -> None:
        """Import the family's module in `proofs/`, where cases, oracle and faults are.

        ProofError if there is none, or if it leaves out a part of the proof of one of the
        family's operators.
        """
        family: list[Operator] = [self]
        if ".proofs." in self._proof:
            self._import_proof()
            family = [contract for contract in OPERATORS.values() if contract._proof == self._proof]
        for contract in family:
            contract.check_proof()

    def _import_proof(self) -> None:
        try:
            importlib.import_module(self._proof)
        except ModuleNotFoundError as error:
            if error.name != self._proof:
                raise
            raise self._unproved("no such module") from error

    def check_proof(self) -> None:
        """ProofError unless there are an oracle, cases and faults beside those of outputs."""
        parts = {"oracle": self.make_golden, "cases": self.make_cases, "fault": self._faults}
        missing = [f"@{self.name}.{part}" for part, given in parts.items() if not given]
        if missing:
            raise self._unproved(f"no {' and no '.join(missing)}")

    def _unproved(self, what: str) -> ProofError:
        where = f"backend/{self._proof.replace('.', '/')}.py"
        advice = "write it as docs/adding-an-operator.md shows"
        return ProofError(f"dsv4::{self.name} is not proved: {what} in {where}; {advice}")

    def shapes(self, check: Check) -> Check:
        """Decorator: relations between shapes and scalars
        that neither specification lines nor `relations` can say (no values read).
        """
        self.check_shapes = check
        return check

    def contents(self, check: Check) -> Check:
        """Decorator: relations between values that `relations` cannot say.

        Costs a Python call and its torch operations in every call of the operator. Runs on real
        host tensors only, and not under `dispatch.use(check_contents=False)`.
        """
        self.check_contents = check
        return check

    def rules(self) -> argspec.Rules:
        """The argument lines as the checker takes them;
        ValueError for a line that names what is not there.
        """
        integers = re.findall(r"\bint (\w+)", self.schema)
        return argspec.rules(self.specs, self._parameters, integers, self._optional, self._written)

    def compiled_relations(self) -> Compiled:
        """The relations as the checker takes them; ValueError for one that does not fit."""
        return compiled(self.relations, self.specs, self._parameters, self.rules().names)

    def plain_reference(self, *args: Any) -> Any:
        """The reference with contiguous results: what runs, behind the checks,
        where no kernel does.
        """
        reference: Reference = self.reference
        return _contiguous(reference(*self.with_defaults(args)))

    def with_defaults(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """All arguments of a call:
        torch leaves out trailing ones that equal the schema's defaults.
        """
        return (*args, *self._defaults[len(args) :])

    def reject(self, argument: str, found: object, expected: object) -> Exception:
        """ArgumentError of this operator, for use in `shapes` and `contents` checks."""
        return argument_error(self.name, argument, found, expected)

    def iterate_cases(self) -> Iterator[Case]:
        """The parity cases, the same every time."""
        self.load_proof()
        seed = int.from_bytes(self.name.encode()[:7].ljust(7, b"\0"), "little")
        assert self.make_cases is not None
        return self.make_cases(Draw(seed))


def _contiguous(result: Any) -> Any:
    """One layout for the results of every implementation,
    whatever the strides of the inputs were.
    """
    if isinstance(result, tuple):
        return tuple(_contiguous(item) for item in result)
    return result.contiguous() if isinstance(result, torch.Tensor) else result


OPERATORS: dict[str, Operator] = {}


def operator(
    schema: str,
    *,
    rows: tuple[int, ...],
    arguments: Mapping[str, str],
    tolerance: Tolerance,
    relations: Sequence[Relation] = (),
) -> Callable[[Callable[_P, _R]], Operator[_P, _R]]:
    """Declare an operator over its reference.

    schema: torch schema without namespace; mutated arguments carry `Tensor(a!)`. rows: of
    spec/v4.md section 17.
    arguments: a specification line (see `argspec`) for every tensor and every number; a number may
    have a relation instead. relations: what lines cannot say (see `relations`), in the order of the
    checks. ValueError for a line or a relation that is missing or does not fit, and for a reference
    whose parameters are not the schema's arguments.
    """

    def declare(reference: Callable[_P, _R]) -> Operator[_P, _R]:
        if "Tensor[]" in schema:
            raise ValueError(
                f"{schema!r}: a list of tensors has no specification line, expected one tensor "
                "[E, ...]"
            )
        kinds = declared.kinds_of_arguments(schema, reference)
        unknown = [name for name in arguments if name not in kinds]
        if unknown:
            raise ValueError(f"{schema!r}: no argument is named {unknown[0]!r}, which has a line")
        specs = argspec.parse(arguments, [n for n, kind in kinds.items() if "Tensor" in kind])
        declared.check_numbers(schema, kinds, specs, relations)
        contract = Operator(schema, rows, reference, specs, tolerance, relations)
        contract.compiled_relations()  # what they name must be there
        if contract.name in OPERATORS:
            raise ValueError(f"operator dsv4::{contract.name} is declared twice")
        OPERATORS[contract.name] = contract
        return contract

    return declare


def compute(x: torch.Tensor) -> torch.Tensor:
    """`x` in the accumulation dtype of references: fp32,
    or fp64 when the input is fp64 (golden values).
    """
    return x if x.dtype == torch.float64 else x.float()
