"""Quantisation against the spec's numbers, exact arithmetic and ml_dtypes."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from golden_bits import bits, same_bits, spread

from dsv4_backend.errors import ArgumentError
from dsv4_backend.ops import formats, quant

EXAMPLE = (0.10009765625, -0.369140625, 1, 2.71875, -3.5, 0.0009765625, 5, -0.0625)
# Magnitudes, from 0 to the largest.
FINITE_BF16 = torch.arange(0x7F80).to(torch.int16).view(torch.bfloat16)
FORMATS = {"e4m3": (448.0, 1e-4), "e2m1": (6.0, 6 * 2.0**-126)}

every_format = pytest.mark.parametrize(("largest", "floor"), FORMATS.values(), ids=FORMATS)


# Spec examples


def test_act_quant_example_of_spec_6_1():
    x = torch.tensor(EXAMPLE, dtype=torch.bfloat16)
    q, scale = quant.act_quant(x, 128)
    assert scale.view(torch.uint8).tolist() == [127 - 6]
    want = torch.tensor(
        [0.1015625, -0.375, 1, 2.75, -3.5, 0.0009765625, 5, -0.0625], dtype=torch.bfloat16
    )
    assert same_bits(quant.act_qdq(x, 128, 8), want)
    assert torch.equal(q.float() / 64, want.float())


def test_fp4_example_of_spec_6_2():
    x = torch.tensor(EXAMPLE, dtype=torch.bfloat16)
    packed, scale = quant.fp4_quant(x, 32)
    assert scale.view(torch.uint8).tolist() == [127]
    want = torch.tensor([0, -0.5, 1, 3, -4, 0, 4, -0.0], dtype=torch.bfloat16)
    assert same_bits(quant.fp4_qdq(x, 32), want)
    codes = [0, 9, 2, 5, 14, 0, 6, 8]
    assert packed.view(torch.uint8).tolist() == [
        low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)
    ]


def test_fp4_ties_of_spec_6_2():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    want = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0])
    assert same_bits(quant.fp4_qdq(ties, 32), want)
    assert same_bits(quant.fp4_qdq(-ties, 32), -want)


# Exponent rule


def assert_smallest_power(amax, floor, largest):
    exponent = formats.scale_bytes(amax.float().clamp(min=floor), largest).double() - 127
    exact = amax.float().clamp(min=floor).double()
    assert (exact <= largest * exponent.exp2()).all()
    assert (exact > largest * (exponent - 1).exp2()).all()
    return exponent


@every_format
def test_exponent_is_the_exact_ceiling_for_every_bf16(largest, floor):
    exponent = assert_smallest_power(FINITE_BF16, floor, largest)
    assert len(FINITE_BF16) == 32640
    assert (exponent.min(), exponent.max()) == ((-22, 120) if largest == 448 else (-126, 126))


@every_format
def test_exponent_is_the_exact_ceiling_for_every_fp32_mantissa(largest, floor):
    mantissas = (torch.arange(2**23, dtype=torch.int32) | 127 << 23).view(torch.float32)
    assert_smallest_power(mantissas, floor, largest)


@every_format
def test_amax_one_ulp_above_the_largest_value_doubles_the_scale(largest, floor):
    amax = largest * torch.arange(-10.0, 100.0).exp2()
    bytes_at, bytes_above = (
        formats.scale_bytes(a, largest).int() for a in (amax, amax.nextafter(amax * 2))
    )
    assert torch.equal(bytes_at, torch.arange(-10, 100, dtype=torch.int32) + 127)
    assert torch.equal(bytes_above, bytes_at + 1)


def test_zero_blocks_have_the_floored_scale():
    x = torch.zeros(2, 192, dtype=torch.bfloat16)
    q, scale = quant.act_quant(x, 128)
    assert bits(q).eq(0).all()
    assert bits(scale).eq(127 - 22).all()
    packed, scale = quant.fp4_quant(x, 32)
    assert packed.eq(0).all()
    assert bits(scale).eq(1).all()


# Value formats against ml_dtypes


def hard_values(code_values):
    """Every code, every tie, their neighbours, random values,
    and all finite bf16, of both signs.
    """
    ties = (code_values[1:] + code_values[:-1]) / 2
    points = torch.cat([code_values, ties])
    neighbours = [points.nextafter(torch.full_like(points, limit)) for limit in (0.0, math.inf)]
    largest = code_values.max()
    random = torch.rand(4096) * largest
    values = torch.cat([points, *neighbours, random, FINITE_BF16.float()]).clamp(max=largest)
    return torch.cat([values, -values])


def test_e4m3_rounding_is_ml_dtypes():
    codes = torch.arange(127, dtype=torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    values = hard_values(torch.from_numpy(codes.astype(np.float32)))
    want = values.numpy().astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert np.array_equal(bits(formats.round_e4m3(values)).numpy(), want)


def test_e2m1_rounding_is_ml_dtypes():
    codes = np.arange(8, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn)
    values = hard_values(torch.from_numpy(codes.astype(np.float32)))
    want = values.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    assert np.array_equal(formats.round_e2m1(values).numpy(), want)


def test_values_beyond_the_range_are_clamped_and_nan_has_one_code():
    beyond = torch.tensor([449.0, 1e30, math.inf, -449.0, math.nan, -math.nan])
    assert bits(formats.round_e4m3(beyond)).tolist() == [0x7E, 0x7E, 0x7E, 0xFE, 0x7F, 0x7F]
    assert formats.round_e2m1(beyond).tolist() == [7, 7, 7, 15, 0, 0]


@pytest.mark.parametrize(
    ("decode", "dtype", "codes"),
    [
        (formats.scale_values, "float8_e8m0fnu", 256),
        (lambda b: formats.e4m3_values(b.view(torch.float8_e4m3fn)), "float8_e4m3fn", 256),
        (formats.e2m1_values, "float4_e2m1fn", 16),
    ],
    ids=["e8m0", "e4m3", "e2m1"],
)
def test_every_code_decodes_as_in_ml_dtypes(decode, dtype, codes):
    every = torch.arange(codes, dtype=torch.uint8)
    want = every.numpy().view(getattr(ml_dtypes, dtype)).astype(np.float32)
    assert np.array_equal(decode(every).numpy(), want, equal_nan=True)
    assert np.array_equal(
        np.signbit(decode(every).numpy())[~np.isnan(want)], np.signbit(want)[~np.isnan(want)]
    )


def second_opinion(x, block_size, largest, floor, dtype):
    """Codes and E8M0 bytes of x [T, K] from numpy,
    ml_dtypes and exact powers of two: none of the code under test.
    """
    codes, scales = [], []
    for start in range(0, x.shape[1], block_size):
        block = x[:, start : start + block_size].double().numpy()
        amax = np.maximum(np.abs(block).max(1), floor)
        mantissa, exponent = np.frexp(amax / largest)
        exponent = np.where(mantissa == 0.5, exponent - 1, exponent)
        codes.append(
            (block / np.exp2(exponent)[:, None]).astype(np.float32).astype(dtype).view(np.uint8)
        )
        scales.append((exponent + 127).astype(np.uint8))
    return np.concatenate(codes, 1), np.stack(scales, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize(("k", "block_size"), [(512, 128), (448, 64), (130, 128), (7, 2)])
def test_act_quant_agrees_with_a_second_opinion(k, block_size, dtype):
    x = spread(33, k).to(torch.bfloat16).to(dtype)
    codes, scales = second_opinion(x, block_size, 448.0, 1e-4, ml_dtypes.float8_e4m3fn)
    q, scale = quant.act_quant(x, block_size)
    assert np.array_equal(bits(q).numpy(), codes)
    assert np.array_equal(bits(scale).numpy(), scales)
    decoded = (
        codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        * np.exp2(scales.astype(int) - 127.0).repeat(block_size, 1)[:, :k]
    )
    assert np.array_equal(quant.act_qdq(x, block_size, k).double().numpy(), decoded)


@pytest.mark.parametrize(("k", "block_size"), [(128, 32), (96, 32), (70, 32)])
def test_fp4_quant_agrees_with_a_second_opinion(k, block_size):
    x = spread(33, k).to(torch.bfloat16)
    codes, scales = second_opinion(x, block_size, 6.0, FORMATS["e2m1"][1], ml_dtypes.float4_e2m1fn)
    packed, scale = quant.fp4_quant(x, block_size)
    assert np.array_equal(bits(packed).numpy(), codes[:, ::2] | codes[:, 1::2] << 4)
    assert np.array_equal(bits(scale).numpy(), scales)


# Properties


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_spoil_their_block_only(special):
    x = spread(2, 256).to(torch.bfloat16)
    x[0, 130] = special
    q, scale = quant.act_quant(x, 128)
    assert bits(q)[0, 128:].eq(0x7F).all()
    assert (bits(scale) == 0xFF).tolist() == [[False, True], [False, False]]
    packed, scale = quant.fp4_quant(x, 32)
    assert packed[0, 64:80].eq(0).all()
    assert (bits(scale) == 0xFF).nonzero().tolist() == [[0, 4]]
    assert quant.act_qdq(x, 128, 256).isnan().sum() == 128
    assert quant.fp4_qdq(x, 32).isnan().sum() == 32


def test_simulated_quantisation_is_idempotent_and_keeps_the_other_channels():
    x = spread(9, 512).to(torch.bfloat16)
    once = quant.act_qdq(x, 64, 448)
    assert same_bits(quant.act_qdq(once, 64, 448), once)
    assert same_bits(once[:, 448:], x[:, 448:])
    once = quant.fp4_qdq(x, 32)
    assert same_bits(quant.fp4_qdq(once, 32), once)


@pytest.mark.parametrize(
    "simulate",
    [lambda x: quant.act_qdq(x, 64, 100), lambda x: quant.fp4_qdq(x, 32)],
    ids=["fp8", "fp4"],
)
def test_gradient_is_straight_through_and_values_keep_the_sign_of_zero(simulate):
    x = spread(3, 128).to(torch.bfloat16)
    x[:, ::3] = -0.0
    trained = x.clone().requires_grad_()
    y = simulate(trained)
    assert same_bits(y.detach(), simulate(x))
    assert y[0, 0].signbit()
    y.backward(gradient := torch.randn(3, 128).to(torch.bfloat16))
    assert torch.equal(trained.grad, gradient)


# Refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quant.act_quant(torch.ones(2, 4), 0), "act_quant: argument 'block_size': found 0"),
        (lambda: quant.act_qdq(torch.ones(2, 4), 4, 5), "act_qdq: argument 'channels': found 5"),
        (
            lambda: quant.fp4_quant(torch.ones(2, 3), 32),
            "fp4_quant: argument 'x': found 3 channels",
        ),
        (lambda: quant.fp4_qdq(torch.ones(2, 3), -1), "fp4_qdq: argument 'block_size': found -1"),
        (
            lambda: quant.quantize_weight_fp4(torch.ones(2, 33)),
            "quantize_weight_fp4: argument 'w': found 33 columns",
        ),
    ],
)
def test_refusals_name_operator_argument_and_value(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()
