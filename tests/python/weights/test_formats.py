"""The table of stored formats: what it takes, and what it refuses by name."""

import pytest
import torch
from seeds import seed_of

from dsv4_ascend.weights.activations import FP8_BLOCKS, UNQUANTISED
from dsv4_ascend.weights.formats import EXPERTS, WEIGHTS, Float, Fp8, as_stored, widened
from dsv4_backend.errors import ArgumentError
from dsv4_backend.ops.quant import act_qdq, quantize_weight_fp4, quantize_weight_fp8

GENERATOR = torch.Generator().manual_seed(seed_of(__name__))


def normal(*shape):
    return torch.randn(shape, generator=GENERATOR)


@pytest.mark.parametrize(
    ("table", "weight", "scale"),
    [
        (WEIGHTS, torch.int8, torch.float8_e8m0fnu),
        (WEIGHTS, torch.float8_e4m3fn, None),
        (WEIGHTS, torch.float32, torch.float32),
        (EXPERTS, torch.int16, torch.float32),
        (EXPERTS, torch.int8, torch.bfloat16),
    ],
)
def test_unknown_formats_are_refused(table, weight, scale):
    scales = None if scale is None else torch.empty(1, dtype=scale)
    with pytest.raises(
        ArgumentError, match=f"weight: found {weight} with {scale} scales, expected"
    ):
        as_stored(table, torch.empty(1, dtype=weight), scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_products(dtype):
    """Float weights take x as it is, FP8 ones take it through the profile's activation format."""
    w, x = normal(130, 256), normal(5, 256).to(dtype)
    codes, scale = quantize_weight_fp8(w)
    wide = widened(codes, scale).double()
    for activations in (UNQUANTISED, FP8_BLOCKS) if dtype == torch.bfloat16 else (UNQUANTISED,):
        rows = x if activations is UNQUANTISED else act_qdq(x, 128, 256)
        limit = 1e-4 if dtype == torch.float32 else 0.3
        plain = as_stored(WEIGHTS, w.to(dtype), None)
        assert isinstance(plain, Float)
        want = x.double() @ w.to(dtype).double().T
        assert (plain.matmul(x, activations).double() - want).abs().max() < limit
        if activations is FP8_BLOCKS or dtype == torch.float32:
            quantised = as_stored(WEIGHTS, codes, scale)
            assert isinstance(quantised, Fp8)
            want = rows.double() @ wide.T
            assert (quantised.matmul(x, activations).double() - want).abs().max() < limit
    assert torch.equal(as_stored(WEIGHTS, codes, scale).values(dtype), wide.to(dtype))


@pytest.mark.parametrize("quantise", [quantize_weight_fp8, quantize_weight_fp4])
@pytest.mark.parametrize("scaled_by", [torch.float8_e8m0fnu, torch.float32])
def test_expert_products_are_those_of_each_expert(quantise, scaled_by):
    """Every quantised format on rows as they are, an expert without rows among them."""
    parts = [quantise(normal(64, 128)) for _ in range(3)]
    codes, scales = (torch.stack(part) for part in zip(*parts, strict=True))
    x, offsets = normal(6, 128), torch.tensor([0, 2, 2, 6], dtype=torch.int32)
    stored = as_stored(EXPERTS, codes, scales.to(scaled_by))
    got = stored.matmul((x, None), offsets, stored.accepts(UNQUANTISED))
    want = torch.cat([x[:2] @ widened(*parts[0]).T, x[2:] @ widened(*parts[2]).T])
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)
