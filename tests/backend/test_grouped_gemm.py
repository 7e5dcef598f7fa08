"""Grouped products of float experts: gradients, tracing, refusals."""

import pytest
import torch

from dsv4_backend.errors import ArgumentError
from dsv4_backend.ops import gemm


def experts_and_rows():
    weight = torch.randn(4, 6, 10, requires_grad=True)
    return (
        torch.randn(7, 10, requires_grad=True),
        weight,
        torch.tensor([0, 3, 3, 6, 7], dtype=torch.int32),
    )


def test_gradients_of_grouped_gemm_reach_every_expert():
    x, weight, offsets = experts_and_rows()
    y = gemm.grouped_gemm(x, weight, offsets)
    want = torch.stack([x[t] @ weight[e].T for t, e in enumerate([0, 0, 0, 2, 2, 2, 3])])
    torch.testing.assert_close(y, want)
    gradients = torch.autograd.grad(y.square().sum(), [x, weight])
    expected = torch.autograd.grad(want.square().sum(), [x, weight])
    torch.testing.assert_close(gradients, expected)
    assert gradients[1][1].eq(0).all()


def test_no_rows_give_every_expert_a_zero_gradient():
    _, weight, _ = experts_and_rows()
    y = gemm.grouped_gemm(torch.zeros(0, 10), weight, torch.zeros(5, dtype=torch.int32))
    (gradient,) = torch.autograd.grad(y.sum(), weight)
    assert y.shape == (0, 6)
    assert gradient.eq(0).all()


def test_traced_grouped_gemm_equals_the_sliced_one():
    x, weight, offsets = experts_and_rows()
    traced = torch.compile(
        lambda *a: torch.ops.dsv4.grouped_gemm(*a), backend="aot_eager", dynamic=True
    )
    torch.testing.assert_close(traced(x, weight, offsets), gemm.grouped_gemm(x, weight, offsets))
    got, want = (
        torch.autograd.grad(f(x, weight, offsets).sum(), [x, weight])
        for f in (traced, gemm.grouped_gemm)
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("offsets", [[0, 3, 2, 7, 7], [1, 3, 3, 6, 7], [0, 3, 3, 6, 6], [0, 3, 7]])
def test_offsets_that_do_not_add_up_are_refused(offsets):
    x, weight, _ = experts_and_rows()
    with pytest.raises(ArgumentError, match="argument 'expert_offsets'"):
        gemm.grouped_gemm(x, weight, torch.tensor(offsets, dtype=torch.int32))


def test_no_experts_are_refused():
    with pytest.raises(
        ArgumentError, match=r"'weight': found shape \(0, 6, 10\), expected at least 1 expert"
    ):
        gemm.grouped_gemm(
            torch.ones(0, 10), torch.ones(0, 6, 10), torch.zeros(1, dtype=torch.int32)
        )
