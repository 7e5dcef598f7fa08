"""Products of stored weights on a CPU: the order of their sums is AMX's in every instruction set;
what follows from a fixed order.
"""

import ml_dtypes
import numpy as np
import pytest
import torch

from dsv4_backend.ops.gemm import fp4_grouped_gemm, fp8_gemm
from dsv4_backend.ops.linear import linear
from dsv4_backend.ops.quant import (
    act_quant,
    dequantize_fp4,
    dequantize_fp8,
    quantize_weight_fp4,
    quantize_weight_fp8,
)

pytestmark = pytest.mark.usefixtures("isa")


def chain(x, w):
    """Fused multiply-adds from zero over the last dimension, each rounded to fp32 once.

    Products of bf16 values are exact in fp64, and so are their sums with an fp32 value here.
    """
    total = np.zeros(x.shape[:-1], np.float32)
    for k in range(x.shape[-1]):
        total = (x[..., k].astype(np.float64) * w[..., k] + total).astype(np.float32)
    return total


def amx_product(x, weight):
    """[T, N] of fp32 x [T, K] and W [N, K], K % 32 == 0, in AMX's order (docs/cpu-kernels.md)."""
    x, weight = x.numpy()[:, None], weight.numpy()[None]
    total = np.zeros((x.shape[0], weight.shape[1]), np.float32)
    for k in range(0, x.shape[-1], 32):
        even, odd = slice(k, k + 32, 2), slice(k + 1, k + 32, 2)
        total += chain(x[..., even], weight[..., even]) + chain(x[..., odd], weight[..., odd])
    return torch.from_numpy(total)


def values(n, k, seed=0):
    """Values that bf16 holds, of sizes that let every order of sums round differently."""
    draw = torch.Generator().manual_seed(seed)
    spread = torch.exp2(torch.randint(-6, 6, (n, k), generator=draw).float())
    return (torch.randn(n, k, generator=draw) * spread).bfloat16().float()


def test_the_order_of_sums_is_amx():
    x, weight = values(7, 160), values(37, 160, seed=1)
    want = amx_product(x, weight)
    got = linear(x, weight)
    assert torch.equal(got, want)
    assert not torch.equal(got, x @ weight.T)  # the values tell orders apart


def test_subnormal_operands_and_results_are_zero():
    tiny = torch.full((1, 32), 2.0**-70)
    product = linear(tiny, tiny)
    assert torch.equal(product, torch.zeros(1, 1))
    subnormal = linear(torch.full((1, 32), 2.0**-130), torch.full((1, 32), 2.0**10))
    assert torch.equal(subnormal, torch.zeros(1, 1))
    assert torch.tensor([2.0**-130]).mul(1).item() != 0  # the thread's own setting came back


@pytest.mark.parametrize(
    ("quantise", "name"), [(quantize_weight_fp8, "fp8"), (quantize_weight_fp4, "fp4")]
)
def test_quantised_weights_are_their_values(quantise, name):
    x, (codes, scale) = values(5, 256), quantise(values(40, 256, seed=2))
    wide = dequantize_fp8(codes, scale) if name == "fp8" else dequantize_fp4(codes, scale)
    assert torch.equal(product(name, x, None, codes, scale), amx_product(x, wide))


def flushed(values):
    """fp32 values with subnormals as 0."""
    with np.errstate(over="ignore"):
        return np.where(np.abs(values) < 2.0**-126, 0, values).astype(np.float32)


E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6] * 2, np.float32) * np.repeat([1, -1], 8)
SCALES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float64)


def one_channel(rows):
    """fp32 [rows, 64] that are 1 in a channel of the second block."""
    x = torch.zeros(rows, 64)
    x[:, 37] = 1
    return x


@pytest.mark.parametrize("rows", [1, 2])
def test_every_e4m3_code_has_its_value_under_every_scale(rows):
    codes = torch.zeros(256, 64, dtype=torch.uint8)
    codes[:, 37] = torch.arange(256).to(torch.uint8)
    for byte, scale in enumerate(SCALES):
        scales = torch.full((2, 1), byte, dtype=torch.uint8).view(torch.float8_e8m0fnu)
        got = fp8_gemm(one_channel(rows), None, codes.view(torch.float8_e4m3fn), scales)
        want = flushed(E4M3 * scale)
        want = np.full_like(want, np.nan) if np.isnan(scale) else want
        np.testing.assert_array_equal(got.numpy(), np.tile(want, (rows, 1)), f"scale {byte}")


@pytest.mark.parametrize("rows", [1, 2])
def test_every_e2m1_code_has_its_value_under_every_scale(rows):
    codes = torch.zeros(256 * 16, 32, dtype=torch.uint8)
    codes[:, 18] = torch.arange(16).repeat(256).to(torch.uint8) << 4  # 37 is odd: the high nibble
    scales = torch.full((256 * 16, 2), 127, dtype=torch.uint8)
    scales[:, 1] = torch.arange(256).repeat_interleave(16).to(torch.uint8)
    got = fp4_grouped_gemm(
        one_channel(rows),
        None,
        codes.view(torch.int8)[None],
        scales.view(torch.float8_e8m0fnu)[None],
        offsets(rows),
    )
    want = flushed((SCALES[:, None] * E2M1).ravel())
    np.testing.assert_array_equal(got.numpy(), np.tile(want, (rows, 1)))


def offsets(*bounds):
    return torch.tensor([0, *bounds], dtype=torch.int32)


def product(name, x, x_scale, codes, scale):
    if name == "fp8":
        return fp8_gemm(x, x_scale, codes, scale)
    return fp4_grouped_gemm(x, x_scale, codes[None], scale[None], offsets(len(x)))


@pytest.mark.parametrize("name", ["fp8", "fp4"])
def test_a_row_has_its_bits_in_any_batch(name):
    quantise = quantize_weight_fp8 if name == "fp8" else quantize_weight_fp4
    codes, scale = quantise(values(300, 320, seed=3))
    x, x_scale = act_quant.reference(values(29, 320).bfloat16(), 128)
    together = product(name, x, x_scale, codes, scale)
    for count in (1, 2, 5, 13, 28):
        for first in (0, 1, 29 - count):
            rows = slice(first, first + count)
            alone = product(name, x[rows], x_scale[rows], codes, scale)
            assert torch.equal(alone, together[rows])


def test_threads_change_no_bit():
    x, weight = values(33, 512), values(600, 512, seed=4)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(linear(x, weight))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_rows_beside_the_weight_are_not_read():
    """The last panel has fewer rows than a tile, and the last block fewer channels."""
    whole = torch.full((60, 96), torch.nan)
    whole[:35, :45] = values(35, 45, seed=5)
    x = values(3, 45)
    got = linear(x, whole[:35, :45])
    want = linear(x, whole[:35, :45].contiguous())
    assert torch.equal(got, want)
    assert got.isfinite().all()
