"""Proof of MX products and of the SwiGLU between them (spec/deployments.md 3, 4): cases,
oracles, faults.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from dsv4_backend.contract import Case, Draw, Operator
from dsv4_backend.faults import on_bytes
from dsv4_backend.ops.formats import block_scale
from dsv4_backend.ops.mx import (
    MX_BLOCK,
    dequantize_mx,
    mx_swiglu_quant,
    mxfp4_grouped_gemm,
    mxfp8_gemm,
    mxfp8_grouped_gemm,
    quantize_weight_mxfp8,
)
from dsv4_backend.ops.quant import act_quant, quantize_weight_fp4
from dsv4_backend.ops.swiglu import clamped_swiglu
from dsv4_backend.proofs.bounds import NO_ROWS_OF_NOTHING
from dsv4_backend.proofs.by_expert import WRONG_OFFSETS, explain_experts, joined, offsets_of
from dsv4_backend.proofs.numerics import (
    BF16,
    E8M0,
    Array,
    cast,
    fp4_values,
    per_channel,
    quantise_fp8,
    wide,
)
from dsv4_backend.proofs.quant import ACT_QUANT_EQUIVALENTS
from dsv4_backend.proofs.rounding_rows import NO_257TH_CODE, WHOLE, whole_fp4, whole_fp8
from dsv4_backend.proofs.swiglu import WRONG_HALVES

PROFILE = "a5-mx"
Pair = tuple[torch.Tensor, torch.Tensor]


def exact_sum(x: Array, x_scale: Array, weight: Array, weight_scale: Array) -> Array:
    """float64 [T, N]: block after block of 32 channels, a dot product times both scales."""
    total = np.zeros((len(x), len(weight)))
    for number in range(x_scale.shape[1]):
        channels = slice(32 * number, 32 * number + 32)
        dot = wide(x[:, channels]) @ wide(weight[:, channels]).T
        total += dot * np.outer(wide(x_scale[:, number]), wide(weight_scale[:, number]))
    return total


def sum_of_blocks(x: Array, x_scale: Array, weight: Array, weight_scale: Array) -> Array:
    """The same, rounded to bf16."""
    return cast(BF16, exact_sum(x, x_scale, weight, weight_scale))


mxfp8_gemm.oracle(sum_of_blocks)


def _grouped(values: Callable[[Array], Array]) -> Callable[..., Array]:
    def golden(
        x: Array, x_scale: Array, weight: Array, weight_scale: Array, offsets: Array
    ) -> Array:
        def expert(e: int, rows: slice) -> Array:
            return sum_of_blocks(x[rows], x_scale[rows], values(weight[e]), weight_scale[e])

        return joined(offsets, expert)

    return golden


mxfp8_grouped_gemm.oracle(_grouped(lambda codes: codes))
mxfp4_grouped_gemm.oracle(_grouped(fp4_values))


def product(x: Array, limit: float) -> Array:
    """Clamped SwiGLU of gate and up, float64 [M, m]."""
    half = x.shape[1] // 2
    g, u = np.minimum(wide(x[:, :half]), limit), np.clip(wide(x[:, half:]), -limit, limit)
    return np.asarray(g / (1 + np.exp(-g)) * u)


@mx_swiglu_quant.oracle
def _(x: Array, limit: float) -> tuple[Array, Array]:
    codes, scales = quantise_fp8(product(x, limit), 32)
    return codes, cast(E8M0, scales)


def _spread(draw: Draw, rows: int, k: int) -> torch.Tensor:
    """[rows, k] of powers of two, another one in every row and 32 channels."""
    powers = torch.exp2(draw.integers(rows, -(-k // 32), low=-3, high=2))
    return powers.repeat_interleave(32, 1)[:, :k]


def rows_of(draw: Draw, t: int, k: int) -> Pair:
    """MX-FP8 rows [t, k] and their scales."""
    q, scale = act_quant.reference((draw.normal(t, k) * _spread(draw, t, k)).bfloat16(), MX_BLOCK)
    return q, scale


def _weight(draw: Draw, n: int, k: int) -> torch.Tensor:
    return draw.normal(n, k, scale=k**-0.5) * _spread(draw, n, k)


def expert_stack(
    draw: Draw, quantise: Callable[[torch.Tensor], Pair], experts: int, n: int, k: int
) -> Pair:
    """Codes and scales of that many weights [n, k]."""
    codes, scales = zip(*(quantise(_weight(draw, n, k)) for _ in range(experts)), strict=True)
    return torch.stack(codes), torch.stack([s.view(torch.uint8) for s in scales]).view(
        torch.float8_e8m0fnu
    )


@mxfp8_gemm.cases
def _(draw: Draw) -> Iterator[Case]:
    for t, n, k in (
        (0, 16, 64),
        (1, 256, 1024),
        (3, 5, 7),
        (5, 192, 320),
        (17, 130, 512),
        (4, 30, 129),
    ):
        yield Case(
            f"{t}x{n}x{k}",
            PROFILE,
            (*rows_of(draw, t, k), *quantize_weight_mxfp8(_weight(draw, n, k))),
        )
    x, x_scale = rows_of(draw, 6, 256)
    weight, scale = quantize_weight_mxfp8(_weight(draw, 64, 256))
    yield Case(
        "strided", PROFILE, (x[::2], x_scale[::2], weight.T.contiguous().T, scale.T.contiguous().T)
    )
    weight, scale = weight.clone(), scale.clone()
    weight[3, 4], scale[1, 0] = torch.nan, torch.nan
    yield Case("NaN weight, NaN scale", PROFILE, (x, x_scale, weight, scale))
    yield Case(WHOLE, PROFILE, (*whole_fp8(draw, 5, 96), *whole_fp8(draw, 48, 96)), decided=True)


# Rows of every expert, N, K.
_GROUPS: tuple[tuple[tuple[int, ...], int, int], ...] = (
    ((0, 0, 0), 24, 64),
    ((0,), 4, 32),
    ((1,), 32, 32),
    ((0, 3, 0, 0, 5, 1, 0, 2), 96, 160),
    ((4, 1, 7), 48, 384),
    ((2, 2, 2), 64, 1024),
)


def _grouped_cases(
    op: Operator,
    quantise: Callable[[torch.Tensor], Pair],
    whole_experts: Callable[..., Pair],
    odd: bool,
) -> None:
    @op.cases
    def _(draw: Draw) -> Iterator[Case]:
        for rows, n, k in (*_GROUPS, *([((2, 0, 3), 5, 7)] if odd else [])):
            experts = expert_stack(draw, quantise, len(rows), n, k)
            yield Case(
                f"{rows} {n}x{k}",
                PROFILE,
                (*rows_of(draw, sum(rows), k), *experts, offsets_of(*rows)),
            )
        x, x_scale = rows_of(draw, 8, 256)
        weight, scale = expert_stack(draw, quantise, 2, 64, 256)
        turned = weight.transpose(1, 2).contiguous().transpose(1, 2)
        yield Case("strided", PROFILE, (x[::2], x_scale[::2], turned, scale, offsets_of(1, 3)))
        broken = scale.clone()
        broken[1] = torch.nan
        yield Case(
            "NaN scales of one expert", PROFILE, (x, x_scale, weight, broken, offsets_of(5, 3))
        )
        experts = whole_experts(draw, 3, 40, 96)
        arguments = (*whole_fp8(draw, 7, 96), *experts, offsets_of(4, 0, 3))
        yield Case(WHOLE, PROFILE, arguments, decided=True)


_grouped_cases(mxfp8_grouped_gemm, quantize_weight_mxfp8, whole_fp8, odd=True)
_grouped_cases(mxfp4_grouped_gemm, quantize_weight_fp4, whole_fp4, odd=False)

_TIE_MARGIN = 2.0**-18


def undecided(x: torch.Tensor, limit: float) -> Array:
    """Bool [M, m]: where a code or its block's scale hangs on the last bits of fp32."""
    with np.errstate(all="ignore"):
        exact = product(x.double().numpy(), limit)
        (low, low_scale), (high, high_scale) = (
            quantise_fp8(exact * (1 + s * _TIE_MARGIN), 32) for s in (-1, 1)
        )
        moved = per_channel((low_scale != high_scale) & np.isfinite(low_scale), 32, exact.shape[1])
        open_: Array = np.isfinite(exact) & ((low != high) & ~np.isnan(wide(low)) | moved)
    return open_


def _decided(x: torch.Tensor, limit: float) -> tuple[torch.Tensor, float]:
    """The arguments with gate and up zeroed where a bit is undecided;
    without a largest value a block has another.
    """
    while (open_ := undecided(x, limit)).any():
        x = x.masked_fill(torch.from_numpy(np.concatenate([open_, open_], 1)), 0)
    return x, limit


def _gate_up(draw: Draw, rows: int, m: int) -> torch.Tensor:
    """Gate and up, in some rows beyond the clamp, in some far below."""
    scale = torch.tensor([1.0, 8.0, 0.05, 30.0]).repeat(rows)[:rows].unsqueeze(1)
    return (draw.normal(rows, 2 * m) * scale).bfloat16()


@mx_swiglu_quant.cases
def _(draw: Draw) -> Iterator[Case]:
    for rows, m in ((0, 64), (1, 1), (3, 7), (5, 1024), (19, 130)):
        for limit in (10.0, 0.3017, math.inf):
            yield Case(
                f"{rows}x{m}, limit {limit}", PROFILE, _decided(_gate_up(draw, rows, m), limit)
            )
    yield Case("strided", PROFILE, _decided(_gate_up(draw, 14, 96)[::2], 10.0))
    x = _gate_up(draw, 6, 64)
    x[0, 0], x[1, 70], x[2, 2], x[3, 73], x[4] = math.nan, math.nan, math.inf, -math.inf, 0.0
    x[5] = (draw.normal(128) * 1e-4).bfloat16()
    yield Case("NaN, infinity, zero row, tiny row", PROFILE, _decided(x, 10.0))
    # silu(112) is 112: products are exact, and the largest of a block is 448 times a power of two
    up = draw.integers(4, 64, low=-4, high=5).bfloat16()
    up[:, ::32] = 4.0
    yield Case("largest * 2^k", PROFILE, (torch.cat([torch.full_like(up, 112), up], 1), math.inf))


SCALE_EDITS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "moved by one block": on_bytes(lambda b: b.roll(1, -1)),
    "of the first block for all": on_bytes(lambda b: b[..., :1].expand_as(b).contiguous()),
    "of 128 channels": on_bytes(lambda b: b[..., torch.arange(b.shape[-1]) // 4 * 4]),
    "cast as numbers": lambda s: s.view(torch.uint8).float().to(torch.float8_e8m0fnu),
    "left out": on_bytes(lambda b: torch.full_like(b, 127)),
    "in exchanged pairs": on_bytes(
        lambda b: b[..., (torch.arange(b.shape[-1]) ^ 1).clamp(max=b.shape[-1] - 1)]
    ),
}
for _op in (mxfp8_gemm, mxfp8_grouped_gemm, mxfp4_grouped_gemm):
    _op.wrong_arguments(
        {f"row scales {name}": {"x_scale": edit} for name, edit in SCALE_EDITS.items()}
    )
    _op.wrong_arguments(
        {f"weight scales {name}": {"weight_scale": edit} for name, edit in SCALE_EDITS.items()}
    )
    _op.wrong_arguments(
        {
            "last channel left out": {
                "x": on_bytes(lambda b: torch.cat([b[:, :-1], 0 * b[:, -1:]], 1))
            }
        }
    )
for _op in (mxfp8_grouped_gemm, mxfp4_grouped_gemm):
    _op.wrong_arguments(WRONG_OFFSETS)
for _op in (mxfp8_gemm, mxfp8_grouped_gemm):
    _op.wrong_arguments(
        {"weight exponent bias of FNUZ": {"weight": lambda w: (w.float() / 2).to(w.dtype)}}
    )
mxfp4_grouped_gemm.wrong_arguments(
    {
        "nibbles swapped": {"weight": on_bytes(lambda b: b << 4 | b >> 4)},
        "sign bits lost": {"weight": on_bytes(lambda b: b & 0x77)},
    }
)


@mxfp8_gemm.fault("partial sums of 32 rounded to bf16")
def _(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor:
    y = torch.zeros(len(x), len(weight), dtype=torch.bfloat16)
    pieces = (
        dequantize_mx(*pair).split(MX_BLOCK, 1) for pair in ((x, x_scale), (weight, weight_scale))
    )
    for a, b in zip(*pieces, strict=True):
        y = (y + a @ b.T).bfloat16()
    return y


def _blocks_of_128(h: torch.Tensor, block: int) -> Pair:
    q, scale = act_quant.reference(h, 4 * block)
    return q, scale.view(torch.uint8).repeat_interleave(4, 1)[:, : -(-q.shape[1] // block)].view(
        scale.dtype
    )


mx_swiglu_quant.wrong_step(clamped_swiglu, WRONG_HALVES)
mx_swiglu_quant.wrong_step(
    block_scale,
    {
        "amax without its floor": lambda blocks, largest, _: block_scale(
            blocks, largest, 2.0**-100
        ),
        "exponent rounded down": lambda blocks, largest, floor: block_scale(
            blocks, 2 * largest, floor
        ),
    },
)
mx_swiglu_quant.wrong_steps({"blocks of 128": {act_quant.reference: _blocks_of_128}})

explain_experts(mxfp8_grouped_gemm)
explain_experts(mxfp4_grouped_gemm)
for _op in (mxfp8_gemm, mxfp8_grouped_gemm, mxfp4_grouped_gemm):
    _op.equivalent(*NO_257TH_CODE)
mx_swiglu_quant.explain(ACT_QUANT_EQUIVALENTS, NO_ROWS_OF_NOTHING)
