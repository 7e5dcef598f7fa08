"""MX-FP4 weights as Ascend A5 reads them, in tiles of 16 rows and 32 channels:
the format FRACTAL_NZ_C0_32 (spec/deployments.md 3).
"""

from __future__ import annotations

import torch

from dsv4_backend.contract import Tolerance, operator
from dsv4_backend.ops.mx import mxfp4_grouped_gemm
from dsv4_backend.relations import covered, require

TILE_ROWS, TILE_BYTES = 16, 16
"""Rows of a tile, and bytes of a row in it: 32 channels."""


@operator(
    "pack_mxfp4(Tensor weight) -> Tensor",
    rows=(10,),
    arguments={"weight": "i8 [E, N, B]"},
    relations=(
        require(
            "weight",
            f"N % {TILE_ROWS} == 0 and B % {TILE_BYTES} == 0 and N * B > 0",
            "{N} rows of {B} bytes",
            f"multiples of {TILE_ROWS} rows and of {TILE_BYTES} bytes",
        ),
    ),
    tolerance=Tolerance(reason="bytes change their places: every bit is decided"),
)
def pack_mxfp4(weight: torch.Tensor) -> torch.Tensor:
    """Tiles of the MX-FP4 weights of experts, made once while loading.

    weight: int8 [E, N, K/2], e2m1 codes, low nibble = even k; N a multiple of 16, K of 32. Returns
    int8 [E, K/32, N/16, 16, 16], contiguous: byte [e, i, j, n, b] is weight[e, 16*j + n, 16*i + b].
    `unpack_mxfp4` gives the weight back. No experts give no tiles. Source: aclnnNpuFormatCast to
    FRACTAL_NZ_C0_32, which is how aclnnGroupedMatmulWeightNz wants FP4 beside FP8 rows;
    spec/deployments.md 3, spec/v4.md 6.3.
    """
    tiles = torch.arange(weight.shape[2] // TILE_BYTES, device=weight.device).view(-1, 1, 1, 1)
    down = torch.arange(weight.shape[1] // TILE_ROWS, device=weight.device).view(-1, 1, 1)
    row = TILE_ROWS * down + torch.arange(TILE_ROWS, device=weight.device).view(-1, 1)
    return weight[:, row, TILE_BYTES * tiles + torch.arange(TILE_BYTES, device=weight.device)]


def unpack_mxfp4(tiles: torch.Tensor) -> torch.Tensor:
    """Int8 [E, N, K/2] of tiles [E, K/32, N/16, 16, 16]: the inverse of `pack_mxfp4`."""
    return tiles.permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2)


@operator(
    "mxfp4_tiled_grouped_gemm(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, "
    "Tensor expert_offsets) -> Tensor",
    rows=(10,),
    arguments={
        "x": "e4m3 [T, K]",
        "x_scale": "e8m0 [T, K/32]",
        "weight": "i8 [E, K/32, J, 16, 16]",
        "weight_scale": "e8m0 [E, J*16, K/32]",
        "expert_offsets": "i32 [E+1]",
    },
    relations=covered("weight", "T"),
    tolerance=mxfp4_grouped_gemm.tolerance,
)
def mxfp4_tiled_grouped_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    expert_offsets: torch.Tensor,
) -> torch.Tensor:
    """`mxfp4_grouped_gemm` of a weight in tiles.

    weight: int8 [E, K/32, N/16, 16, 16] (`pack_mxfp4`); the other arguments and the result, bf16
    [T, N], as of `mxfp4_grouped_gemm`. Source: aclnnGroupedMatmulWeightNz A8W4 MX;
    spec/deployments.md 3, spec/v4.md 5.2, 6.3.
    """
    rows = unpack_mxfp4(weight)
    return mxfp4_grouped_gemm.reference(x, x_scale, rows, weight_scale, expert_offsets)
