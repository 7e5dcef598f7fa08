"""The row-wise CPU kernels, beyond the cases of their contracts:
rows alone and in a batch, hostile indices, every boundary of the number formats.
"""

import pytest
import torch

from dsv4_backend import OPERATORS, dispatch

E4M3_MAX, E2M1_MAX = 448.0, 6.0
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BATCH = 13
"""Rows: more than one tile of tokens and than one vector of them, and no multiple of either."""


def reference(name, *arguments):
    with dispatch.use("reference"):
        return OPERATORS[name](*arguments)


def raw(tensor):
    return tensor.contiguous().view(torch.uint8)


def same_bytes(got, want):
    """The same bits, but of NaN, which has many."""
    for g, w in zip(as_tuple(got), as_tuple(want), strict=True):
        assert g.dtype == w.dtype
        if g.dtype in FLOAT_DTYPES:
            g, w = (t.masked_fill(t.isnan(), torch.nan) for t in (g, w))
        assert torch.equal(raw(g), raw(w))


def as_tuple(results):
    return results if isinstance(results, tuple) else (results,)


def mixers(streams, channels, rows, scales):
    fn = torch.randn(rows, streams * channels) * (streams * channels) ** -0.5
    return fn, torch.randn(rows), torch.randn(scales)


def turn(x, cos, sin):
    turned = x.clone()
    OPERATORS["apply_rope"](turned, cos, sin)
    return turned


def rows_of(name, dtype):
    """A function of any tensors of BATCH rows, and such tensors."""
    x = torch.randn(BATCH, 300).to(dtype)
    streams = torch.randn(BATCH, 4, 301).to(dtype)
    heads = torch.randn(BATCH, 3, 128).to(dtype)
    positions = torch.arange(BATCH) * 1001
    angles, frequencies = torch.randn(BATCH, 64), torch.rand(32)
    pre, head = mixers(4, 301, 24, 3), mixers(4, 301, 4, 1)
    three, bias = mixers(3, 301, 15, 3), torch.randn(37)
    experts, table = torch.randn(37, 300), torch.randint(37, (50, 6))
    op = OPERATORS.get(name)
    return {
        "act_quant": (lambda x: op(x, 128), x),
        "act_qdq": (lambda x: op(x, 64, 200), x),
        "fp4_quant": (lambda x: op(x, 32), x),
        "fp4_qdq": (lambda x: op(x, 32), x),
        "rope": (lambda x, p: op(x, p, frequencies, False), heads, positions),
        "apply_rope": (turn, heads, angles.cos(), angles.sin()),
        "hc_pre": (lambda x: op(x, *pre, 20, 1e-6, 1e-6), streams),
        "three streams": (
            lambda x: OPERATORS["hc_pre"](x[:, :3], *three, 3, 1e-6, 1e-6),
            streams,
        ),
        "hc_head": (lambda x: op(x, *head, 1e-6, 1e-6), streams),
        "hc_post": (op, x, streams[..., :300], angles[:, :4], angles[:, :16].unflatten(1, (4, 4))),
        "hadamard": (op, heads),
        "head_rms_norm": (lambda x: op(x, 1e-6), heads),
        "swiglu": (lambda x, y, w: op(x, y, w, 10.0), x, x.flip(0), torch.rand(BATCH)),
        "gate_topk": (lambda x: op(x, experts, bias, 6, 1.5), x),
        "gate_hash": (lambda x, t: op(x, experts, t, table, 1.5), x, torch.randint(50, (BATCH,))),
    }[name]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "act_quant",
        "act_qdq",
        "fp4_quant",
        "fp4_qdq",
        "rope",
        "apply_rope",
        "hc_pre",
        "three streams",
        "hc_head",
        "hc_post",
        "hadamard",
        "head_rms_norm",
        "swiglu",
        "gate_topk",
        "gate_hash",
    ],
)
def test_a_row_depends_on_itself_alone(isa, name, dtype):
    function, *tensors = rows_of(name, dtype)
    together = as_tuple(function(*tensors))
    alone = [as_tuple(function(*row)) for row in zip(*(t.split(1) for t in tensors), strict=True)]
    for got, rows in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(raw(got), torch.cat([raw(row) for row in rows]))


def boundaries(largest):
    """fp32 [N, 3, 2]: largest * 2^k and its neighbours, alone and beside the smaller ones."""
    amax = largest * torch.exp2(torch.arange(-140.0, 120.0))
    amax = torch.cat([amax, torch.tensor([torch.finfo(torch.float32).max])])
    near = torch.stack([amax, torch.nextafter(amax, 2 * amax), torch.nextafter(amax, 0 * amax)], -1)
    return torch.stack([near, -near / 3], -1).flatten(0, 1)


@pytest.mark.parametrize(
    ("name", "largest", "arguments"),
    [
        ("act_quant", E4M3_MAX, (2,)),
        ("act_qdq", E4M3_MAX, (2, 2)),
        ("fp4_quant", E2M1_MAX, (2,)),
        ("fp4_qdq", E2M1_MAX, (2,)),
    ],
)
def test_scales_at_every_power_of_two(isa, name, largest, arguments):
    x = boundaries(largest)
    same_bytes(OPERATORS[name](x, *arguments), reference(name, x, *arguments))


@pytest.mark.parametrize("block", [1, 3, 7, 32, 2**62])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_any_block_size(isa, block, dtype):
    x = torch.randn(5, 66).to(dtype)
    for name in ("act_quant", "fp4_quant"):
        same_bytes(OPERATORS[name](x, block), reference(name, x, block))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_every_ratio_of_e4m3_and_e2m1(isa, dtype):
    """Under a scale of 1, between the values, at the ties and one unit off."""
    for name, largest, least in (("act_quant", E4M3_MAX, 2.0**-11), ("fp4_quant", E2M1_MAX, 0.03)):
        steps = torch.exp2(torch.arange(0, 19, 1 / 64)) * least
        ratios = torch.cat([steps[steps <= largest], torch.arange(0, 449.0) / 448 * largest])
        ratios = torch.cat([ratios, torch.nextafter(ratios, 0 * ratios), -ratios]).to(dtype)
        x = torch.stack([torch.full_like(ratios, largest), ratios], -1)
        same_bytes(OPERATORS[name](x, 2), reference(name, x, 2))


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16, 32, 512, 4096])
def test_hadamard_of_any_length(isa, n):
    x = torch.randint(-4, 5, (3, n)).float()
    torch.testing.assert_close(
        OPERATORS["hadamard"](x), reference("hadamard", x), rtol=1e-6, atol=1e-6
    )


def test_temperature_zero_and_nuclei_of_every_size(isa):
    logits, noise = torch.randn(5, 3000) * 3, torch.empty(5, 3000).exponential_()
    for temperature, top_p in ((0.0, 1.0), (1.0, 1.0), (1.0, 1e-30), (3.0, 0.5), (9.0, 0.999)):
        got = OPERATORS["sample"](logits, noise, temperature, top_p)
        assert torch.equal(got, reference("sample", logits, noise, temperature, top_p))


HOSTILE = torch.tensor([-1, 2**31 - 1, -(2**31), 5])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_indices_out_of_range_read_and_write_nothing_outside(isa, dtype):
    """Their values are not promised; where none are checked, the call must survive them."""
    ids = HOSTILE.to(dtype)
    x, weight = torch.randn(4, 8), torch.randn(3, 8)
    with dispatch.use("strict", check_contents=False):
        embedded = OPERATORS["embed_streams"](ids, weight, 2)
        assert all(any(torch.equal(row, w) for w in weight) for row in embedded.flatten(0, 1))
        rows, offsets, order = OPERATORS["moe_dispatch"](x, ids.view(4, 1), 3)
        assert offsets[0] == 0
        assert offsets[-1] == 4
        assert order.sort().values.tolist() == [0, 1, 2, 3]
        assert torch.equal(rows, x[order.long()])
        assert OPERATORS["moe_combine"](x, ids, 2).shape == (2, 8)
        assert OPERATORS["moe_combine"](x, torch.zeros(4, dtype=dtype), 2).shape == (2, 8)
        for tokens, table in ((ids, torch.zeros(2, 2, dtype=dtype)), (ids * 0, ids.view(1, 4))):
            _, chosen = OPERATORS["gate_hash"](x, weight, tokens, table, 1.0)
            assert 0 <= chosen.min() <= chosen.max() < 3
