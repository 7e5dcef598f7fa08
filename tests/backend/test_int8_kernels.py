"""int8 products, SwiGLU and experts on a CPU, beyond the cases of their contracts: sums are the
integers in tiles of any size, rows do not depend on each other, one call is its steps.
"""

import pytest
import torch

from dsv4_backend import dispatch
from dsv4_backend.ops.int8 import (
    int8_gemm,
    int8_grouped_gemm,
    int8_grouped_sum,
    int8_swiglu_quant,
    quantize_weight_int8,
)
from dsv4_backend.ops.int8_moe import int8_moe
from dsv4_backend.ops.moe import moe_dispatch
from dsv4_backend.ops.token_quant import fp8_token_quant, int8_token_quant, rms_norm_int8

BATCH = 29
"""Rows: tiles of every size, and no multiple of one."""


def codes(*shape):
    """Every int8 value, -128 too."""
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def offsets(*bounds):
    return torch.tensor([0, *bounds], dtype=torch.int32)


def as_tuple(results):
    return results if isinstance(results, tuple) else (results,)


def experts(count, width, channels):
    """w13, its scales, w2 and its scales of `count` experts."""
    return (
        *quantize_weight_int8(torch.randn(count, 2 * width, channels) * channels**-0.5),
        *quantize_weight_int8(torch.randn(count, channels, width) * width**-0.5),
    )


def moe_arguments(tokens, k=3, count=5, width=33, channels=70):
    w13, w13_scale, w2, w2_scale = experts(count, width, channels)
    shared = [part[0] for part in experts(1, width, channels)]
    ids = torch.rand(tokens, count).topk(k).indices.int()
    x = torch.randn(tokens, channels).bfloat16()
    routed = w13, w13_scale, w2, w2_scale.bfloat16()
    return (x, torch.rand(tokens, k), ids), (*routed, *shared, 10.0)


@pytest.mark.parametrize("channels", [1, 15, 16, 33, 255, 257, 512, 1100])
@pytest.mark.parametrize("columns", [1, 15, 17, 37, 50, 64, 113])
def test_sums_are_the_integers(isa, columns, channels):
    weight = codes(1, columns, channels)
    for rows in (1, 2, 3, 4, 5, 7, 13):
        x = codes(rows, channels)
        want = (x.long() @ weight[0].long().T).int()
        assert torch.equal(int8_grouped_sum(x, weight, offsets(rows)), want)


def test_codes_beside_the_tensors_do_not_matter(isa):
    """Rows and experts of a larger tensor; the last panel and vector are not full."""
    whole, x = codes(4, 60, 96), codes(7, 90)
    weight, rows = whole[1:3, :35, :45], x[:, 20:65]
    want = int8_grouped_sum(rows.contiguous(), weight.contiguous(), offsets(3, 7))
    assert torch.equal(int8_grouped_sum(rows, weight, offsets(3, 7)), want)


def calls():
    """Functions of any tensors of BATCH rows, and such tensors."""
    x, x_scale = int8_token_quant(torch.randn(BATCH, 300).bfloat16())
    weight, scale = quantize_weight_int8(torch.randn(50, 300))
    floats, norm = torch.randn(BATCH, 301).bfloat16(), torch.rand(301).bfloat16()
    sums = torch.randint(-(10**5), 10**5, (BATCH, 146), dtype=torch.int32)
    hidden_scale = torch.rand(1, 146) * 1e-3
    of_token, of_model = moe_arguments(BATCH)
    return {
        "int8_gemm": (lambda x, s: int8_gemm(x, s, weight, scale), x, x_scale),
        "int8_swiglu_quant": (
            lambda sums, s: int8_swiglu_quant(sums, hidden_scale, s, offsets(len(s)), 10.0),
            sums,
            x_scale,
        ),
        "int8_token_quant": (int8_token_quant, floats),
        "fp8_token_quant": (fp8_token_quant, floats),
        "rms_norm_int8": (lambda x: rms_norm_int8(x, norm, 1e-6), floats),
        "int8_moe": (lambda x, w, ids: int8_moe(x, w, ids, *of_model), *of_token),
    }


@pytest.mark.parametrize("name", calls())
def test_a_row_depends_on_itself_alone(isa, name):
    function, *tensors = calls()[name]
    together = as_tuple(function(*tensors))
    for count in (1, 3, 6, 28):
        for first in (0, 1, BATCH - count):
            rows = slice(first, first + count)
            alone = as_tuple(function(*(t[rows] for t in tensors)))
            for got, want in zip(alone, together, strict=True):
                assert torch.equal(got.float(), want[rows].float())


def test_threads_change_no_bit(isa):
    function, *tensors = calls()["int8_moe"]
    x, weight = codes(33, 700), codes(1, 600, 700)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append((function(*tensors), int8_grouped_sum(x, weight, offsets(33))))
    finally:
        torch.set_num_threads(before)
    for moe, sums in results[1:]:
        assert torch.equal(moe, results[0][0])
        assert torch.equal(sums, results[0][1])


def test_experts_in_one_call_are_their_steps(isa):
    (x, weights, ids), of_model = moe_arguments(BATCH)
    w13, w13_scale, w2, w2_scale, s13, s13_scale, s2, s2_scale, limit = of_model
    k = ids.shape[1]
    rows, bounds, order = moe_dispatch(x, ids, len(w13))
    chosen, scale = int8_token_quant(rows)
    sums = int8_grouped_sum(chosen, w13, bounds)
    inner = int8_swiglu_quant(sums, w13_scale, scale, bounds, limit)
    routed = int8_grouped_gemm(*inner, w2, w2_scale.float(), bounds)
    own, scale = int8_token_quant(x)
    sums = int8_grouped_sum(own, s13[None], offsets(len(x)))
    inner = int8_swiglu_quant(sums, s13_scale[None], scale, offsets(len(x)), limit)
    total = int8_gemm(*inner, s2, s2_scale).float()
    choices = routed[order.argsort()].unflatten(0, (-1, k))
    for j in range(k):
        total = total + choices[:, j].float() * weights[:, j : j + 1]
    assert torch.equal(int8_moe(x, weights, ids, *of_model), total.bfloat16())


HOSTILE = {
    "outside": offsets(400, 3),
    "falling": offsets(-1, 3),
    "ending early": offsets(2, 2),
    "beginning late": torch.tensor([1, 2, 3], dtype=torch.int32),
    "extreme": torch.tensor([-(2**31), 2**31 - 1, -(2**31)], dtype=torch.int32),
}


@pytest.mark.parametrize("bounds", HOSTILE.values(), ids=HOSTILE)
def test_each_row_is_written_once_whatever_the_offsets(isa, bounds):
    """Rows of no expert are zero; the others are those of some expert."""
    x, weight = codes(3, 40), codes(2, 6, 40)
    ones, scale = torch.ones(3), torch.rand(2, 6)
    by_expert = torch.einsum("tk,enk->etn", x.long(), weight.long())
    with dispatch.use("strict", check_contents=False):
        sums = int8_grouped_sum(x, weight, bounds)
        products = int8_grouped_gemm(x, ones, weight, scale, bounds)
        q, q_scale = int8_swiglu_quant(by_expert[0].int(), scale, ones, bounds, 10.0)
    inner = [int8_swiglu_quant(by_expert[0].int(), s[None], ones, offsets(3), 10.0) for s in scale]
    for t in range(3):
        whole = [torch.zeros(6), *by_expert[:, t]]
        assert any(torch.equal(sums[t].long(), one.long()) for one in whole)
        scaled = [torch.zeros(6), *(by_expert[:, t].float() * scale)]
        assert any(torch.equal(products[t], one.bfloat16()) for one in scaled)
        rows = [(torch.zeros(3), torch.tensor(0.0)), *((c[t], s[t]) for c, s in inner)]
        assert any(torch.equal(q[t].float(), c.float()) and q_scale[t] == s for c, s in rows)


def test_ids_out_of_range_read_and_write_nothing_outside(isa):
    """Their values are not promised; where none are checked, the call must survive them."""
    (x, weights, ids), of_model = moe_arguments(4)
    ids[0], ids[1, 0], ids[2, 1] = -1, 2**31 - 1, -(2**31)
    with dispatch.use("strict", check_contents=False):
        got = int8_moe(x, weights, ids, *of_model)
    assert got.shape == x.shape
    assert torch.equal(got[3:], int8_moe(x[3:], weights[3:], ids[3:], *of_model))


def test_every_ratio_of_int8(isa):
    """Under a scale of 1: codes, ties and one unit of bf16 beside them."""
    ratios = torch.arange(0, 127.25, 0.25)
    ratios = torch.cat([ratios, ratios + 2.0**-7, -ratios]).half()
    x = torch.stack([torch.full_like(ratios, 127.0), ratios.clamp(-127, 127)], -1)
    for got, want in zip(int8_token_quant(x), int8_token_quant.reference(x), strict=True):
        assert torch.equal(got, want)
