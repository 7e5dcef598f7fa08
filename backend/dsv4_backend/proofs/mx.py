"""Proof of MX products and of the SwiGLU between them (spec/deployments.md 3, 4): cases, oracles, faults."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dsv4_backend.contract import Case, Draw, Operator
from dsv4_backend.ops.formats import E4M3_MAX, block_scale, divide_blocks, round_e4m3, split_blocks
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
from dsv4_backend.proofs.argument_edits import OFFSET_EDITS, edited
from dsv4_backend.proofs.by_expert import explain_experts
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
from dsv4_backend.proofs.rounding_rows import NO_257TH_CODE

PROFILE = "a5-mx"
Pair = tuple[torch.Tensor, torch.Tensor]


def _sum_of_blocks(x: Array, x_scale: Array, weight: Array, weight_scale: Array) -> Array:
    """bf16 [T, N]: block after block of 32 channels, a dot product times both scales."""
    total = np.zeros((len(x), len(weight)))
    for number in range(x_scale.shape[1]):
        channels = slice(32 * number, 32 * number + 32)
        dot = wide(x[:, channels]) @ wide(weight[:, channels]).T
        total += dot * np.outer(wide(x_scale[:, number]), wide(weight_scale[:, number]))
    return cast(BF16, total)


mxfp8_gemm.oracle(_sum_of_blocks)


def _grouped(values: Callable[[Array], Array]) -> Callable[..., Array]:
    def golden(x: Array, x_scale: Array, weight: Array, weight_scale: Array, offsets: Array) -> Array:
        bounds = offsets.tolist()
        rows = [slice(*bounds[e : e + 2]) for e in range(len(weight))]
        parts = [_sum_of_blocks(x[r], x_scale[r], values(weight[e]), weight_scale[e]) for e, r in enumerate(rows)]
        return np.concatenate(parts)

    return golden


mxfp8_grouped_gemm.oracle(_grouped(lambda codes: codes))
mxfp4_grouped_gemm.oracle(_grouped(fp4_values))


def _product(x: Array, limit: float) -> Array:
    half = x.shape[1] // 2
    g, u = np.minimum(wide(x[:, :half]), limit), np.clip(wide(x[:, half:]), -limit, limit)
    return np.asarray(g / (1 + np.exp(-g)) * u)


@mx_swiglu_quant.oracle
def _(x: Array, limit: float) -> tuple[Array, Array]:
    codes, scales = quantise_fp8(_product(x, limit), 32)
    return codes, cast(E8M0, scales)


def _spread(draw: Draw, rows: int, k: int) -> torch.Tensor:
    """[rows, k] of powers of two, another one in every row and 32 channels."""
    return torch.exp2(draw.integers(rows, -(-k // 32), low=-3, high=2)).repeat_interleave(32, 1)[:, :k]


def _rows(draw: Draw, t: int, k: int) -> Pair:
    q, scale = act_quant.reference((draw.normal(t, k) * _spread(draw, t, k)).bfloat16(), MX_BLOCK)
    return q, scale


def _weight(draw: Draw, n: int, k: int) -> torch.Tensor:
    return draw.normal(n, k, scale=k**-0.5) * _spread(draw, n, k)


def _experts(draw: Draw, quantise: Callable[[torch.Tensor], Pair], experts: int, n: int, k: int) -> Pair:
    codes, scales = zip(*(quantise(_weight(draw, n, k)) for _ in range(experts)), strict=True)
    return torch.stack(codes), torch.stack([s.view(torch.uint8) for s in scales]).view(torch.float8_e8m0fnu)


def _offsets(*rows: int) -> torch.Tensor:
    return torch.tensor([0, *rows]).cumsum(0).int()


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
            (*_rows(draw, t, k), *quantize_weight_mxfp8(_weight(draw, n, k))),
        )
    x, x_scale = _rows(draw, 6, 256)
    weight, scale = quantize_weight_mxfp8(_weight(draw, 64, 256))
    yield Case("strided", PROFILE, (x[::2], x_scale[::2], weight.T.contiguous().T, scale.T.contiguous().T))
    weight, scale = weight.clone(), scale.clone()
    weight[3, 4], scale[1, 0] = torch.nan, torch.nan
    yield Case("NaN weight, NaN scale", PROFILE, (x, x_scale, weight, scale))


# Rows of every expert, N, K.
_GROUPS: tuple[tuple[tuple[int, ...], int, int], ...] = (
    ((0, 0, 0), 24, 64),
    ((0,), 4, 32),
    ((1,), 32, 32),
    ((0, 3, 0, 0, 5, 1, 0, 2), 96, 160),
    ((4, 1, 7), 48, 384),
    ((2, 2, 2), 64, 1024),
)


def _grouped_cases(op: Operator, quantise: Callable[[torch.Tensor], Pair], odd: bool) -> None:
    @op.cases
    def _(draw: Draw) -> Iterator[Case]:
        for rows, n, k in (*_GROUPS, *([((2, 0, 3), 5, 7)] if odd else [])):
            experts = _experts(draw, quantise, len(rows), n, k)
            yield Case(f"{rows} {n}x{k}", PROFILE, (*_rows(draw, sum(rows), k), *experts, _offsets(*rows)))
        x, x_scale = _rows(draw, 8, 256)
        weight, scale = _experts(draw, quantise, 2, 64, 256)
        turned = weight.transpose(1, 2).contiguous().transpose(1, 2)
        yield Case("strided", PROFILE, (x[::2], x_scale[::2], turned, scale, _offsets(1, 3)))
        broken = scale.clone()
        broken[1] = torch.nan
        yield Case("NaN scales of one expert", PROFILE, (x, x_scale, weight, broken, _offsets(5, 3)))


_grouped_cases(mxfp8_grouped_gemm, quantize_weight_mxfp8, odd=True)
_grouped_cases(mxfp4_grouped_gemm, quantize_weight_fp4, odd=False)

_TIE_MARGIN = 2.0**-18


def _undecided(x: torch.Tensor, limit: float) -> Array:
    """Bool [M, m]: where a code or its block's scale hangs on the last bits of fp32."""
    with np.errstate(all="ignore"):
        exact = _product(x.double().numpy(), limit)
        (low, low_scale), (high, high_scale) = (quantise_fp8(exact * (1 + s * _TIE_MARGIN), 32) for s in (-1, 1))
        moved = per_channel((low_scale != high_scale) & np.isfinite(low_scale), 32, exact.shape[1])
        open_: Array = np.isfinite(exact) & ((low != high) & ~np.isnan(wide(low)) | moved)
    return open_


def _decided(x: torch.Tensor, limit: float) -> tuple[torch.Tensor, float]:
    """The arguments with gate and up zeroed where a bit is undecided; without a largest value a block has another."""
    while (open_ := _undecided(x, limit)).any():
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
            yield Case(f"{rows}x{m}, limit {limit}", PROFILE, _decided(_gate_up(draw, rows, m), limit))
    yield Case("strided", PROFILE, _decided(_gate_up(draw, 14, 96)[::2], 10.0))
    x = _gate_up(draw, 6, 64)
    x[0, 0], x[1, 70], x[2, 2], x[3, 73], x[4] = math.nan, math.nan, math.inf, -math.inf, 0.0
    x[5] = (draw.normal(128) * 1e-4).bfloat16()
    yield Case("NaN, infinity, zero row, tiny row", PROFILE, _decided(x, 10.0))
    # silu(112) is 112: products are exact, and the largest of a block is 448 times a power of two
    up = draw.integers(4, 64, low=-4, high=5).bfloat16()
    up[:, ::32] = 4.0
    yield Case("largest * 2^k", PROFILE, (torch.cat([torch.full_like(up, 112), up], 1), math.inf))


def _bytes(edit: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda t: edit(t.contiguous().view(torch.uint8)).to(torch.uint8).view(t.dtype)


_SCALE_EDITS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "moved by one block": _bytes(lambda b: b.roll(1, -1)),
    "of the first block for all": _bytes(lambda b: b[..., :1].expand_as(b).contiguous()),
    "of 128 channels": _bytes(lambda b: b[..., torch.arange(b.shape[-1]) // 4 * 4]),
    "cast as numbers": lambda s: s.view(torch.uint8).float().to(torch.float8_e8m0fnu),
    "left out": _bytes(lambda b: torch.full_like(b, 127)),
    "in exchanged pairs": _bytes(lambda b: b[..., (torch.arange(b.shape[-1]) ^ 1).clamp(max=b.shape[-1] - 1)]),
}
for _op in (mxfp8_gemm, mxfp8_grouped_gemm, mxfp4_grouped_gemm):
    for _name, _change in _SCALE_EDITS.items():
        _op.fault(f"row scales {_name}")(edited(_op, 1, _change))
        _op.fault(f"weight scales {_name}")(edited(_op, 3, _change))
    _op.fault("last channel left out")(edited(_op, 0, _bytes(lambda b: torch.cat([b[:, :-1], 0 * b[:, -1:]], 1))))
for _op in (mxfp8_grouped_gemm, mxfp4_grouped_gemm):
    for _name, _change in OFFSET_EDITS.items():
        _op.fault(_name)(edited(_op, 4, _change))
for _op in (mxfp8_gemm, mxfp8_grouped_gemm):
    _op.fault("weight exponent bias of FNUZ")(edited(_op, 2, lambda w: (w.float() / 2).to(w.dtype)))
mxfp4_grouped_gemm.fault("nibbles swapped")(edited(mxfp4_grouped_gemm, 2, _bytes(lambda b: b << 4 | b >> 4)))
mxfp4_grouped_gemm.fault("sign bits lost")(edited(mxfp4_grouped_gemm, 2, _bytes(lambda b: b & 0x77)))


@mxfp8_gemm.fault("partial sums of 32 rounded to bf16")
def _(x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    y = torch.zeros(len(x), len(weight), dtype=torch.bfloat16)
    pieces = (dequantize_mx(*pair).split(MX_BLOCK, 1) for pair in ((x, x_scale), (weight, weight_scale)))
    for a, b in zip(*pieces, strict=True):
        y = (y + a @ b.T).bfloat16()
    return y


def _quantised(
    product: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor],
) -> Callable[..., Any]:
    def mutant(x: torch.Tensor, limit: float) -> Any:
        gate, up = x.float().chunk(2, -1)
        return act_quant.reference(product(gate, up, limit), MX_BLOCK)

    return mutant


_PRODUCTS: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "gate and up swapped": lambda g, u, limit: clamped_swiglu(u, g, limit),
    "no clamp": lambda g, u, limit: F.silu(g) * u,
    "gate clamped below too": lambda g, u, limit: F.silu(g.clamp(-limit, limit)) * u.clamp(-limit, limit),
    "up clamped above only": lambda g, u, limit: F.silu(g.clamp(max=limit)) * u.clamp(max=limit),
    "gate not clamped": lambda g, u, limit: F.silu(g) * u.clamp(-limit, limit),
    "clamp after silu": lambda g, u, limit: F.silu(g).clamp(max=limit) * u.clamp(-limit, limit),
    "GELU instead of SiLU": lambda g, u, limit: F.gelu(g.clamp(max=limit)) * u.clamp(-limit, limit),
    "rounded to bf16 before quantisation": lambda g, u, limit: clamped_swiglu(g, u, limit).bfloat16(),
    "even and odd channels": lambda g, u, limit: _interleaved(g, u, limit),
}


def _interleaved(gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    joined = torch.cat([gate, up], -1)
    return clamped_swiglu(joined[:, 0::2], joined[:, 1::2], limit)


for _name, _wrong in _PRODUCTS.items():
    mx_swiglu_quant.fault(_name)(_quantised(_wrong))


def _hidden(x: torch.Tensor, limit: float) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return clamped_swiglu(gate, up, limit)


@mx_swiglu_quant.fault("amax without its floor")
def _(x: torch.Tensor, limit: float) -> Pair:
    blocks = split_blocks(_hidden(x, limit), MX_BLOCK)
    scale = block_scale(blocks, E4M3_MAX, 2.0**-100)
    q = round_e4m3(divide_blocks(blocks, scale)).flatten(1)[:, : x.shape[1] // 2]
    return q.contiguous(), scale.view(torch.float8_e8m0fnu)


@mx_swiglu_quant.fault("exponent rounded down")
def _(x: torch.Tensor, limit: float) -> Pair:
    blocks = split_blocks(_hidden(x, limit), MX_BLOCK)
    scale = block_scale(blocks, 2 * E4M3_MAX, 1e-4)
    q = round_e4m3(divide_blocks(blocks, scale)).flatten(1)[:, : x.shape[1] // 2]
    return q.contiguous(), scale.view(torch.float8_e8m0fnu)


@mx_swiglu_quant.fault("blocks of 128")
def _(x: torch.Tensor, limit: float) -> Pair:
    q, scale = act_quant.reference(_hidden(x, limit), 128)
    return q, scale.view(torch.uint8).repeat_interleave(4, 1)[:, : -(-q.shape[1] // 32)].view(scale.dtype)


explain_experts(mxfp8_grouped_gemm, "grouped")
explain_experts(mxfp4_grouped_gemm, "grouped")
for _op in (mxfp8_gemm, mxfp8_grouped_gemm, mxfp4_grouped_gemm):
    _op.equivalent(*NO_257TH_CODE)
mx_swiglu_quant.explain(ACT_QUANT_EQUIVALENTS)
