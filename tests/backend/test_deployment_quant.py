"""Weights as Ascend deployments store them,
made from float and from official ones (spec/deployments.md 5).
"""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch

from dsv4_backend.ops.int8 import dequantize_int8, quantize_weight_int8
from dsv4_backend.ops.mx import dequantize_mx, quantize_weight_mxfp8
from dsv4_backend.ops.quant import dequantize_fp8, quantize_weight_fp8


def weights(*shape, seed=0):
    """Rows of very different scale, the first of zeros."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator) * torch.exp2(
        torch.randint(-9, 9, (*shape[:-1], 1), generator=generator)
    )
    w.view(-1, shape[-1])[0] = 0.0
    return w


@pytest.mark.parametrize("shape", [(5, 7), (64, 128), (3, 33, 130)])
def test_int8_scales_are_the_next_bf16_above_amax_over_127(shape):
    w = weights(*shape)
    codes, scale = quantize_weight_int8(w)
    assert (codes.shape, scale.shape, codes.dtype, scale.dtype) == (
        w.shape,
        shape[:-1],
        torch.int8,
        torch.float32,
    )
    for row, code, s in zip(
        w.view(-1, shape[-1]), codes.view(-1, shape[-1]), scale.flatten().tolist(), strict=True
    ):
        exact = np.float32(row.abs().max().item()) / np.float32(127)
        assert s >= exact
        assert float(ml_dtypes.bfloat16(s)) == s
        below = np.nextafter(ml_dtypes.bfloat16(s), ml_dtypes.bfloat16(-1))
        assert s == 0 or float(below) < exact
        assert code.tolist() == (
            [0] * len(code) if s == 0 else np.rint(row.numpy() / np.float32(s)).tolist()
        )


def test_int8_rounds_half_to_even_and_never_passes_127():
    w = torch.tensor(
        [[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5], [-254.0, 1.0, 3.0, 5.0, -1.0, -3.0, -5.0]]
    )
    codes, scale = quantize_weight_int8(w)
    assert scale.tolist() == [1.0, 2.0]
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2], [-127, 0, 2, 2, 0, -2, -2]]
    assert int(quantize_weight_int8(weights(50, 64))[0].abs().max()) <= 127


def test_int8_values_stay_within_half_a_step():
    w = weights(40, 96)
    codes, scale = quantize_weight_int8(w)
    assert ((dequantize_int8(codes, scale) - w).abs() <= scale[:, None] / 2 * (1 + 1e-6)).all()


@pytest.mark.parametrize("k", [1, 32, 70, 256])
def test_mx_scales_are_the_smallest_that_saturate_nothing(k):
    w = weights(6, k)
    codes, scale = quantize_weight_mxfp8(w)
    assert scale.shape == (6, math.ceil(k / 32))
    exponents = scale.view(torch.uint8).int() - 127
    for n, b in np.ndindex(*scale.shape):
        amax = Fraction(w[n, 32 * b : 32 * b + 32].abs().max().item())
        if amax:
            assert Fraction(2) ** int(exponents[n, b]) * 448 >= amax
            assert Fraction(2) ** (int(exponents[n, b]) - 1) * 448 < amax
    step = (
        2.0**-4 * w.abs() + torch.exp2(exponents.double()).repeat_interleave(32, 1)[:, :k] * 2**-10
    )
    assert ((dequantize_mx(codes, scale) - w).abs() <= step).all()


def test_tiles_of_128_are_mx_blocks_without_any_error():
    """An official FP8 weight keeps its codes; the scale of a tile is that of its blocks."""
    w, scale = quantize_weight_fp8(weights(200, 300))
    rows = (
        scale.view(torch.uint8)
        .repeat_interleave(128, 0)[:200]
        .repeat_interleave(4, 1)[:, : math.ceil(300 / 32)]
    )
    assert torch.equal(dequantize_mx(w, rows.view(torch.float8_e8m0fnu)), dequantize_fp8(w, scale))
