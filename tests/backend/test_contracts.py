"""Every contract is complete, its cases hold, and its registration is truthful."""

import inspect

import pytest
import torch

from dsv4_ascend.parity.compare import compare
from dsv4_ascend.parity.report import reproduce
from dsv4_ascend.parity.runner import map_tensors, mutated_arguments, run_cases, samples
from dsv4_backend import OPERATORS
from dsv4_backend.argspec import TensorSpec

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CODES = (torch.float8_e4m3fn, torch.float8_e8m0fnu)
SAMPLES = 3
EVERY_SAMPLE = ("test_schema", "test_autograd_registration", "test_faketensor")
COMPILED = ("test_aot_dispatch_dynamic",)
# Tracing costs seconds per sample: these have gradients and none in turn; all in the long tier.
COMPILED_EVERY = 5

every_operator = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)


def same(first, second):
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return compare(first, second, (0, 0)).ok if isinstance(first, torch.Tensor) else first == second


def test_every_row_of_the_inventory_has_an_operator():
    assert {row for op in OPERATORS.values() for row in op.rows} >= set(range(1, 25))


@every_operator
def test_contract_is_complete(operator):
    cases = list(operator.iterate_cases())
    names = [(c.profile, c.name) for c in cases]
    assert len(inspect.cleandoc(operator.__doc__).splitlines()) >= 3
    assert "spec/v4.md" in operator.__doc__
    assert len(operator.tolerance.reason.split()) >= 5
    assert len(operator.faults) >= 8
    assert len(names) == len(set(names))
    tensors = [spec for spec in operator.specs.values() if isinstance(spec, TensorSpec)]
    if any({torch.float32, torch.bfloat16} <= set(spec.dtypes) for spec in tensors):
        assert {c.profile for c in cases} == {"ideal", "official"}


@every_operator
def test_every_tensor_argument_is_specified(operator):
    schema = getattr(torch.ops.dsv4, operator.name).default._schema
    tensors = {a.name for a in schema.arguments if "Tensor" in str(a.type)}
    numbers = {a.name for a in schema.arguments if str(a.type) in ("int", "float")}
    specified = {name for name, spec in operator.specs.items() if isinstance(spec, TensorSpec)}
    assert specified == tensors
    assert set(operator.specs) - specified <= numbers


@every_operator
def test_cases_are_the_same_every_time(operator):
    for first, second in zip(operator.iterate_cases(), operator.iterate_cases(), strict=True):
        assert first.name == second.name
        assert same(first.arguments, second.arguments)


@every_operator
def test_zero_tokens_are_a_case(operator):
    assert any(
        isinstance(a, torch.Tensor) and a.numel() == 0
        for c in operator.iterate_cases()
        for a in c.arguments
    ), "no case has an empty tensor"


@every_operator
def test_cases_hold(operator):
    failures = [r for r in run_cases(list(samples(operator))) if not r.comparison.ok]
    assert not failures, "\n".join(
        f"{r.name}: {r.comparison.detail}  $ {reproduce(r)}" for r in failures
    )


def opcheck_arguments(operator):
    """Arguments of SAMPLES cases spread over all, every other one with gradients required;
    none whose result has NaN.

    opcheck compares with itself under torch.compile and takes NaN for a difference.
    """
    cases = [c for c in operator.iterate_cases() if not gives_nan(operator, c)]
    picked = (
        cases
        if len(cases) <= SAMPLES
        else [cases[i * len(cases) // SAMPLES] for i in range(SAMPLES)]
    )
    for i, case in enumerate(picked):
        yield tuple(require_gradients(operator, case)) if i % 2 else case.arguments


def gives_nan(operator, case):
    arguments = [map_tensors(torch.clone, a) for a in case.arguments]
    result = operator.reference(*arguments)
    outputs = result if isinstance(result, tuple | list) else [result]
    tensors = [
        t for t in (*outputs, *arguments) if isinstance(t, torch.Tensor) and t.dtype in FLOATS
    ]
    return any(t.isnan().any() for t in tensors)


def require_gradients(operator, case):
    written = mutated_arguments(operator)
    for i, argument in enumerate(case.arguments):
        yield argument if i in written else map_tensors(with_gradient, argument)


def with_gradient(tensor):
    return tensor.detach().clone().requires_grad_() if tensor.dtype in FLOATS else tensor


@pytest.fixture
def float8_in_opcheck(monkeypatch):
    """opcheck looks for silent writes with torch.allclose, which knows no float8."""
    allclose = torch.allclose

    def compare_float8_by_bytes(first, second, **limits):
        if first.dtype in (torch.float8_e4m3fn, torch.float8_e8m0fnu):
            return torch.equal(first.view(torch.uint8), second.view(torch.uint8))
        return allclose(first, second, **limits)

    monkeypatch.setattr(torch, "allclose", compare_float8_by_bytes)


@every_operator
@pytest.mark.usefixtures("float8_in_opcheck")
def test_registration_is_truthful(operator, request):
    compiled_every = 1 if request.config.getoption("--long") else COMPILED_EVERY
    overload = getattr(torch.ops.dsv4, operator.name).default
    for i, arguments in enumerate(opcheck_arguments(operator)):
        tests = EVERY_SAMPLE + (() if i % compiled_every else COMPILED)
        results = torch.library.opcheck(overload, arguments, test_utils=tests)
        assert results == dict.fromkeys(tests, "SUCCESS")
