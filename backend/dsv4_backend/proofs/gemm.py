"""Proof of block-scaled and grouped products (spec/v4.md 6.3): cases, oracles, named faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from dsv4_backend.contract import Case, Draw
from dsv4_backend.faults import on_bytes
from dsv4_backend.ops.gemm import (
    _output_dtype,
    dequantize_rows,
    fp4_grouped_gemm,
    fp8_gemm,
    fp8_grouped_gemm,
    grouped_gemm,
)
from dsv4_backend.ops.quant import (
    act_quant,
    dequantize_fp8,
    quantize_weight_fp4,
    quantize_weight_fp8,
)
from dsv4_backend.proofs.by_expert import WRONG_OFFSETS, explain_experts, joined, offsets_of
from dsv4_backend.proofs.numerics import BF16, Array, cast, fp4_values, wide
from dsv4_backend.proofs.rounding_rows import (
    NO_257TH_CODE,
    WHOLE,
    powers,
    whole,
    whole_fp4,
    whole_fp8,
)


def _sum_of_blocks(
    x: Array,
    x_scale: Array | None,
    weight: Array,
    row_scale: Array,
    block: int,
) -> Array:
    """[T, N]: block after block of K, a dot product times the scales of both rows (spec 6.3).

    row_scale: [N, ceil(K/block)]; x_scale: [T, ceil(K/128)], or None where x is not quantised.
    """
    total = np.zeros((x.shape[0], weight.shape[0]))
    for number, start in enumerate(range(0, x.shape[1], block)):
        channels = slice(start, start + block)
        dot = wide(x[:, channels]) @ wide(weight[:, channels]).T
        scale = 1.0 if x_scale is None else wide(x_scale[:, start // 128, None])
        total += dot * (scale * wide(row_scale[:, number]))
    return cast(np.float64 if x_scale is None else BF16, total)


def _fp8_product(x: Array, x_scale: Array | None, weight: Array, weight_scale: Array) -> Array:
    """The weight's scales are of tiles of 128 rows and 128 channels."""
    rows = weight_scale[np.arange(len(weight)) // 128]
    return _sum_of_blocks(x, x_scale, weight, rows, 128)


def _fp4_product(x: Array, x_scale: Array | None, weight: Array, weight_scale: Array) -> Array:
    """The weight's scales are of one row and 32 channels."""
    return _sum_of_blocks(x, x_scale, fp4_values(weight), weight_scale, 32)


fp8_gemm.oracle(_fp8_product)


def _grouped_oracle(product: Callable[..., Array]) -> Callable[..., Array]:
    def oracle(
        x: Array, x_scale: Array | None, weight: Array, scale: Array, offsets: Array
    ) -> Array:
        def expert(e: int, rows: slice) -> Array:
            return product(x[rows], None if x_scale is None else x_scale[rows], weight[e], scale[e])

        return joined(offsets, expert)

    return oracle


fp8_grouped_gemm.oracle(_grouped_oracle(_fp8_product))
fp4_grouped_gemm.oracle(_grouped_oracle(_fp4_product))


@grouped_gemm.oracle
def _(x: Array, weight: Array, offsets: Array) -> Array:
    return joined(offsets, lambda e, rows: cast(x.dtype, wide(x[rows]) @ wide(weight[e]).T))


_DTYPES = {"ideal": torch.float32, "official": torch.bfloat16}
Quantise = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def spread_weight(draw: Draw, n: int, k: int) -> torch.Tensor:
    """Rows of norm 1 or so, with a different scale in every 32 channels and 64 rows."""
    spread = torch.exp2(draw.integers(-(-n // 64), -(-k // 32), low=-3, high=2))
    spread = spread.repeat_interleave(64, 0)[:n].repeat_interleave(32, 1)[:, :k]
    return draw.normal(n, k, scale=k**-0.5) * spread


def _activations(
    draw: Draw, profile: str, t: int, k: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    spread = torch.exp2(draw.integers(t, -(-k // 128), low=-2, high=2)).repeat_interleave(128, 1)
    x = draw.normal(t, k) * spread[:, :k]
    if profile == "ideal":
        return x, None
    q, scale = act_quant.reference(x.bfloat16(), 128)
    return q, scale


def _experts(draw: Draw, quantise: Quantise, sizes: tuple[int, int, int]) -> list[torch.Tensor]:
    """[codes, scales] of E experts [N, K]."""
    pairs = [quantise(spread_weight(draw, *sizes[1:])) for _ in range(sizes[0])]
    return [torch.stack(parts) for parts in zip(*pairs, strict=True)]


def _apart(weight: torch.Tensor) -> torch.Tensor:
    """The same experts, other bytes between them, as a checkpoint's file has them."""
    return weight.repeat_interleave(2, 0)[::2]


# Rows of every expert, N, K.
_GROUPS: tuple[tuple[tuple[int, ...], int, int], ...] = (
    ((0, 0, 0), 64, 128),
    ((0,), 32, 64),
    ((1,), 32, 32),
    ((0, 3, 0, 0, 5, 1, 0, 2), 96, 160),
    ((4, 1, 7), 144, 384),
    ((0, 0, 9, 0), 130, 256),
    ((2, 2, 2), 128, 1024),
)


@fp8_gemm.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile in _DTYPES:
        for t, n, k in (
            (0, 128, 128),
            (1, 256, 1024),
            (3, 5, 7),
            (5, 192, 320),
            (17, 130, 512),
            (4, 300, 129),
        ):
            x, x_scale = _activations(draw, profile, t, k)
            yield Case(
                f"{t}x{n}x{k}",
                profile,
                (x, x_scale, *quantize_weight_fp8(spread_weight(draw, n, k))),
            )
        x, x_scale = _activations(draw, profile, 6, 256)
        weight, scale = quantize_weight_fp8(spread_weight(draw, 256, 256))
        strided = (
            x[::2],
            None if x_scale is None else x_scale[::2],
            weight.T.contiguous().T,
            scale.T,
        )
        yield Case("strided", profile, strided)
        weight, scale = weight.clone(), scale.clone()
        weight[3, 4], scale[1, 0] = torch.nan, torch.nan
        yield Case("NaN weight, NaN scale", profile, (x, x_scale, weight, scale))
    weight, scale = quantize_weight_fp8(spread_weight(draw, 9, 200))
    yield Case("fp64 rows", "ideal", (draw.normal(3, 200).double(), None, weight, scale))
    weight, scale = whole(draw, 150, 200, dtype=torch.float8_e4m3fn), powers(draw, 2, 2)
    yield Case(
        WHOLE, "official", (*whole_fp8(draw, 5, 200, block=128), weight, scale), decided=True
    )


@fp8_grouped_gemm.cases
def _(draw: Draw) -> Iterator[Case]:
    yield from _grouped_cases(draw, quantize_weight_fp8)
    weight, scale = whole(draw, 3, 40, 192, dtype=torch.float8_e4m3fn), powers(draw, 3, 1, 2)
    arguments = (*whole_fp8(draw, 7, 192, block=128), weight, scale, offsets_of(4, 0, 3))
    yield Case(WHOLE, "official", arguments, decided=True)


@fp4_grouped_gemm.cases
def _(draw: Draw) -> Iterator[Case]:
    yield from _grouped_cases(draw, quantize_weight_fp4)
    experts = whole_fp4(draw, 3, 40, 192)
    arguments = (*whole_fp8(draw, 7, 192, block=128), *experts, offsets_of(4, 0, 3))
    yield Case(WHOLE, "official", arguments, decided=True)


def _grouped_cases(draw: Draw, quantise: Quantise) -> Iterator[Case]:
    for profile in _DTYPES:
        for rows, n, k in _GROUPS:
            x, x_scale = _activations(draw, profile, sum(rows), k)
            experts = _experts(draw, quantise, (len(rows), n, k))
            yield Case(f"{rows} {n}x{k}", profile, (x, x_scale, *experts, offsets_of(*rows)))
        x, x_scale = _activations(draw, profile, 8, 256)
        weight, scale = _experts(draw, quantise, (2, 64, 256))
        half = (x[::2], None if x_scale is None else x_scale[::2])
        yield Case("strided", profile, (*half, weight, scale, offsets_of(1, 3)))
        yield Case(
            "experts apart", profile, (*half, _apart(weight), _apart(scale), offsets_of(3, 1))
        )
        broken = torch.stack([scale[0], torch.full_like(scale[1], torch.nan)])
        yield Case(
            "NaN scale of one expert", profile, (x, x_scale, weight, broken, offsets_of(5, 3))
        )
    x = draw.normal(3, 192).double()
    yield Case(
        "fp64 rows", "ideal", (x, None, *_experts(draw, quantise, (2, 9, 192)), offsets_of(1, 2))
    )


@grouped_gemm.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in _DTYPES.items():
        for rows, n, k in (*_GROUPS, ((2, 0, 3), 5, 7)):
            weight = torch.stack([spread_weight(draw, n, k) for _ in rows]).to(dtype)
            yield Case(
                f"{rows} {n}x{k}",
                profile,
                (draw.normal(sum(rows), k, dtype=dtype), weight, offsets_of(*rows)),
            )
        x = draw.normal(24, 8, dtype=dtype).T[::2]
        weight = (
            torch.stack([spread_weight(draw, 24, 10) for _ in range(3)]).to(dtype).transpose(1, 2)
        )
        yield Case("strided", profile, (x, weight, offsets_of(1, 2, 1)))
        yield Case("experts apart", profile, (x, _apart(weight), offsets_of(2, 0, 2)))
        x = x.clone()
        x[1, 3] = torch.nan
        broken = torch.cat([weight[:2], torch.full_like(weight[2:], torch.nan)])
        yield Case("NaN row, NaN expert", profile, (x, broken, offsets_of(2, 1, 1)))
    weight = torch.stack([spread_weight(draw, 9, 130) for _ in range(2)])
    x = draw.normal(3, 130)
    yield Case("bf16 rows, fp32 weights", "official", (x.bfloat16(), weight, offsets_of(1, 2)))
    yield Case("fp64 rows", "ideal", (x.double(), weight, offsets_of(1, 2)))
    arguments = (whole(draw, 7, 96), whole(draw, 3, 40, 96), offsets_of(4, 0, 3))
    yield Case(WHOLE, "official", arguments, decided=True)


_SCALE_EDITS = {
    "moved by one block": on_bytes(lambda b: b.roll(1, -1)),
    "of the first block for all": on_bytes(lambda b: b[..., :1].expand_as(b).contiguous()),
    "cast as numbers": lambda s: s.view(torch.uint8).float().to(torch.float8_e8m0fnu),
    "left out": lambda s: torch.ones_like(s, dtype=torch.float32).to(s.dtype),
}


def _read_dense(weight: torch.Tensor) -> torch.Tensor:
    """What a kernel reads that takes experts to follow each other."""
    strides = (weight.shape[1] * weight.shape[2], *weight.stride()[1:])
    return weight.as_strided(weight.shape, strides) if weight[0].is_contiguous() else weight


_SCALED = {
    **{f"activation scales {name}": {"x_scale": edit} for name, edit in _SCALE_EDITS.items()},
    **{f"weight scales {name}": {"weight_scale": edit} for name, edit in _SCALE_EDITS.items()},
    "weight scales of the first rows for all": {
        "weight_scale": on_bytes(lambda b: b[..., :1, :].expand_as(b).contiguous())
    },
    "last channel left out": {
        "x": lambda x: torch.cat([x[:, :-1], torch.zeros_like(x[:, -1:])], 1)
    },
    "activations rounded to bf16": {"x": lambda x: x.bfloat16().to(x.dtype)},
}
_BY_EXPERT = {
    **WRONG_OFFSETS,
    "weights of the first expert for all": {"weight": lambda w: w[:1].expand_as(w)},
    "weights of experts apart read as dense": {"weight": _read_dense},
}
_SCALES_BY_EXPERT = {
    "scales of the first expert for all": {"weight_scale": lambda s: s[:1].expand_as(s)},
    "scales of experts apart read as dense": {"weight_scale": _read_dense},
}
_FP8 = {"weight exponent bias of FNUZ": {"weight": lambda w: (w.float() / 2).to(w.dtype)}}
_FP4 = {
    "nibbles swapped": {"weight": on_bytes(lambda b: b << 4 | b >> 4)},
    "sign bits lost": {"weight": on_bytes(lambda b: b & 0x77)},
    "code 7 read as 5": {"weight": on_bytes(lambda b: b - 2 * (b & 7 == 7).to(b.dtype))},
}
_FLOAT = {
    "weights rounded to fp8": {"weight": lambda w: w.to(torch.float8_e4m3fn).to(w.dtype)},
    "activations rounded to fp8": {"x": lambda x: x.to(torch.float8_e4m3fn).to(x.dtype)},
}
fp8_gemm.wrong_arguments(_SCALED | _FP8)
fp8_grouped_gemm.wrong_arguments(_SCALED | _BY_EXPERT | _SCALES_BY_EXPERT)
fp4_grouped_gemm.wrong_arguments(_SCALED | _BY_EXPERT | _SCALES_BY_EXPERT | _FP4)
grouped_gemm.wrong_arguments(_BY_EXPERT | _FLOAT)


@fp8_gemm.fault("partial sums of 128 rounded to bf16")
def _(
    x: torch.Tensor, x_scale: torch.Tensor | None, weight: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor:
    rows, matrix = dequantize_rows(x, x_scale), dequantize_fp8(weight, weight_scale)
    y = rows.new_zeros(rows.shape[0], matrix.shape[0], dtype=torch.bfloat16)
    for a, b in zip(rows.split(128, 1), matrix.split(128, 1), strict=True):
        y = (y + a @ b.T).bfloat16()
    return y.to(_output_dtype(x, x_scale))


for _contract in (fp8_grouped_gemm, fp4_grouped_gemm, grouped_gemm):
    explain_experts(_contract)
for _quantised_contract in (fp8_gemm, fp8_grouped_gemm, fp4_grouped_gemm):
    _quantised_contract.equivalent(*NO_257TH_CODE)
