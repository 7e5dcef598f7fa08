"""Activations and weights whose product tells one rounding from another (spec/v4.md 6.1, 6.3)."""

from __future__ import annotations

import torch

from dsv4_backend.contract import Draw, Operator

_BLOCK = 128
Weight = tuple[torch.Tensor, torch.Tensor]
_LARGEST = (448.0, 450.0, 446.0, 224.0)
"""Of a block: at a power of two times 448, on either side of it, and at the next one."""


def rows_with_outliers(draw: Draw, rows: int, k: int) -> torch.Tensor:
    """bf16 [rows, k]: a block's first channel decides its scale, the rest are near e4m3's subnormals."""
    x = draw.uniform(rows, k, low=2**-7, high=2**-4)
    x[:, ::_BLOCK] = torch.tensor(_LARGEST)[torch.arange(rows) % len(_LARGEST)].unsqueeze(1)
    return x.bfloat16()


def tiny_rows(draw: Draw, rows: int, k: int) -> torch.Tensor:
    """bf16 [rows, k] below the floor of a block's largest value, a row of zeros last."""
    x = draw.normal(rows, k, scale=1e-9)
    x[-1] = 0.0
    return x.bfloat16()


def broken_rows(draw: Draw, rows: int, k: int) -> torch.Tensor:
    """bf16 [rows, k], a NaN in row 0 and an infinity in row 1."""
    x = draw.normal(rows, k, dtype=torch.bfloat16)
    x[0, 3], x[1, k - 1] = torch.nan, torch.inf
    return x


def weight_of_small_channels(draw: Draw, n: int, k: int, exponent: int) -> Weight:
    """(e4m3 [n, k], E8M0 scales of 2^exponent): the channels of the outliers count nothing."""
    weight = draw.normal(n, k)
    weight[:, ::_BLOCK] = 0.0
    scale = torch.full((-(-n // _BLOCK), -(-k // _BLOCK)), 127 + exponent, dtype=torch.uint8)
    return weight.to(torch.float8_e4m3fn), scale.view(torch.float8_e8m0fnu)


def alternating_rows(draw: Draw, rows: int, k: int) -> torch.Tensor:
    """bf16 [rows, k] of +1 and -1, as many of each, in an order of every row's own."""
    signs = torch.tensor([1.0, -1.0]).repeat(k // 2)
    return torch.stack([signs[draw.permutation(k)] for _ in range(rows)]).bfloat16()


def fp32_weight(draw: Draw, n: int, k: int) -> torch.Tensor:
    """fp32 [n, k] about 100: times `alternating_rows` only what bf16 cannot hold is left."""
    return draw.normal(n, k, scale=0.1) + 100


_SAME_PRODUCT = {
    "a NaN makes its row of the product NaN whatever the scale of its block": (
        "scale_bytes: 255 -> 256 (2)",
        "scale_bytes: rounded_up.clamp(max=255) -> rounded_up",
    ),
    "the largest value of a block is fp32 already": ("scale_bytes: amax.float() -> amax",),
    "of the floor only the power of two above counts, and bf16 keeps it": (
        "block_scale: blocks.abs().amax(-1).float() -> blocks.abs().amax(-1)",
    ),
    "no value passes 448 times its block's scale": ("round_e4m3: x.float().clamp(-E4M3_MAX, E4M3_MAX) -> x.float()",),
    "what is rounded to e4m3 is fp32 already": ("round_e4m3: x.float() -> x",),
    "bf16 over a power of two is exact in bf16": (
        "divide_blocks: compute(blocks) -> blocks",
        "divide_blocks: scale_values(scale).to(wide.dtype) -> scale_values(scale)",
    ),
    "a block of one channel and a zero has the same scale": ("split_blocks: 1 -> 2",),
}
NO_257TH_CODE = "e4m3_values: 256 -> 257", "no byte looks the 257th value up"


def explain_quantisation(contract: Operator) -> None:
    """Equivalent mutants of act_quant as a step of an operator that returns a product."""
    for why, names in _SAME_PRODUCT.items():
        for name in names:
            contract.equivalent(name, why)
    contract.equivalent(*NO_257TH_CODE)
