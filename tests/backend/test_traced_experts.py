"""Products by expert while torch traces, where expert offsets have no values."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from dsv4_ascend.parity.mutants import mutants
from dsv4_backend import OPERATORS
from dsv4_backend.proofs.by_expert import TRACED_ONLY

NAMES = (
    "grouped_gemm",
    "fp8_grouped_gemm",
    "fp4_grouped_gemm",
    "int8_grouped_gemm",
    "int8_grouped_sum",
    "int8_swiglu_quant",
    "mxfp8_grouped_gemm",
    "mxfp4_grouped_gemm",
    "mxfp4_tiled_grouped_gemm",
)
CASES = {"int8_swiglu_quant": "(2, 5, 0, 1) 130, limit 10.0"}


def arguments(name):
    """Arguments of a case of several experts, the first with rows; quantised where it may be."""
    wanted = CASES.get(name, "(4, 1, 7) ")
    named = (
        case.arguments for case in OPERATORS[name].iterate_cases() if case.name.startswith(wanted)
    )
    return next(given for given in named if given[1] is not None)


def traced(name, function):
    """The results of a program that was traced with other offsets;
    the offsets are the last tensor.
    """
    given = arguments(name)
    place = max(i for i, a in enumerate(given) if isinstance(a, torch.Tensor))
    tensors, rest = given[: place + 1], given[place + 1 :]
    offsets = torch.full_like(tensors[-1], int(tensors[-1][-1]))
    offsets[0] = 0
    program = make_fx(lambda *t: function(*t, *rest), tracing_mode="fake")(*tensors[:-1], offsets)
    result = program(*tensors)
    return result if isinstance(result, tuple) else (result,)


def equal(found, wanted):
    return all(same(*pair) for pair in zip(found, wanted, strict=True))


def same(a, b):
    loose = 2**-7 if b.dtype == torch.bfloat16 else 1.3e-6
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), loose, 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_traced_reference_computes_what_every_expert_computes(name):
    result = OPERATORS[name](*arguments(name))
    assert equal(
        traced(name, OPERATORS[name].reference), result if isinstance(result, tuple) else (result,)
    )


@pytest.mark.parametrize("name", NAMES)
def test_mutants_of_the_traced_branch_are_caught(name):
    result = OPERATORS[name](*arguments(name))
    want = result if isinstance(result, tuple) else (result,)
    only = {
        m.name: m.run
        for m in mutants(OPERATORS[name])
        if m.name.startswith(TRACED_ONLY.removesuffix("*"))
    }
    assert len(only) >= 6
    survivors = []
    for mutant, run in only.items():
        try:
            got = traced(name, run)
        except (RuntimeError, IndexError):
            continue
        survivors += [mutant] * equal(got, want)
    assert not survivors
