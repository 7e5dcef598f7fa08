"""FP4 weights in A5's tiles come back, and int8 experts have scales that the chip can take."""

import pytest
import torch

from dsv4_ascend.parity.runner import samples
from dsv4_backend import OPERATORS
from dsv4_backend.errors import ArgumentError
from dsv4_backend.ops.int8 import int8_grouped_gemm
from dsv4_backend.ops.mx_tiles import pack_mxfp4, unpack_mxfp4


def test_tiles_give_their_weight_back():
    for sample in samples(OPERATORS["pack_mxfp4"]):
        (weight,) = sample.case.arguments
        tiles = pack_mxfp4(weight)
        assert tiles.is_contiguous()
        assert torch.equal(unpack_mxfp4(tiles), weight)


@pytest.mark.parametrize("shape", [(1, 15, 16), (1, 16, 24), (2, 0, 16), (2, 16, 0)])
def test_what_fills_no_tiles_is_refused(shape):
    with pytest.raises(ArgumentError, match=r"pack_mxfp4.*weight.*multiples of 16 rows"):
        pack_mxfp4(torch.zeros(shape, dtype=torch.int8))


@pytest.mark.parametrize("scale", [1.0 + 2.0**-9, 0.1, 3e-40])
def test_scales_that_bf16_does_not_hold_are_refused(scale):
    x, weight = torch.ones(2, 4, dtype=torch.int8), torch.ones(1, 3, 4, dtype=torch.int8)
    offsets = torch.tensor([0, 2], dtype=torch.int32)
    scales = torch.tensor([[0.5, scale, torch.nan]])
    with pytest.raises(ArgumentError, match=r"weight_scale.*values that bf16 holds"):
        int8_grouped_gemm(x, torch.ones(2), weight, scales, offsets)
    kept = scales.bfloat16().float()
    assert torch.equal(
        int8_grouped_gemm(x, torch.ones(2), weight, kept, offsets)[:, 0], torch.full((2,), 2.0)
    )
