"""The gate against the golden values and the invariants of spec/v4.md 5.1 and 15.2."""

import math

import pytest
import torch

from dsv4_backend import OPERATORS
from dsv4_backend.errors import ArgumentError
from dsv4_backend.ops.gate import expert_scores, gate_hash, gate_topk, sqrt_softplus

GOLDEN = {
    -20.0: 4.540e-5,
    -5.0: 0.08194723,
    -1.0: 0.55969787,
    0.0: 0.83255464,
    1.0: 1.14597631,
    5.0: 2.23756909,
    20.0: 4.472136,
    25.0: 5.0,
}


def one_hot_router(logits):
    """x and weight whose logits are exactly `logits` [T, E] (values that bf16 holds)."""
    return torch.eye(logits.shape[0]), logits.t().contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("logit", "score"), GOLDEN.items())
def test_scores_are_the_golden_ones(logit, score, dtype):
    digits = 4 if logit == -20 else 7
    found = sqrt_softplus(torch.tensor(logit, dtype=dtype)).item()
    assert found == pytest.approx(score, rel=0.5 * 10.0 ** (1 - digits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_golden_scores_over_their_sum(dtype):
    logits = torch.tensor([list(GOLDEN)], dtype=dtype)
    x, weight = (t.to(dtype) for t in one_hot_router(logits))
    weights, ids = gate_topk(x, weight, torch.zeros(8), 8, 2.5)
    scores = torch.tensor(list(GOLDEN.values()))
    assert ids.tolist() == [[7, 6, 5, 4, 3, 2, 1, 0]]
    torch.testing.assert_close(
        weights, (2.5 * scores / scores.sum()).flip(0).unsqueeze(0), rtol=1e-6, atol=1e-8
    )


def test_outputs_are_fp32_and_int32():
    x, weight = torch.randn(3, 8, dtype=torch.bfloat16), torch.randn(5, 8, dtype=torch.bfloat16)
    for weights, ids in (
        gate_topk(x, weight, torch.zeros(5), 2, 1.5),
        gate_hash(x, weight, torch.tensor([0, 1, 0]), torch.tensor([[4, 0], [2, 3]]), 1.5),
    ):
        assert (weights.dtype, ids.dtype, weights.shape, ids.shape) == (
            torch.float32,
            torch.int32,
            (3, 2),
            (3, 2),
        )
        torch.testing.assert_close(weights.sum(-1), torch.full((3,), 1.5))


def test_ties_take_the_smaller_expert_id():
    logits = torch.zeros(1, 9)
    logits[0, 4] = 1.0
    x, weight = one_hot_router(logits)
    assert gate_topk(x, weight, torch.zeros(9), 5, 1.0)[1].tolist() == [[4, 0, 1, 2, 3]]
    assert gate_topk(x, weight, torch.eye(9)[7], 3, 1.0)[1].tolist() == [[7, 4, 0]]


def test_ties_made_by_the_bias_take_the_smaller_expert_id():
    # Softplus is the identity above 20, so the score is 5 whoever computes it.
    x, weight = one_hot_router(torch.tensor([[25.0, -math.inf, 25.0, -math.inf]]))
    _, ids = gate_topk(x, weight, torch.tensor([0.0, 5.0, 0.0, 5.0]), 4, 1.0)
    assert ids.tolist() == [[0, 1, 2, 3]]


def test_bias_never_enters_the_weights():
    x, weight = torch.randn(40, 16), torch.randn(12, 16)
    scores = expert_scores(x, weight)
    weights, ids = gate_topk(x, weight, torch.randn(12) * 3, 4, 1.5)
    chosen = scores.gather(1, ids.long())
    expected = chosen / chosen.sum(-1, keepdim=True) * 1.5
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-7)  # the contract's limits
    assert not torch.equal(ids, gate_topk(x, weight, torch.zeros(12), 4, 1.5)[1])


def test_a_constant_added_to_every_bias_changes_nothing():
    x, weight, bias = torch.randn(40, 16), torch.randn(12, 16), torch.randn(12)
    reference = gate_topk(x, weight, bias, 4, 1.5)
    for constant in (0.5, -3.0, 8.0):
        for got, want in zip(gate_topk(x, weight, bias + constant, 4, 1.5), reference, strict=True):
            assert torch.equal(got, want)


def test_gradients_reach_weight_and_input_but_not_the_bias():
    x, weight, bias = (torch.randn(*s, requires_grad=True) for s in ((5, 6), (7, 6), (7,)))
    weights, _ = gate_topk(x, weight, bias, 3, 1.5)
    weights.square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert weight.grad.abs().sum() > 0
    assert bias.grad is None


def test_hash_uses_the_experts_of_a_row_as_given():
    x, weight = one_hot_router(torch.tensor([[0.0, 1.0, 5.0]]))
    weights, ids = gate_hash(
        x, weight, torch.tensor([2]), torch.tensor([[0, 0], [1, 1], [1, 1]]), 3.0
    )
    assert ids.tolist() == [[1, 1]]
    assert weights.tolist() == [[1.5, 1.5]]


def test_unknown_experts_and_tokens_are_refused():
    x, weight, table = torch.randn(2, 4), torch.randn(3, 4), torch.tensor([[0, 1], [2, 3]])
    with pytest.raises(ArgumentError, match=r"gate_hash.*tid2eid.*3 at \[1, 1\]"):
        gate_hash(x, weight, torch.tensor([0, 1]), table, 1.5)
    gate_hash(x, weight, torch.tensor([0, 0]), table, 1.5)
    with pytest.raises(ArgumentError, match=r"gate_hash.*input_ids.*2"):
        gate_hash(x, weight, torch.tensor([0, 2]), table, 1.5)
    for k in (0, 4):
        with pytest.raises(ArgumentError, match=r"gate_topk.*'k'"):
            gate_topk(x, weight, torch.zeros(3), k, 1.5)


def test_case_scores_are_equal_or_clearly_apart():
    """The exact ids that the cases demand do not hang on the order of an fp32 sum."""
    for case in OPERATORS["gate_topk"].iterate_cases():
        x, weight, bias = (t.double() for t in case.arguments[:3])
        best = (
            (expert_scores(x, weight) + bias)
            .sort(-1, descending=True)
            .values[:, : case.arguments[3] + 1]
        )
        gaps = -best.diff(dim=-1)
        assert not ((gaps > 1e-12) & (gaps < 4e-6)).any(), case.name
