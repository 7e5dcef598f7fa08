"""Hyper-connections, norms, RoPE,
sampling and the MTP input against the spec's numbers and independent formulas.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from seeds import generator, seed_of
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as transformers_v4

from dsv4_backend.errors import ArgumentError
from dsv4_backend.ops.embedding import embed_streams, lm_head
from dsv4_backend.ops.hyper import hc_head, hc_post, hc_pre, sinkhorn
from dsv4_backend.ops.mtp import mtp_combine
from dsv4_backend.ops.norm import head_rms_norm, rms_norm
from dsv4_backend.ops.output_projection import grouped_output_projection
from dsv4_backend.ops.rope import rope, rope_frequencies, yarn_frequencies, yarn_range
from dsv4_backend.ops.sampling import sample

EPS = 1e-6
YARN = {"factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1}
YARN_TABLE = """
    1 0.687656045 0.472870797 0.325172454 0.223606795 0.153764561 0.10573712 0.0727107748
    0.0500000007 0.0343828015 0.0236435402 0.0162586235 0.0111803403 0.00768822804 0.00528685655
    0.00363553851 0.00226562493 0.00139680132 0.000849689706 0.000508081983 0.000296977785
    0.000168179977 9.08678412e-05 4.54442306e-05 1.95312532e-05 5.37231244e-06 3.69430336e-06
    2.5404097e-06 1.74692821e-06 1.20128561e-06 8.260713e-07 5.6805294e-07
"""
SINKHORN_LOGITS = ((0, 1, 2, 3), (1, 0, -1, 2), (-2, 0.5, 0, 1), (3, -1, 0.25, 0))
SINKHORN_RESULT = (
    (0.01986684, 0.18638648, 0.47010639, 0.32363945),
    (0.20375395, 0.25871080, 0.08831183, 0.44922242),
    (0.01204840, 0.50658149, 0.28509742, 0.19627194),
    (0.76432985, 0.04832024, 0.15648337, 0.03086518),
)


def normal(*shape, seed=0, scale=1.0):
    """seed: a number within the test."""
    return torch.randn(shape, generator=generator(seed)) * scale


def largest_difference(got, want):
    return (got.double() - want.double()).abs().max().item()


# Hyper-connections, spec/v4.md 2


def test_sinkhorn_matrix_to_its_printed_digits():
    comb = sinkhorn(torch.tensor(SINKHORN_LOGITS, dtype=torch.float64), 20, EPS)
    assert largest_difference(comb, torch.tensor(SINKHORN_RESULT, dtype=torch.float64)) < 5e-8
    assert largest_difference(sinkhorn(torch.tensor(SINKHORN_LOGITS), 20, EPS), comb) < 1e-7


def test_sinkhorn_of_zeros():
    assert largest_difference(sinkhorn(torch.zeros(4, 4), 20, EPS), torch.tensor(0.24999976)) < 1e-8


def test_sinkhorn_sums_fall_short_of_one_by_epsilon():
    comb = sinkhorn(torch.tensor(SINKHORN_LOGITS, dtype=torch.float64), 20, EPS)
    assert largest_difference(1 - comb.sum(0), torch.tensor(1e-6, dtype=torch.float64)) < 1e-11
    # Rows are one column pass old.
    assert largest_difference(1 - comb.sum(1), torch.tensor(1e-6)) < 5e-7


def hyper_parameters(n, d, seed):
    rows = n * (n + 2)
    return (
        normal(rows, n * d, seed=seed, scale=(n * d) ** -0.5),
        normal(rows, seed=seed + 1),
        normal(3, seed=seed + 2),
    )


@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_hyper_connection_invariants(n):
    for seed in range(20):
        x = normal(
            9, n, 16, seed=seed, scale=2.0 ** (seed % 7)
        ).double()  # fp32 would round a large sigmoid to 1
        _, post, comb = hc_pre(x, *hyper_parameters(n, 16, seed), 20, EPS, EPS)
        assert comb.min() > 0
        assert largest_difference(comb.sum(1), torch.ones(())) < 2e-6
        assert 0 < post.min() <= post.max() < 2


def test_pre_lies_between_epsilon_and_one_plus_epsilon():
    diagonal = normal(50, 4, seed=9) + 3
    fn, base, scale = hyper_parameters(4, 4, 0)
    pre = hc_pre(torch.diag_embed(diagonal), fn * 100, base, scale, 20, EPS, EPS)[0] / diagonal
    assert pre.min() >= EPS * 0.999
    assert pre.min() < 1e-3
    assert pre.max() <= 1 + EPS + 2e-7
    assert pre.max() > 0.999


@pytest.mark.parametrize(("n", "d", "rounds"), [(4, 32, 20), (2, 7, 3), (3, 16, 1)])
def test_hyper_connections_equal_transformers(n, d, rounds):
    config = SimpleNamespace(
        hc_mult=n, hc_sinkhorn_iters=rounds, hc_eps=1e-3, rms_norm_eps=1e-2, hidden_size=d
    )
    module = transformers_v4.DeepseekV4HyperConnection(config)
    fn, base, scale = hyper_parameters(n, d, 5)
    module.load_state_dict({"fn": fn, "base": base, "scale": scale})
    x = normal(11, n, d, seed=6)
    with torch.no_grad():
        post, comb, collapsed = (t[0] for t in module(x.unsqueeze(0)))
    for got, want in zip(
        hc_pre(x, fn, base, scale, rounds, 1e-2, 1e-3), (collapsed, post, comb), strict=True
    ):
        assert largest_difference(got, want) < 2e-6


def test_hyper_head_equals_transformers():
    config = SimpleNamespace(hc_mult=4, hc_eps=1e-3, rms_norm_eps=1e-2, hidden_size=24)
    module = transformers_v4.DeepseekV4HyperHead(config)
    fn, base, scale = normal(4, 96, scale=0.1), normal(4, seed=1), normal(1, seed=2)
    module.load_state_dict({"hc_fn": fn, "hc_base": base, "hc_scale": scale})
    x = normal(7, 4, 24, seed=3)
    with torch.no_grad():
        want = module(x.unsqueeze(0))[0]
    assert largest_difference(hc_head(x, fn, base, scale, 1e-2, 1e-3), want) < 2e-6


def test_hc_post_sums_over_the_first_index_of_comb():
    z, x, post, comb = (
        normal(3, 5),
        normal(3, 4, 5, seed=1),
        normal(3, 4, seed=2),
        normal(3, 4, 4, seed=3),
    )
    want = torch.zeros(3, 4, 5)
    for k in range(4):
        want[:, k] = post[:, k, None] * z + sum(comb[:, j, k, None] * x[:, j] for j in range(4))
    assert largest_difference(hc_post(z, x, post, comb), want) < 2e-6


def test_hc_post_with_identity_adds_the_output_to_every_stream():
    z, x = normal(3, 5).bfloat16(), normal(3, 4, 5, seed=1).bfloat16()
    got = hc_post(z, x, torch.ones(3, 4), torch.eye(4).expand(3, 4, 4))
    assert torch.equal(got, x + z.unsqueeze(1))


# Norms, spec/v4.md 3.1


def test_norms_give_unit_mean_square():
    x = normal(6, 3, 512) * torch.logspace(-2, 4, 6).view(-1, 1, 1)
    for y in (rms_norm(x, torch.ones(512), EPS), head_rms_norm(x, EPS)):
        assert largest_difference(y.square().mean(-1)[1:], torch.ones(())) < 2e-4
        assert (
            largest_difference(y, x / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt())
            < 3e-6
        )


def test_head_norm_rounds_every_step_to_bf16():
    x = normal(64, 4, 512).bfloat16()
    steps = (x * x).float().mean(-1, keepdim=True).bfloat16() + EPS
    want = (x.float() * (1 / steps.double().sqrt()).bfloat16().float()).bfloat16()
    assert torch.equal(head_rms_norm(x, EPS), want)
    once = head_rms_norm(x.float(), EPS)
    relative = ((want.float() - once) / once).abs()[x != 0]
    assert 5e-4 < relative.mean() < 4e-3  # the spec quotes about 3e-3


@pytest.mark.parametrize("rows", [1, 3, 7, 17])
def test_head_norm_of_a_token_has_the_same_bits_in_any_chunk(rows):
    """torch's bf16 rsqrt rounds twice in the rows behind the last full vector."""
    x = normal(40, 3, 64).bfloat16()
    assert torch.equal(
        torch.cat([head_rms_norm(part, EPS) for part in x.split(rows)]), head_rms_norm(x, EPS)
    )


# RoPE, spec/v4.md 3.2, 3.3


def test_yarn_table_to_its_printed_digits():
    assert yarn_range(64, 160000, 65536, 32, 1) == (15, 25)
    printed = torch.tensor([float(word) for word in YARN_TABLE.split()])
    assert torch.equal(yarn_frequencies(64, 160000, **YARN), printed)


def test_yarn_keeps_fast_and_divides_slow_frequencies():
    plain, yarn = rope_frequencies(64, 160000), yarn_frequencies(64, 160000, **YARN)
    assert torch.equal(yarn[:16], plain[:16])
    assert torch.equal(yarn[25:], plain[25:] / 16)
    torch.testing.assert_close(
        yarn_frequencies(64, 160000, **{**YARN, "factor": 1}), plain, rtol=2e-7, atol=0
    )


def test_yarn_of_an_empty_blend_is_a_step():
    low, high = yarn_range(8, 160000, 64, 32, 31)
    assert low == high
    assert yarn_frequencies(8, 160000, 16, 64, 32, 31).isfinite().all()


@pytest.mark.parametrize(("dim", "theta"), [(64, 10000.0), (64, 160000.0), (8, 10000.0)])
def test_frequencies_fall_geometrically(dim, theta):
    exact = theta ** (-np.arange(0, dim, 2) / dim)
    assert np.abs(rope_frequencies(dim, theta).numpy() / exact - 1).max() < 4e-7


def rotated_as_complex_numbers(x, positions, inv_freq, sign):
    """The last 2F channels as complex numbers, times exp(i * fp32 angle) in fp64 by numpy."""
    values = x.double().numpy()
    kept = values.shape[-1] - 2 * len(inv_freq)
    angles = np.float32(positions.numpy())[:, None] * inv_freq.numpy()
    assert angles.dtype == np.float32
    turned = (values[..., kept::2] + 1j * values[..., kept + 1 :: 2]) * np.exp(
        sign * 1j * np.float64(angles)
    )[:, None]
    pairs = np.stack((turned.real, turned.imag), -1).reshape(*values.shape[:-1], -1)
    return torch.from_numpy(np.concatenate((values[..., :kept], pairs), -1))


@pytest.mark.parametrize("inverse", [False, True])
def test_rope_is_a_complex_product_with_an_fp32_angle(inverse):
    x, positions = normal(40, 3, 96), torch.arange(40) * 26_214 + 7  # up to 1.02 million
    inv_freq = yarn_frequencies(64, 160000, **YARN)
    want = rotated_as_complex_numbers(x, positions, inv_freq, -1 if inverse else 1)
    assert largest_difference(rope(x, positions, inv_freq, inverse), want) < 2e-6


def test_rope_equals_transformers():
    x, positions, inv_freq = normal(9, 5, 40), torch.arange(9) + 300, rope_frequencies(16, 10000.0)
    angles = positions[None, :, None].float() * inv_freq
    want = transformers_v4.apply_rotary_pos_emb(
        x.unsqueeze(0), angles.cos(), angles.sin(), unsqueeze_dim=2
    )[0]
    assert largest_difference(rope(x, positions, inv_freq), want) < 1e-6


def test_inverse_rope_undoes_rope():
    x, positions, inv_freq = (
        normal(9, 5, 512),
        torch.arange(9) * 1000,
        rope_frequencies(64, 10000.0),
    )
    turned = rope(x, positions, inv_freq)
    assert largest_difference(rope(turned, positions, inv_freq, True), x) < 2e-6
    assert torch.equal(turned[0], x[0])
    assert torch.equal(turned[..., :448], x[..., :448])


def test_products_depend_on_the_distance_alone():
    q, k, inv_freq = (
        normal(1, 64).double(),
        normal(1, 64, seed=1).double(),
        2.0 ** -torch.arange(32.0),
    )
    at = lambda x, t: rope(x, torch.tensor([t]), inv_freq)  # noqa: E731
    products = [(at(q, t) * at(k, t - 13)).sum().item() for t in (13, 14, 500, 4096)]
    assert max(products) - min(products) < 1e-9


# Embedding, LM head, MTP input, spec/v4.md 2.1, 8.1


def test_embedding_and_head_are_look_up_and_product():
    weight, ids = normal(11, 6), torch.tensor([10, 0, 3], dtype=torch.int32)
    streams = embed_streams(ids, weight, 4)
    assert all(torch.equal(streams[:, j], weight[[10, 0, 3]]) for j in range(4))
    x = normal(5, 6, seed=1).bfloat16()
    logits = lm_head(x, weight.bfloat16())
    assert logits.dtype == torch.float32
    assert largest_difference(logits, x.double() @ weight.bfloat16().double().T) < 1e-6


def test_mtp_input_adds_the_embedding_to_every_stream():
    e, x = normal(3, 160), normal(3, 4, 160, seed=1)
    assert largest_difference(mtp_combine(e, x), x.double() + e.double()[:, None]) < 1e-6
    official = mtp_combine(e.bfloat16(), x.bfloat16())
    assert torch.equal(official, (x.bfloat16().float() + e.bfloat16().float()[:, None]).bfloat16())


# Sampling, spec/v4.md 8.2


def draws(logits, count, temperature, top_p):
    noise = torch.empty(count, len(logits)).exponential_()
    ids = sample(torch.tensor(logits).expand(count, -1), noise, temperature, top_p)
    return torch.bincount(ids, minlength=len(logits)) / count


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (2.0, 1.0), (1.0, 0.75)]
)
def test_samples_follow_the_distribution(temperature, top_p):
    logits = [2.0, 0.5, -1.0, 1.0, 0.0]
    want = torch.softmax(torch.tensor(logits) / temperature, 0)
    if top_p < 1:
        # 0.557, 0.205, 0.124: the third one crosses 0.75 only after the first two hold 0.762.
        want = torch.tensor([want[0], 0, 0, want[3], 0]) / (want[0] + want[3])
    assert largest_difference(draws(logits, 40_000, temperature, top_p), want) < 0.01


def test_temperature_zero_is_argmax_with_the_smaller_id_on_ties():
    logits = torch.tensor([[0.0, 3.0, 3.0], [1.0, 1.0, 1.0], [-5.0, -6.0, -4.0]])
    assert sample(logits, torch.zeros(3, 3), 0.0, 1.0).tolist() == [1, 0, 2]


def test_forbidden_ids_are_never_drawn():
    assert draws([0.0, -float("inf"), 0.0], 1000, 5.0, 1.0)[1] == 0


# Gradients and errors


def leaf(*shape, seed=0):
    source = torch.Generator().manual_seed(seed_of(__name__) + seed)
    return torch.randn(shape, generator=source).double().requires_grad_()


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        (hc_pre, (leaf(2, 3, 4), leaf(15, 12), leaf(15), leaf(3), 3, 1e-2, 1e-2)),
        (hc_post, (leaf(2, 4), leaf(2, 3, 4), leaf(2, 3), leaf(2, 3, 3))),
        (hc_head, (leaf(2, 3, 4), leaf(3, 12), leaf(3), leaf(1), 1e-2, 1e-2)),
        (rms_norm, (leaf(2, 6), leaf(6), 1e-2)),
        (head_rms_norm, (leaf(2, 3, 6), 1e-2)),
        (lambda x: rope(x, torch.tensor([3, 9]), torch.tensor([1.0, 0.1]), True), (leaf(2, 3, 6),)),
        (lambda w: embed_streams(torch.tensor([1, 3, 1]), w, 4), (leaf(5, 2),)),
        (lm_head, (leaf(2, 6), leaf(5, 6))),
        (mtp_combine, (leaf(2, 4), leaf(2, 3, 4))),
        (grouped_output_projection, (leaf(2, 4, 3), leaf(2, 5, 6))),
    ],
)
def test_gradients_equal_finite_differences(operator, arguments):
    assert torch.autograd.gradcheck(operator, arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: embed_streams(torch.tensor([5]), torch.ones(5, 2), 4),
            r"embed_streams.*'input_ids'.*5 at \[0\].*\[0, 5\)",
        ),
        (lambda: embed_streams(torch.tensor([0]), torch.ones(5, 2), 0), r"'hc_mult': found 0"),
        (lambda: lm_head(torch.ones(2, 3), torch.ones(5, 4)), r"lm_head: argument 'weight'"),
        (
            lambda: rope(torch.ones(1, 4), torch.tensor([-1]), torch.ones(2)),
            r"rope: argument 'positions': found -1",
        ),
        (
            lambda: rope(torch.ones(1, 4), torch.tensor([0]), torch.ones(3)),
            r"'inv_freq': found 3 frequencies",
        ),
        (
            lambda: rope(torch.ones(2, 4), torch.tensor([0]), torch.ones(2)),
            r"rope: argument 'x'.*T = 1",
        ),
        (
            lambda: sample(torch.tensor([[0.0, float("nan")]]), torch.ones(1, 2), 1.0, 1.0),
            r"'logits': found .*nan.*row 0",
        ),
        (
            lambda: sample(torch.full((1, 2), -float("inf")), torch.ones(1, 2), 0.0, 1.0),
            r"'logits': found .*-inf",
        ),
        (
            lambda: sample(torch.ones(1, 2), torch.tensor([[1.0, 0.0]]), 1.0, 1.0),
            r"'noise': found 0.0 at \[0, 1\]",
        ),
        (
            lambda: sample(torch.ones(1, 2), torch.ones(1, 2), -1.0, 1.0),
            r"'temperature': found -1.0",
        ),
        (lambda: sample(torch.ones(1, 2), torch.ones(1, 2), 1.0, 0.0), r"'top_p': found 0.0"),
        (
            lambda: head_rms_norm(torch.ones(1, 2), -1.0),
            r"head_rms_norm: argument 'eps': found -1.0",
        ),
        (lambda: rope_frequencies(7, 10000.0), r"'rope_head_dim': found 7"),
        (lambda: yarn_frequencies(8, 10000.0, 0, 64, 32, 1), r"'factor': found 0"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()
