"""Proof of FP8 and FP4 quantisation (spec/v4.md 6.1, 6.2): cases, oracles, named faults."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from dsv4_backend.contract import Case, Draw
from dsv4_backend.ops.formats import (
    E2M1_MAX,
    E2M1_MIDPOINTS,
    E4M3_MAX,
    block_scale,
    round_e2m1,
    round_e4m3,
)
from dsv4_backend.ops.quant import (
    ACT_FLOOR,
    FP4_FLOOR,
    Rule,
    act_qdq,
    act_quant,
    act_scale,
    fp4_qdq,
    fp4_quant,
    fp4_scale,
)
from dsv4_backend.proofs import bounds
from dsv4_backend.proofs.numerics import E8M0, Array, cast, dequantise, quantise_fp4, quantise_fp8

_DTYPES = {"ideal": torch.float32, "official": torch.bfloat16}


@act_quant.oracle
def _(x: Array, block_size: int) -> tuple[Array, Array]:
    codes, scales = quantise_fp8(x, block_size)
    return codes, cast(E8M0, scales)


@act_qdq.oracle
def _(x: Array, block_size: int, channels: int) -> Array:
    y = x.copy()
    codes, scales = quantise_fp8(x[..., :channels], block_size)
    y[..., :channels] = cast(x.dtype, dequantise(codes, scales, block_size))
    return y


@fp4_quant.oracle
def _(x: Array, block_size: int) -> tuple[Array, Array]:
    codes, scales = quantise_fp4(x, block_size)
    nibbles = codes.view(np.uint8) & 15
    packed = nibbles[..., 0::2] + 16 * nibbles[..., 1::2]
    return packed.astype(np.uint8).view(np.int8), cast(E8M0, scales)


@fp4_qdq.oracle
def _(x: Array, block_size: int) -> Array:
    return cast(x.dtype, dequantise(*quantise_fp4(x, block_size), block_size))


Inputs = Iterator[tuple[str, torch.Tensor, int]]


def _inputs(
    draw: Draw, dtype: torch.dtype, block: int, largest: float, midpoints: torch.Tensor
) -> Inputs:
    """Named inputs [..., K] with K even, and their block size;
    midpoints: ties of the value format.
    """
    for rows, k in ((0, block), (3, 0), (1, 2), (3, 6), (5, 5 * block // 2), (2, 4 * block)):
        yield f"{rows}x{k}", draw.spread(rows, k, dtype=dtype), block
    yield "other block", draw.spread(3, 4, block + 6, dtype=dtype), block // 2
    yield "strided rows and channels", draw.spread(2 * block, 6, dtype=dtype).T[::2], block
    tiny = torch.tensor([0.0, 1e-40, 1e-38, 1e-7, 1e-6, 1e-5, 9.9e-5, 1e-4])
    yield (
        "zero and tiny blocks",
        draw.uniform(8, block, low=-1).mul(tiny.unsqueeze(-1)).to(dtype),
        block,
    )
    amax = (largest * torch.exp2(torch.arange(-20.0, 21.0))).to(dtype)
    amax = torch.stack(
        [amax, torch.nextafter(amax, 2 * amax), -torch.nextafter(amax, 0 * amax)], -1
    )
    near = draw.uniform(41, 2 * block, 3, low=-1).to(dtype) * amax.unsqueeze(1)
    near[:, 1], near[:, block] = amax, -amax
    yield "largest * 2^k and one ulp off", near.transpose(1, 2), block
    ties = torch.cat([torch.tensor([largest, -largest]), midpoints, -midpoints])
    yield "ties", (ties * torch.tensor([[2.0**-10], [1.0], [32.0]])).to(dtype), len(ties)
    special = draw.normal(4, 2 * block, dtype=dtype)
    special[0, 3], special[1, block], special[2, 5], special[3] = (
        torch.nan,
        torch.inf,
        -torch.inf,
        -0.0,
    )
    yield "NaN, infinities, negative zeros", special, block


def _e4m3_midpoints() -> torch.Tensor:
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return (values[1:] + values[:-1]) / 2


def _fp8_inputs(draw: Draw, dtype: torch.dtype) -> Inputs:
    return _inputs(draw, dtype, 128, E4M3_MAX, _e4m3_midpoints())


def _fp4_inputs(draw: Draw, dtype: torch.dtype) -> Inputs:
    return _inputs(draw, dtype, 32, E2M1_MAX, torch.tensor(E2M1_MIDPOINTS))


def _every_bf16() -> torch.Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).view(512, 128)


def _every_fp16() -> torch.Tensor:
    """Both signs of a magnitude side by side, 0 to NaN upwards; a row of zeros last."""
    values = torch.arange(2**15, dtype=torch.int16).view(torch.float16)
    signed = torch.stack([values, -values], -1).view(256, 256)
    return torch.cat([signed, torch.tensor([0.0, -0.0], dtype=torch.float16).repeat(1, 128)])


@act_quant.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in _DTYPES.items():
        for name, x, block in _fp8_inputs(draw, dtype):
            yield Case(name, profile, (x, block))
        for rows, k in ((1, 64), (5, 320)):
            x = draw.spread(rows, k, dtype=dtype)
            yield Case(f"{rows}x{k}, MX blocks", profile, (x, 32))
    yield Case("every bf16", "official", (_every_bf16(), 128))
    yield Case("every fp16", "official", (_every_fp16(), 128))


@act_qdq.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in _DTYPES.items():
        for name, x, block in _fp8_inputs(draw, dtype):
            yield Case(name, profile, (x, block, x.shape[-1]))
        for channels in (0, 1, 448):
            yield Case(
                f"{channels} of 512", profile, (draw.spread(5, 512, dtype=dtype), 64, channels)
            )
        kept = torch.tensor([[3.0, -2.0, -0.0, 0.0, -0.0, 5.0]], dtype=dtype)
        yield Case("zeros that are kept", profile, (kept, 64, 2))
    yield Case("every bf16", "official", (_every_bf16(), 64, 128))
    yield Case("every fp16", "official", (_every_fp16(), 64, 256))


@fp4_quant.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in _DTYPES.items():
        for name, x, block in _fp4_inputs(draw, dtype):
            yield Case(name, profile, (x, block))
    yield Case("every bf16", "official", (_every_bf16(), 32))
    yield Case("every fp16", "official", (_every_fp16(), 32))


@fp4_qdq.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in _DTYPES.items():
        for name, x, block in _fp4_inputs(draw, dtype):
            yield Case(name, profile, (x, block))
        yield Case("odd", profile, (draw.spread(3, 33, dtype=dtype), 32))
    yield Case("every bf16", "official", (_every_bf16(), 32))
    yield Case("every fp16", "official", (_every_fp16(), 32))


def _field(blocks: torch.Tensor, factor: float, floor: float) -> torch.Tensor:
    v = blocks.abs().amax(-1).float().clamp(min=floor) * factor
    return v.view(torch.int32) >> 23 & 255


def _coarse(x: torch.Tensor, bits: int, smallest: int, rounding: Rule) -> torch.Tensor:
    """Round x by `rounding` to `bits` mantissa bits, exponents not below `smallest`."""
    exponent = (torch.frexp(x.double()).exponent - 1).clamp(min=smallest, max=99)
    quantum = torch.exp2((exponent - bits).double())
    return rounding(x.double() / quantum) * quantum


def _half_away(x: torch.Tensor) -> torch.Tensor:
    return x.sign() * (x.abs() + 0.5).floor()


def _half_down(x: torch.Tensor) -> torch.Tensor:
    return x.sign() * (x.abs() - 0.5).ceil()


def _scale_faults(largest: float, floor: float) -> dict[str, Rule]:
    return {
        "exponent rounded down": lambda b: _field(b, 1 / largest, floor).to(torch.uint8),
        "exponent rounded to nearest": lambda b: _field(b, 2**0.5 / largest, floor).to(torch.uint8),
        "exponent one up at powers of two": lambda b: (
            (_field(b, 1 / largest, floor) + 1).clamp(max=255).to(torch.uint8)
        ),
        "largest value instead of magnitude": lambda b: block_scale(b.clamp(min=0), largest, floor),
        "scale floored at 1e-4": lambda b: block_scale(b, largest, 1e-4 * largest),
        "floor of the other format": lambda b: block_scale(
            b, largest, FP4_FLOOR if floor == ACT_FLOOR else ACT_FLOOR
        ),
        "one scale per token": lambda b: (
            block_scale(b.flatten(-2), largest, floor).unsqueeze(-1).expand(b.shape[:-1])
        ),
        "scale of the next block": lambda b: block_scale(b, largest, floor).roll(-1, -1),
        "quarter of the range unused": lambda b: block_scale(b, largest * 0.75, floor),
    }


_E4M3_FAULTS: dict[str, Rule] = {
    "rounded toward zero": lambda x: round_e4m3(_coarse(x, 3, -6, torch.trunc)),
    "ties away from zero": lambda x: round_e4m3(_coarse(x, 3, -6, _half_away)),
    "subnormals flushed": lambda x: round_e4m3(torch.where(x.abs() < 2.0**-6, 0 * x, x)),
    "sign of zero lost": lambda x: round_e4m3(round_e4m3(x).float() + 0.0),
}
_E2M1_FAULTS: dict[str, Rule] = {
    "rounded toward zero": lambda x: round_e2m1(_coarse(x, 1, 0, torch.trunc)),
    "ties away from zero": lambda x: round_e2m1(_coarse(x, 1, 0, _half_away)),
    "ties toward zero": lambda x: round_e2m1(_coarse(x, 1, 0, _half_down)),
    "code 7 never used": lambda x: round_e2m1(x.clamp(-4, 4)),
    "int4 levels": lambda x: (
        x.nan_to_num(0.0).abs().round().to(torch.uint8) + x.signbit().to(torch.uint8) * 8
    ),
    "sign of zero lost": lambda x: torch.where(round_e2m1(x) == 8, 0, round_e2m1(x)),
}

for _contracts, _scale_of, _scales, _round, _roundings in (
    ((act_quant, act_qdq), act_scale, _scale_faults(E4M3_MAX, ACT_FLOOR), round_e4m3, _E4M3_FAULTS),
    ((fp4_quant, fp4_qdq), fp4_scale, _scale_faults(E2M1_MAX, FP4_FLOOR), round_e2m1, _E2M1_FAULTS),
):
    for _contract in _contracts:
        _contract.wrong_step(_scale_of, _scales)
        _contract.wrong_step(_round, _roundings)


@act_qdq.fault("last channels quantised")
def _(x: torch.Tensor, block_size: int, channels: int) -> torch.Tensor:
    return act_qdq.reference(x.flip(-1), block_size, channels).flip(-1)


act_qdq.wrong_arguments({"all channels quantised": lambda a: a._replace(channels=a.x.shape[-1])})
fp4_quant.wrong_results(
    {"nibbles swapped": {"packed": lambda packed: packed << 4 | packed >> 4 & 15}}
)
fp4_quant.no_output_fault("one NaN", "packed codes are integers")


_SAME_SCALE = {
    "divide_blocks: scale_values(scale).to(wide.dtype) -> scale_values(scale)": "it is fp32",
    "split_blocks: 1 -> 2": "zeros fill a block that is wider than the channels",
    "scale_bytes: amax.float() -> amax": "block_scale has made it fp32",
}
_SAME_BYTES = {
    "scale_values: scale.view(torch.float8_e8m0fnu).float() -> scale.view(torch.float8_e8m0fnu)": (
        "divide_blocks casts the scale to fp32"
    ),
}
_EXACT_RATIOS = "ratios to 2^-22 and more are exact in bf16 and fp16 too, or far below e4m3"
_SAME_E4M3 = {
    "round_e4m3: x.float() -> x": "a divided block is fp32 already",
    "round_e4m3: x.float().clamp(-E4M3_MAX, E4M3_MAX) -> x.float()": "no ratio is above 448",
    "block_scale: blocks.abs().amax(-1).float() -> blocks.abs().amax(-1)": (
        "bf16 and fp16 round the floor 1e-4 to numbers of the same scale 2^-22"
    ),
    "divide_blocks: compute(blocks) -> blocks": _EXACT_RATIOS,
}
_SAME_RATIOS = dict.fromkeys(
    ("compute: x.dtype == torch.float64 -> x.dtype != torch.float64", "compute: x.float() -> x"),
    _EXACT_RATIOS,
)
_SAME_E2M1 = {
    "round_e2m1: 0.0 -> 0.01": "0.01 has code 0",
    "round_e2m1: (magnitude > midpoint if i % 2 == 0 else magnitude >= midpoint).to(torch.uint8)"
    " -> magnitude > midpoint if i % 2 == 0 else magnitude >= midpoint": "uint8 plus bool is uint8",
}
_SAME_VALUES = dict.fromkeys(
    (
        "_straight_through: rounded.to(x.dtype) - (x.detach() - x) -> rounded.to(x.dtype)",
        "_straight_through: x.detach() - x -> x - x.detach()",
    ),
    "+0 is subtracted either way; tests/backend/test_golden_quant.py checks the gradient",
)
_SAME_ZEROS = dict.fromkeys(
    (
        "block_scale: blocks.abs().amax(-1).float().clamp(min=floor) -> "
        "blocks.abs().amax(-1).float()",
        "block_scale: blocks.abs().amax(-1).float() -> blocks.abs().amax(-1)",
    ),
    "below the floor scales differ for blocks only whose codes are all 0",
)

ACT_QUANT_EQUIVALENTS = {
    **_SAME_SCALE,
    **_SAME_BYTES,
    **_SAME_E4M3,
    **bounds.E4M3_RATIOS,
    **bounds.SHORT_ROWS,
}
"""Automatic mutants that change nothing in `act_quant`, whichever operator calls it."""
act_quant.explain(ACT_QUANT_EQUIVALENTS, _SAME_RATIOS)
act_qdq.explain(_SAME_SCALE, _SAME_E4M3, _SAME_RATIOS, _SAME_VALUES)
act_qdq.explain(bounds.E4M3_RATIOS, bounds.SHORT_ROWS)
fp4_quant.explain(_SAME_SCALE, _SAME_BYTES, _SAME_E2M1)
fp4_qdq.explain(_SAME_SCALE, _SAME_E2M1, _SAME_VALUES, _SAME_ZEROS)
for _contract in (fp4_quant, fp4_qdq):
    _contract.explain(bounds.SHORT_ROWS)
act_qdq.equivalent("e4m3_values: 256 -> 257", "no code looks up a 257th value")
fp4_qdq.equivalent(
    "round_e2m1: finite.signbit().to(torch.uint8) -> finite.signbit()", "any integer type will do"
)
