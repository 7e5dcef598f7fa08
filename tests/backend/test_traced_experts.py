"""Products by expert while torch traces, where expert offsets have no values."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from dsv4_ascend.parity.mutants import mutants
from dsv4_backend import OPERATORS
from dsv4_backend.proofs.by_expert import traced_only

NAMES = (
    "int8_grouped_gemm",
    "int8_grouped_sum",
    "int8_swiglu_quant",
    "mxfp8_grouped_gemm",
    "mxfp4_grouped_gemm",
)
CASES = {"int8_swiglu_quant": "(2, 5, 0, 1) 130, limit 10.0"}


def arguments(name):
    """Arguments of a case of several experts, the first with rows."""
    wanted = CASES.get(name, "(4, 1, 7) ")
    return next(case.arguments for case in OPERATORS[name].iterate_cases() if case.name.startswith(wanted))


def traced(name, function):
    """The results of a program that was traced with other offsets; the offsets are the last tensor."""
    given = arguments(name)
    place = max(i for i, a in enumerate(given) if isinstance(a, torch.Tensor))
    tensors, rest = given[: place + 1], given[place + 1 :]
    offsets = torch.full_like(tensors[-1], int(tensors[-1][-1]))
    offsets[0] = 0
    program = make_fx(lambda *t: function(*t, *rest), tracing_mode="fake")(*tensors[:-1], offsets)
    result = program(*tensors)
    return result if isinstance(result, tuple) else (result,)


def equal(found, wanted):
    pairs = zip(found, wanted, strict=True)
    return all(a.shape == b.shape and torch.allclose(a.float(), b.float(), 2**-7, 1e-5) for a, b in pairs)


@pytest.mark.parametrize("name", NAMES)
def test_the_traced_reference_computes_what_every_expert_computes(name):
    result = OPERATORS[name](*arguments(name))
    assert equal(traced(name, OPERATORS[name].reference), result if isinstance(result, tuple) else (result,))


FUNCTIONS = {
    "int8_swiglu_quant": "swiglu_codes",
    "mxfp8_grouped_gemm": "grouped",
    "mxfp4_grouped_gemm": "grouped",
}


@pytest.mark.parametrize("name", NAMES)
def test_mutants_of_the_traced_branch_are_caught(name):
    result = OPERATORS[name](*arguments(name))
    want = result if isinstance(result, tuple) else (result,)
    named = {mutant.name: mutant.run for mutant in mutants(OPERATORS[name])}
    survivors = []
    for mutant in traced_only(FUNCTIONS.get(name, name)):
        try:
            got = traced(name, named[mutant])
        except (RuntimeError, IndexError):
            continue
        survivors += [mutant] * equal(got, want)
    assert not survivors
