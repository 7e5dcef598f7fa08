"""fp16, which `float` in a specification line takes too: cases with it in bf16's place.

The oracles know it as any other format. The limit is one step of fp16, so that a rounding to bf16
on the way shows.
"""

import dataclasses
from itertools import islice

import pytest
import torch

from dsv4_ascend.parity.compare import compare
from dsv4_ascend.parity.runner import Sample, map_tensors
from dsv4_backend import OPERATORS, dispatch
from dsv4_backend.argspec import TensorSpec

STEP = 2.0**-10
ELEMENTS = 200_000
CASES = 12
COARSE = {"hc_pre_hf32", "hc_head_hf32"}
"""Whose products are less precise than one step: HF32 has 12 bits."""


def takes_half(operator):
    tensors = [spec for spec in operator.specs.values() if isinstance(spec, TensorSpec)]
    return any({torch.float16, torch.bfloat16} <= set(spec.dtypes) for spec in tensors)


TAKE_HALF = {name: op for name, op in OPERATORS.items() if takes_half(op)}
every_operator = pytest.mark.parametrize("operator", TAKE_HALF.values(), ids=TAKE_HALF)


def fits(tensor):
    finite = tensor[tensor.isfinite()].abs()
    return finite.numel() == 0 or finite.max() <= torch.finfo(torch.float16).max


def halved(operator):
    """Cases in bf16 with fp16 in its place, wherever an argument's line takes it."""
    takes = [torch.float16 in getattr(operator.specs.get(n), "dtypes", ()) for n in names(operator)]
    for case in operator.iterate_cases():
        given = list(zip(case.arguments, takes, strict=False))
        wide = [a for a, takes in given if takes and getattr(a, "dtype", None) == torch.bfloat16]
        small = sum(t.numel() for t in wide) <= ELEMENTS
        if case.profile != "ideal" and wide and small and all(map(fits, wide)):
            arguments = (map_tensors(as_half, a) if takes else a for a, takes in given)
            yield Sample(operator, dataclasses.replace(case, arguments=tuple(arguments)))


def names(operator):
    return [a.name for a in getattr(torch.ops.dsv4, operator.name).default._schema.arguments]


def as_half(tensor):
    return tensor.half() if tensor.dtype == torch.bfloat16 else tensor


def limits(operator, found, want):
    """One step where the result is fp16 too; else those of the profile."""
    atol, rtol = operator.tolerance.limits(found.case.profile)
    fine = want.dtype == torch.float16 and operator.name not in COARSE
    return (max(atol, 2.0**-24), STEP) if fine else (atol, rtol)


@every_operator
def test_half_is_computed_as_half(operator):
    cases = list(islice(halved(operator), CASES))
    assert cases, f"no case of {operator.name} has fp16"
    for found in cases:
        for policy in ("auto", "reference"):
            with dispatch.use(policy):
                got = found.call(operator)
            for g, w in zip(found.measured(got), found.golden, strict=True):
                result = compare(g, w, limits(operator, found, w))
                assert result.ok, f"{found.name}: {result.detail}"
