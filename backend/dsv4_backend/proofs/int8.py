"""Proof of W8A8 products and of the SwiGLU between them (spec/deployments.md 2, 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from dsv4_backend.contract import Case, Draw
from dsv4_backend.faults import Edits
from dsv4_backend.ops.int8 import (
    exact_product,
    int8_gemm,
    int8_grouped_gemm,
    int8_grouped_sum,
    int8_swiglu_quant,
    quantize_weight_int8,
    scaled,
)
from dsv4_backend.ops.swiglu import clamped_swiglu
from dsv4_backend.ops.token_quant import int8_token_quant, round_int8, row_scale
from dsv4_backend.proofs.bounds import INT8_RATIOS
from dsv4_backend.proofs.by_expert import WRONG_OFFSETS, explain_experts, joined, offsets_of
from dsv4_backend.proofs.numerics import BF16, Array, cast, wide
from dsv4_backend.proofs.swiglu import WRONG_HALVES
from dsv4_backend.proofs.token_quant import SAME_CODES, int8_codes

PROFILE = "a2a3-int8"
Edit = Callable[[torch.Tensor], torch.Tensor]


def _integers(x: Array, weight: Array) -> Array:
    """int64 [T, N]: sums of products, in integers."""
    return x.astype(np.int64) @ weight.astype(np.int64).T


def _times_scales(sums: Array, weight_scale: Array, x_scale: Array) -> Array:
    """fp32 sums, times the channel's scale, times the row's."""
    by_channel = sums.astype(np.float32) * weight_scale.astype(np.float32)
    return np.asarray(by_channel * x_scale.astype(np.float32)[:, None])


@int8_gemm.oracle
def _(x: Array, x_scale: Array, weight: Array, weight_scale: Array) -> Array:
    return cast(BF16, _times_scales(_integers(x, weight), weight_scale, x_scale))


@int8_grouped_gemm.oracle
def _(x: Array, x_scale: Array, weight: Array, weight_scale: Array, offsets: Array) -> Array:
    def expert(e: int, rows: slice) -> Array:
        return cast(
            BF16, _times_scales(_integers(x[rows], weight[e]), weight_scale[e], x_scale[rows])
        )

    return joined(offsets, expert)


@int8_grouped_sum.oracle
def _(x: Array, weight: Array, offsets: Array) -> Array:
    return joined(offsets, lambda e, rows: _integers(x[rows], weight[e])).astype(np.int32)


def _hidden(
    sums: Array, weight_scale: Array, x_scale: Array, offsets: Array, limit: float
) -> Array:
    """float64 [M, m]: what is quantised."""
    both = joined(
        offsets, lambda e, rows: wide(_times_scales(sums[rows], weight_scale[e], x_scale[rows]))
    )
    half = both.shape[1] // 2
    g, u = np.minimum(both[:, :half], limit), np.clip(both[:, half:], -limit, limit)
    return np.asarray(g / (1 + np.exp(-g)) * u)


@int8_swiglu_quant.oracle
def _(
    sums: Array, weight_scale: Array, x_scale: Array, offsets: Array, limit: float
) -> tuple[Array, Array]:
    h = _hidden(sums, weight_scale, x_scale, offsets, limit)
    scale = np.where(np.isfinite(h).all(1), np.abs(h).max(1) / 127, np.nan)
    ratio = np.divide(h, scale[:, None], out=np.zeros_like(h), where=scale[:, None] > 0)
    return int8_codes(ratio), scale


# Rows of every expert, N, K.
_GROUPS: tuple[tuple[tuple[int, ...], int, int], ...] = (
    ((0, 0, 0), 32, 24),
    ((0,), 4, 8),
    ((1,), 7, 5),
    ((0, 3, 0, 0, 5, 1, 0, 2), 33, 160),
    ((4, 1, 7), 48, 1030),
    ((0, 0, 9, 0), 64, 256),
)


def _rows(draw: Draw, t: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    q, scale = int8_token_quant.reference(draw.spread(t, k, dtype=torch.bfloat16))
    return q, scale


def _weight(draw: Draw, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    spread = torch.exp2(draw.integers(*shape[:-1], 1, low=-3, high=4).float())
    return quantize_weight_int8(draw.normal(*shape) * spread)


def _extremes(draw: Draw, *shape: int) -> torch.Tensor:
    """int8 of -128 and 127, mostly of one sign: sums beyond what fp32 holds exactly."""
    return torch.where(draw.uniform(*shape) < 0.03, 127, -128).to(torch.int8)


@int8_gemm.cases
def _(draw: Draw) -> Iterator[Case]:
    for t, n, k in ((0, 16, 8), (1, 256, 1024), (3, 5, 7), (5, 48, 1500), (17, 130, 512)):
        yield Case(f"{t}x{n}x{k}", PROFILE, (*_rows(draw, t, k), *_weight(draw, n, k)))
    x, x_scale = _rows(draw, 6, 64)
    weight, scale = _weight(draw, 24, 64)
    yield Case(
        "strided",
        PROFILE,
        (x[::2], x_scale[::2], weight.T.contiguous().T, torch.stack([scale, scale], 1)[:, 0]),
    )
    x, weight = _extremes(draw, 3, 4099), _extremes(draw, 20, 4099)
    # scales that leave the low bits of large sums visible in bf16
    yield Case(
        "large sums", PROFILE, (x, draw.uniform(3, low=0.5), weight, draw.uniform(20, low=0.5))
    )
    x, x_scale = _rows(draw, 4, 64)
    x_scale, scale = x_scale.clone(), scale.clone()
    x_scale[1], x_scale[2], scale[3], scale[4] = torch.nan, 0.0, torch.inf, 0.0
    yield Case(
        "NaN, infinite and zero scales", PROFILE, (x, x_scale, _weight(draw, 24, 64)[0], scale)
    )


@int8_grouped_gemm.cases
def _(draw: Draw) -> Iterator[Case]:
    for rows, n, k in _GROUPS:
        arguments = (*_rows(draw, sum(rows), k), *_weight(draw, len(rows), n, k), offsets_of(*rows))
        yield Case(f"{rows} {n}x{k}", PROFILE, arguments)
    x, x_scale = _rows(draw, 8, 96)
    weight, scale = _weight(draw, 2, 40, 96)
    strided = (
        x[::2],
        x_scale[::2],
        weight.transpose(1, 2).contiguous().transpose(1, 2),
        scale,
        offsets_of(1, 3),
    )
    yield Case("strided", PROFILE, strided)
    broken = torch.stack([scale[0], torch.full_like(scale[1], torch.nan)])
    yield Case("NaN scales of one expert", PROFILE, (x, x_scale, weight, broken, offsets_of(5, 3)))


@int8_grouped_sum.cases
def _(draw: Draw) -> Iterator[Case]:
    for rows, n, k in _GROUPS:
        x, weight = _rows(draw, sum(rows), k)[0], _weight(draw, len(rows), n, k)[0]
        yield Case(f"{rows} {n}x{k}", PROFILE, (x, weight, offsets_of(*rows)))
    x, weight = draw.bytes(8, 96).view(torch.int8), draw.bytes(2, 40, 96).view(torch.int8)
    strided = (x[::2], weight.transpose(1, 2).contiguous().transpose(1, 2), offsets_of(1, 3))
    yield Case("strided, any bytes", PROFILE, strided)
    large = (_extremes(draw, 5, 4099), _extremes(draw, 2, 20, 4099), offsets_of(2, 3))
    yield Case("large sums", PROFILE, large)
    most = torch.full((2, 1025), -128, dtype=torch.int8)
    yield Case("largest products", PROFILE, (most, most.clone().unsqueeze(0), offsets_of(2)))


_STEP_MARGIN = 2.0**-12


Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float]


def _decided(
    sums: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor,
    offsets: torch.Tensor,
    limit: float,
) -> Arguments:
    """Arguments with both sums zeroed where a code hangs on the last bits of fp32."""
    with np.errstate(all="ignore"):
        h = _hidden(sums.numpy(), weight_scale.numpy(), x_scale.numpy(), offsets.numpy(), limit)
        ratio = h / (np.abs(h).max(1, keepdims=True) / 127)
        open_ = np.abs(np.abs(ratio - np.floor(ratio)) - 0.5) < _STEP_MARGIN
    both = torch.from_numpy(np.concatenate([open_, open_], 1))
    return sums.masked_fill(both, 0), weight_scale, x_scale, offsets, limit


def _swiglu_arguments(draw: Draw, rows: tuple[int, ...], m: int, limit: float) -> Arguments:
    """Gate and up about 1 in size, in some rows beyond the clamp and in some far below."""
    t = sum(rows)
    sums = (draw.normal(t, 2 * m) * 3e4).to(torch.int32)
    size = torch.tensor([1.0, 8.0, 0.05, 30.0]).repeat(t)[:t]
    scales = draw.uniform(len(rows), 2 * m, low=0.5, high=2.0)
    return _decided(sums, scales, size / 3e4 * draw.uniform(t, low=0.7), offsets_of(*rows), limit)


@int8_swiglu_quant.cases
def _(draw: Draw) -> Iterator[Case]:
    for rows, m in (
        ((0, 0), 16),
        ((0,), 3),
        ((1,), 1),
        ((3, 0, 4), 7),
        ((2, 5, 0, 1), 130),
        ((5,), 512),
    ):
        for limit in (10.0, 0.3017, math.inf):
            yield Case(
                f"{rows} {m}, limit {limit}", PROFILE, _swiglu_arguments(draw, rows, m, limit)
            )
    sums, weight_scale, x_scale, offsets, limit = _swiglu_arguments(draw, (4, 4), 48, 10.0)
    strided = (torch.stack([sums, sums], 2)[..., 0], weight_scale, x_scale, offsets, limit)
    yield Case("strided", PROFILE, strided)
    special = sums.clone()
    special[3] = 0
    scales = x_scale.clone()
    scales[1], scales[2], scales[5] = torch.nan, torch.inf, 0.0
    yield Case(
        "NaN and infinite scales, zero rows",
        PROFILE,
        (special, weight_scale, scales, offsets, limit),
    )
    large = torch.full_like(sums, 2**24 + 1)
    yield Case("large sums", PROFILE, (large, weight_scale, scales * 2.0**-12, offsets, 1e4))


_SCALES: dict[str, Edit] = {
    "of the next one": lambda s: s.roll(1, -1),
    "of the first one for all": lambda s: s[..., :1].expand_as(s).contiguous(),
    "left out": torch.ones_like,
    "in bf16": lambda s: (s * 1.003).bfloat16().float(),
}
_CODES: dict[str, Edit] = {
    "last channel left out": lambda x: torch.cat([x[..., :-1], torch.zeros_like(x[..., -1:])], -1),
    "unsigned": lambda x: x.clamp(min=0),
    "int4": lambda x: x.clamp(-8, 7),
}


def _of(argument: str, prefix: str, edits: dict[str, Edit]) -> dict[str, Edits]:
    return {f"{prefix}{name}": {argument: edit} for name, edit in edits.items()}


for _op in (int8_gemm, int8_grouped_gemm):
    _op.wrong_arguments(
        _of("x_scale", "row scales ", _SCALES)
        | _of("weight_scale", "channel scales ", _SCALES)
        | _of("x", "rows: ", _CODES)
        | {"unsigned codes of weights": {"weight": _CODES["unsigned"]}}
    )
for _grouped in (int8_grouped_gemm, int8_grouped_sum, int8_swiglu_quant):
    _grouped.wrong_arguments(WRONG_OFFSETS)
int8_grouped_sum.wrong_arguments(_of("x", "rows: ", _CODES) | _of("weight", "weights: ", _CODES))
int8_grouped_sum.wrong_results(
    {
        "summed in fp32": lambda a, sums: (sums.float().int(),),
        "sums saturate in 24 bits": lambda a, sums: (sums.clamp(-(2**23), 2**23 - 1),),
    }
)
int8_grouped_sum.no_output_fault("one NaN", "int32 sums hold no NaN")
int8_swiglu_quant.no_output_fault("one NaN", "int8 codes hold no NaN")


@int8_gemm.fault("sums rounded to bf16 before the scales")
def _(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor:
    return scaled(exact_product(x, weight).bfloat16(), weight_scale, x_scale).bfloat16()


@int8_gemm.fault("rounded to bf16 between the scales")
def _(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor:
    return (exact_product(x, weight).float() * weight_scale).bfloat16() * x_scale.unsqueeze(
        -1
    ).bfloat16()


_EXACT_SCALES = {name: edit for name, edit in _SCALES.items() if name != "in bf16"}
int8_swiglu_quant.wrong_arguments(
    _of("weight_scale", "channel scales ", _EXACT_SCALES)
    | _of("x_scale", "row scales ", _EXACT_SCALES)
)
int8_swiglu_quant.wrong_step(clamped_swiglu, WRONG_HALVES)
int8_swiglu_quant.wrong_steps(
    {
        "rounded to bf16 before the SwiGLU": {
            scaled: lambda *arguments: scaled(*arguments).bfloat16().float()
        },
        "codes cut instead of rounded": {round_int8: lambda x: round_int8(x.trunc())},
        "range 128 instead of 127": {row_scale: lambda rows, largest: row_scale(rows, largest + 1)},
    }
)

SAME_SUMS = {"exact_product: True -> False": "the lengths agree anyway"}

SAME_SCALED = {"scaled: sums.float() -> sums": "int32 times fp32 is fp32"}
ALREADY_FP32 = {
    **dict.fromkeys(
        (
            "clamped_swiglu: compute(gate) -> gate",
            "clamped_swiglu: compute(up) -> up",
            "compute: x.float() -> x",
        ),
        "gate and up are fp32 already",
    ),
    "compute: x.dtype == torch.float64 -> x.dtype != torch.float64": "both ways give fp32",
    "round_int8: x.round().clamp(-INT8_MAX, INT8_MAX) -> x.round()": (
        "only a subnormal scale is that coarse, as in the rows of write_cache_indexer_int8"
    ),
}
int8_gemm.explain(SAME_SUMS, SAME_SCALED)
int8_grouped_gemm.explain(SAME_SUMS, SAME_SCALED)
int8_grouped_sum.explain(SAME_SUMS)
int8_swiglu_quant.explain(SAME_SCALED, SAME_CODES, INT8_RATIOS, ALREADY_FP32)
explain_experts(int8_grouped_gemm)
explain_experts(int8_grouped_sum)
explain_experts(int8_swiglu_quant)
