"""Proof of per-token quantisation (spec/deployments.md 1): cases, oracles, named faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from dsv4_backend.contract import Case, Draw, Operator
from dsv4_backend.ops.formats import E4M3_MAX, round_e4m3
from dsv4_backend.ops.norm import rms_norm
from dsv4_backend.ops.token_quant import (
    INT8_MAX,
    fp8_token_quant,
    int8_token_quant,
    rms_norm_int8,
    round_int8,
    row_scale,
)
from dsv4_backend.proofs.bounds import E4M3_RATIOS, INT8_RATIOS
from dsv4_backend.proofs.numerics import E4M3, Array, cast, far_from_ties, rms_normed, wide


def token_codes(
    x: Array, largest: float, round_to: Callable[[Array], Array]
) -> tuple[Array, Array]:
    """(codes [..., K], fp32 scales [...]): row by row, the largest magnitude becomes `largest`."""
    rows = x.reshape(-1, x.shape[-1]).astype(np.float32)
    scales = np.zeros(len(rows), np.float32)
    codes = []
    for number, row in enumerate(rows):
        scale = np.abs(row).max() / np.float32(largest)
        scales[number] = scale if np.isfinite(row).all() else np.nan
        known = scales[number] > 0
        codes.append(round_to(row / scale if known else np.full_like(row, 0 * scales[number])))
    joined = np.array(codes).reshape(x.shape) if codes else round_to(rows).reshape(x.shape)
    return joined, scales.reshape(x.shape[:-1])


def int8_codes(ratios: Array) -> Array:
    """int8 of fp32 ratios; NaN is 0."""
    steps = np.clip(np.rint(np.nan_to_num(ratios)), -127, 127)
    return np.asarray(steps.astype(np.int8))


@int8_token_quant.oracle
def _(x: Array) -> tuple[Array, Array]:
    codes, scales = token_codes(x, 127, int8_codes)
    return codes, wide(scales)


@fp8_token_quant.oracle
def _(x: Array) -> tuple[Array, Array]:
    codes, scales = token_codes(x, 448, lambda ratios: cast(E4M3, np.clip(ratios, -448, 448)))
    return codes, wide(scales)


def _ties(largest: float, values: torch.Tensor, rows: int) -> torch.Tensor:
    """[rows, K]: values half way between two codes under scales
    of 1 and powers of two beside it.
    """
    row = torch.cat([torch.tensor([largest, -largest]), values, -values])
    return row * torch.exp2(torch.arange(rows) - rows // 2).unsqueeze(1)


def _inputs(
    draw: Draw, dtype: torch.dtype, largest: float, ties: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    for shape in ((0, 8), (1, 1), (3, 7), (2, 0, 5), (2, 3, 130), (4, 4096)):
        yield "x".join(map(str, shape)), draw.spread(*shape, dtype=dtype)
    yield "strided rows and channels", draw.spread(48, 6, dtype=dtype).T[::2]
    yield (
        "largest value last",
        (draw.uniform(6, 9, low=0.5) * torch.exp2(torch.arange(9.0))).to(dtype),
    )
    yield "ties", _ties(largest, ties, 5).to(dtype)
    yield "maxima of either sign", (draw.uniform(8, 33, low=-1) - 1).to(dtype)
    special = draw.normal(6, 40, dtype=dtype)
    special[0, 3], special[1, 0], special[2, 5], special[3], special[4] = (
        torch.nan,
        torch.inf,
        -torch.inf,
        0.0,
        -0.0,
    )
    special[5, ::2] = -0.0
    yield "NaN, infinities, zeros", special
    smallest = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}[dtype]
    yield "subnormal rows", (draw.integers(5, 24, low=-9, high=10).float() * smallest).to(dtype)
    yield "largest rows", (draw.uniform(3, 24, low=-1) * torch.finfo(dtype).max).to(dtype)


def _half_steps() -> torch.Tensor:
    return torch.arange(0.5, 126)


def _e4m3_midpoints() -> torch.Tensor:
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return (values[1:] + values[:-1]) / 2


def _cases(op: Operator, profile: str, largest: float, ties: Callable[[], torch.Tensor]) -> None:
    @op.cases
    def _(draw: Draw) -> Iterator[Case]:
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            for label, x in _inputs(draw, dtype, largest, ties()):
                yield Case(f"{label}, {name}", profile, (x,))


_cases(int8_token_quant, "a2a3-int8", INT8_MAX, _half_steps)
_cases(fp8_token_quant, "a5-mx", E4M3_MAX, _e4m3_midpoints)


def _power_of_two(rows: torch.Tensor, largest: float) -> torch.Tensor:
    return torch.exp2(row_scale(rows, largest).log2().ceil())


_SCALE_FAULTS: dict[str, Callable[..., torch.Tensor]] = {
    "one step more": lambda rows, largest: row_scale(rows, largest + 1),
    "largest value instead of magnitude": lambda rows, largest: row_scale(
        rows.clamp(min=0), largest
    ),
    "magnitude of the smallest value": lambda rows, largest: row_scale(rows.clamp(max=0), largest),
    "one scale for all rows": lambda rows, largest: (
        row_scale(rows.flatten(), largest).expand(rows.shape[:-1])
        if rows.numel()
        else row_scale(rows, largest)
    ),
    "scale rounded up to a power of two": _power_of_two,
    "scale in half precision": lambda rows, largest: row_scale(rows, largest).half().float(),
    "reciprocal multiplied": lambda rows, largest: row_scale(rows, 1.0) * (1 / largest),
    "floor of 1e-4": lambda rows, largest: row_scale(rows, largest).clamp(min=1e-4 / largest),
    "last channel not looked at": lambda rows, largest: row_scale(
        rows[..., : max(1, rows.shape[-1] - 1)], largest
    ),
}


def _half_away(x: torch.Tensor) -> torch.Tensor:
    return x.sign() * (x.abs() + 0.5).floor()


_INT8_FAULTS: dict[str, Callable[..., torch.Tensor]] = {
    "cut": lambda x: round_int8(x.trunc()),
    "ties away from zero": lambda x: round_int8(_half_away(x)),
    "rounded down": lambda x: round_int8(x.floor()),
    "unsigned": lambda x: x.round().clamp(0, INT8_MAX).to(torch.int8),
    "wraps past 127": lambda x: (x * 1.02).round().to(torch.int16).to(torch.int8),
}
_E4M3_FAULTS: dict[str, Callable[..., torch.Tensor]] = {
    "e5m2 codes": lambda x: x.to(torch.float8_e5m2).view(torch.float8_e4m3fn),
    "subnormals flushed": lambda x: round_e4m3(torch.where(x.abs() < 2.0**-6, 0 * x, x)),
    "largest code 240": lambda x: round_e4m3(x.clamp(-240, 240)),
    "sign of zero lost": lambda x: round_e4m3(round_e4m3(x).float() + 0.0),
}


for _op, _round, _roundings in (
    (int8_token_quant, round_int8, _INT8_FAULTS),
    (fp8_token_quant, round_e4m3, _E4M3_FAULTS),
):
    _op.wrong_step(row_scale, _SCALE_FAULTS)
    _op.wrong_step(_round, _roundings)

SAME_CODES = {
    "over_scale: divisor > 0 -> divisor >= 0": "0 / 0 is NaN, which the cast to int8 makes 0",
    "over_scale: 0.0 -> 0.01": "0.01 rounds to 0",
}
"""Automatic mutants that change no int8 code, whichever operator quantises."""
int8_token_quant.no_output_fault("one NaN", "int8 codes hold no NaN")
int8_token_quant.explain(SAME_CODES, INT8_RATIOS)
fp8_token_quant.explain(E4M3_RATIOS)
int8_token_quant.equivalent(
    "round_int8: x.round().clamp(-INT8_MAX, INT8_MAX) -> x.round()",
    "a scale of bf16 or fp16 rows is so precise that no ratio passes 127 by half a step",
)
fp8_token_quant.equivalent(
    "round_e4m3: x.float().clamp(-E4M3_MAX, E4M3_MAX) -> x.float()",
    "the cast to e4m3 saturates too",
)
fp8_token_quant.equivalent("round_e4m3: x.float() -> x", "ratios are fp32 already")


@rms_norm_int8.oracle
def _(x: Array, weight: Array, eps: float) -> tuple[Array, Array]:
    normed = rms_normed(x, weight, eps)
    scales = np.abs(normed).max(-1) / 127
    known = np.asarray(np.isfinite(normed).all(-1))
    with np.errstate(all="ignore"):
        codes = int8_codes(np.where(known[..., None], normed / scales[..., None], 0.0))
    return codes, np.where(known, scales, np.nan)


def _decided_rows(
    draw: Draw, dtype: torch.dtype, *shape: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Arguments of `rms_norm_int8` none of whose rows has a value near a tie."""
    weight = torch.linspace(0.5, 2, shape[-1]).to(dtype)  # the largest value is often the last
    rows: list[torch.Tensor] = []
    while len(rows) < int(np.prod(shape[:-1])):
        row = draw.spread(1, shape[-1], dtype=dtype)
        normed = rms_normed(row.float().numpy(), weight.float().numpy(), 1e-6)
        if far_from_ties(normed / (np.abs(normed).max() / 127)):
            rows.append(row)
    x = torch.cat([torch.zeros(0, shape[-1], dtype=dtype), *rows]).view(shape)
    return x, weight, 1e-6


@rms_norm_int8.cases
def _(draw: Draw) -> Iterator[Case]:
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        for shape in ((0, 8), (1, 1), (3, 7), (5, 64), (2, 3, 130), (6, 256)):
            arguments = _decided_rows(draw, dtype, *shape)
            yield Case(f"{'x'.join(map(str, shape))}, {name}", "a2a3-int8", arguments)
        x, weight, eps = _decided_rows(draw, dtype, 4, 48)
        strided = torch.stack([x, x], 2)[..., 0]
        yield Case(f"strided, {name}", "a2a3-int8", (strided, weight, eps))
        tiny = (x.float() * 2.0**-12).to(dtype), weight, 0.37
        if far_from_ties(_ratios(*tiny)):
            yield Case(f"epsilon matters, {name}", "a2a3-int8", tiny)
        special = x.clone()
        special[0, 3], special[1, 0] = torch.nan, torch.inf
        yield Case(f"NaN and infinity, {name}", "a2a3-int8", (special, weight, eps))


def _ratios(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Array:
    normed = rms_normed(x.float().numpy(), weight.float().numpy(), eps)
    return np.asarray(normed / (np.abs(normed).max(-1, keepdims=True) / 127))


rms_norm_int8.wrong_arguments(
    {
        "epsilon left out": {"eps": 0.0},
        "weight left out": {"weight": torch.ones_like},
        "weight of the next channel": {"weight": lambda weight: weight.roll(1)},
        "mean subtracted": {"x": lambda x: x - x.float().mean(-1, keepdim=True).to(x.dtype)},
    }
)
_UNDECIDED = "reciprocal multiplied"  # half a unit in the last place, which cases keep away from
rms_norm_int8.wrong_step(
    row_scale, {name: fault for name, fault in _SCALE_FAULTS.items() if name != _UNDECIDED}
)
rms_norm_int8.wrong_step(
    rms_norm.reference,
    {
        "rounded to bf16 before the codes": lambda *given: (
            rms_norm.reference(*given).bfloat16().float()
        )
    },
)
rms_norm_int8.no_output_fault("one NaN", "int8 codes hold no NaN")
_FP32 = "rows are fp32 already, and the weight takes part in fp32"
rms_norm_int8.explain(
    SAME_CODES,
    INT8_RATIOS,
    dict.fromkeys(
        (
            "compute: x.float() -> x",
            "compute: x.dtype == torch.float64 -> x.dtype != torch.float64",
            "rms_norm: compute(x) -> x",
            "rms_norm: weight.to(wide.dtype) -> weight",
            "rms_norm: (scaled * weight.to(wide.dtype)).to(x.dtype) -> "
            "scaled * weight.to(wide.dtype)",
        ),
        _FP32,
    ),
    {
        "round_int8: x.round().clamp(-INT8_MAX, INT8_MAX) -> x.round()": "the largest magnitude "
        "over its own scale passes 127 by less than half a step"
    },
)
