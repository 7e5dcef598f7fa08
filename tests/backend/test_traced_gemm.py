"""Grouped products while torch traces, where expert offsets have no values."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from dsv4_ascend.parity.mutants import mutants
from dsv4_backend.ops.gemm import grouped_gemm

WEIGHT = torch.randn(4, 6, 10, generator=torch.Generator().manual_seed(1))
ROWS = torch.randn(7, 10, generator=torch.Generator().manual_seed(9))
OFFSETS = torch.tensor([0, 3, 3, 6, 7], dtype=torch.int32)


def traced(function):
    """The results of a program that was traced with other offsets."""
    program = make_fx(function, tracing_mode="fake")(ROWS, WEIGHT, torch.full_like(OFFSETS, 7))
    return program(ROWS, WEIGHT, OFFSETS)


def test_the_traced_reference_computes_the_product_of_every_expert():
    torch.testing.assert_close(traced(grouped_gemm.reference), grouped_gemm(ROWS, WEIGHT, OFFSETS))


TRACED_ONLY = {m.name: m.run for m in mutants(grouped_gemm) if m.name.startswith("_traced_product:")}


def test_the_traced_branch_has_mutants():
    assert len(TRACED_ONLY) >= 6


@pytest.mark.parametrize("name", sorted(TRACED_ONLY))
def test_mutants_of_the_traced_branch_are_caught(name):
    want = grouped_gemm(ROWS, WEIGHT, OFFSETS)
    try:
        got = traced(TRACED_ONLY[name])
    except (RuntimeError, IndexError):
        return
    assert got.shape != want.shape or not torch.allclose(got, want)
