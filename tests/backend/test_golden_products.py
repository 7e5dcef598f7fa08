"""Stored weights and block-scaled products with them against the spec's numbers,
exact arithmetic and ml_dtypes.
"""

import ml_dtypes
import numpy as np
import pytest
import torch
from golden_bits import as_numpy, bits, same_bits, spread
from seeds import generator

from dsv4_backend.errors import ArgumentError
from dsv4_backend.ops import gemm, quant

# Weights


def random_codes(*shape, seed):
    """float8_e4m3fn of random finite bytes."""
    codes = torch.randint(0, 256, shape, generator=generator(seed), dtype=torch.uint8)
    return torch.where(codes & 0x7F == 0x7F, codes - 1, codes).view(torch.float8_e4m3fn)


def random_scales(*shape, low, high, seed):
    return torch.randint(low, high, shape, generator=generator(seed)).to(torch.uint8)


@pytest.mark.parametrize(("n", "k"), [(128, 128), (256, 384), (130, 200), (1, 1)])
def test_fp8_weight_round_trip_is_bit_exact(n, k):
    scale = random_scales(-(-n // 128), -(-k // 128), low=100, high=140, seed=n).view(
        torch.float8_e8m0fnu
    )
    q = random_codes(n, k, seed=k)
    q.view(torch.uint8)[::128, ::128] = 0x7E  # 448 in every tile fixes its scale
    values = quant.dequantize_fp8(q, scale)
    again, scale_again = quant.quantize_weight_fp8(values)
    assert same_bits(again, q)
    assert same_bits(scale_again, scale)
    want = (
        as_numpy(q).astype(np.float32)
        * as_numpy(scale).astype(np.float32).repeat(128, 0).repeat(128, 1)[:n, :k]
    )
    assert np.array_equal(values.numpy(), want)


@pytest.mark.parametrize(("n", "k"), [(128, 128), (5, 64), (33, 96)])
def test_fp4_weight_round_trip_is_bit_exact(n, k):
    scale = random_scales(n, k // 32, low=100, high=140, seed=n).view(torch.float8_e8m0fnu)
    codes = torch.randint(0, 16, (n, k), generator=generator(k), dtype=torch.uint8)
    codes[:, ::32] = 15
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).view(torch.int8)
    values = quant.dequantize_fp4(packed, scale)
    again, scale_again = quant.quantize_weight_fp4(values)
    assert same_bits(again, packed)
    assert same_bits(scale_again, scale)
    want = codes.numpy().view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert np.array_equal(values.numpy(), want * as_numpy(scale).astype(np.float32).repeat(32, 1))


def test_values_survive_a_round_trip_under_a_smaller_scale():
    q = random_codes(128, 256, seed=3)
    q.view(torch.uint8)[:] &= 0xBF  # magnitudes below 2
    values = quant.dequantize_fp8(q, torch.full((1, 2), 2.0**-5).to(torch.float8_e8m0fnu))
    assert same_bits(quant.dequantize_fp8(*quant.quantize_weight_fp8(values)), values)
    half = torch.tensor([0.0, 0.5, -1.0, 1.5]).repeat(4, 16)
    assert same_bits(quant.dequantize_fp4(*quant.quantize_weight_fp4(half)), half)


def test_weight_scales_are_the_smallest_powers_of_two():
    w = spread(256, 384, seed=7)
    w[:128, :128] = 0
    _, scale = quant.quantize_weight_fp8(w)
    amax = w.view(2, 128, 3, 128).abs().amax((1, 3)).double()
    exponent = bits(scale).double() - 127
    assert exponent[0, 0] == -126
    assert (amax <= 448 * exponent.exp2()).all()
    assert (amax > 448 * (exponent - 1).exp2())[amax > 0].all()


def test_fp4_weights_become_fp8_without_loss():
    scale = random_scales(256, 8, low=118, high=124, seed=0).view(torch.float8_e8m0fnu)
    values = quant.dequantize_fp4(torch.randint(-128, 128, (256, 128)).to(torch.int8), scale)
    assert torch.equal(quant.dequantize_fp8(*quant.quantize_weight_fp8(values)), values)


# Products


def blockwise(x, x_scale, weight, column_scale, width):
    """Spec 6.3 in numpy: an exact dot per block of `width`, times (s_x * s_w), added up."""
    x, weight = as_numpy(x).astype(np.float64), weight.astype(np.float64)
    s_x, y = as_numpy(x_scale).astype(np.float64), np.zeros((x.shape[0], weight.shape[0]))
    for start in range(0, x.shape[1], width):
        dot = x[:, start : start + width] @ weight[:, start : start + width].T
        y += dot * s_x[:, start // 128, None] * column_scale[:, start // width]
    return torch.from_numpy(y)


def assert_bf16_of(got, exact):
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=1e-5)


def test_fp8_gemm_is_the_block_sum_of_spec_6_3():
    q, scale = quant.act_quant(spread(9, 320, seed=1).clamp(-8, 8).to(torch.bfloat16), 128)
    weight, weight_scale = quant.quantize_weight_fp8(spread(200, 320, seed=2).clamp(-1, 1))
    rows = as_numpy(weight_scale).astype(np.float64).repeat(128, 0)[:200]
    assert_bf16_of(
        gemm.fp8_gemm(q, scale, weight, weight_scale),
        blockwise(q, scale, as_numpy(weight), rows, 128),
    )


def test_fp4_grouped_gemm_is_the_block_sum_of_spec_6_3():
    q, scale = quant.act_quant(spread(9, 320, seed=1).clamp(-8, 8).to(torch.bfloat16), 128)
    experts = [quant.quantize_weight_fp4(spread(40, 320, seed=e).clamp(-1, 1)) for e in range(3)]
    offsets = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    weight, weight_scales = (torch.stack(parts) for parts in zip(*experts, strict=True))
    got = gemm.fp4_grouped_gemm(q, scale, weight, weight_scales, offsets)
    for e, rows in ((0, slice(0, 4)), (2, slice(4, 9))):
        packed, weight_scale = experts[e]
        codes = np.stack([bits(packed).numpy() & 15, bits(packed).numpy() >> 4], -1).reshape(
            40, 320
        )
        values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
        want = blockwise(
            q[rows], scale[rows], values, as_numpy(weight_scale).astype(np.float64), 32
        )
        assert_bf16_of(got[rows], want)


# Refusals


def fp8_arguments():
    q, scale = quant.act_quant(torch.ones(4, 128), 128)
    return q, scale, *quant.quantize_weight_fp8(torch.ones(8, 128))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: gemm.fp8_gemm(fp8_arguments()[0], None, *fp8_arguments()[2:]),
            "argument 'x_scale': found None",
        ),
        (
            lambda: gemm.fp8_gemm(torch.ones(4, 128), *fp8_arguments()[1:]),
            "argument 'x_scale': found a scale",
        ),
    ],
)
def test_refusals_name_operator_argument_and_value(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()
