"""FP8 and FP4 quantisation of activations, real and simulated (spec/v4.md 6.1, 6.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.nn.functional import pad

from dsv4_backend.contract import Case, Draw, Operator, Reference, Tolerance, operator
from dsv4_backend.errors import argument_error
from dsv4_backend.mutants import add_output_faults
from dsv4_backend.ops.formats import (
    E2M1_MAX,
    E2M1_MIDPOINTS,
    E4M3_MAX,
    block_scale,
    divide_blocks,
    e2m1_values,
    e4m3_values,
    pack_e2m1,
    round_e2m1,
    round_e4m3,
    scale_bytes,
    scale_values,
    split_blocks,
    unpack_e2m1,
)

ACT_FLOOR = 1e-4
FP4_FLOOR = E2M1_MAX * 2.0**-126
FP8_WEIGHT_FLOOR = E4M3_MAX * 2.0**-126
FP8_TILE = 128
FP4_BLOCK = 32
_DTYPES = {"ideal": torch.float32, "official": torch.bfloat16}
_EXACT = Tolerance(reason="quantisation rounds once, by rule: every bit is decided")

Rule = Callable[[torch.Tensor], torch.Tensor]


def _act_scale(blocks: torch.Tensor) -> torch.Tensor:
    return block_scale(blocks, E4M3_MAX, ACT_FLOOR)


def _fp4_scale(blocks: torch.Tensor) -> torch.Tensor:
    return block_scale(blocks, E2M1_MAX, FP4_FLOOR)


def _quantise(x: torch.Tensor, block_size: int, scale_of: Rule, round_to: Rule) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [..., B, block_size] and scale bytes [..., B] of x [..., K]."""
    blocks = split_blocks(x.detach(), block_size)
    scale = scale_of(blocks)
    return round_to(divide_blocks(blocks, scale)), scale


def _merge(blocks: torch.Tensor, channels: int) -> torch.Tensor:
    return blocks.flatten(-2)[..., :channels].contiguous()


def _straight_through(x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    # x.detach() - x is +0, so the value and the sign of its zeros are those of `rounded`; the gradient is x's.
    return rounded.to(x.dtype) - (x.detach() - x)


def _fp8_quant(
    x: torch.Tensor, block_size: int, scale_of: Rule = _act_scale, round_to: Rule = round_e4m3
) -> tuple[torch.Tensor, torch.Tensor]:
    q, scale = _quantise(x, block_size, scale_of, round_to)
    return _merge(q, x.shape[-1]), scale.view(torch.float8_e8m0fnu)


def _fp8_qdq(
    x: torch.Tensor, block_size: int, channels: int, scale_of: Rule = _act_scale, round_to: Rule = round_e4m3
) -> torch.Tensor:
    head = x[..., :channels]
    q, scale = _quantise(head, block_size, scale_of, round_to)
    value = _merge(e4m3_values(q) * scale_values(scale).unsqueeze(-1), channels)
    return torch.cat([_straight_through(head, value), x[..., channels:]], -1)


def _fp4_quant(
    x: torch.Tensor, block_size: int, scale_of: Rule = _fp4_scale, round_to: Rule = round_e2m1
) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale = _quantise(x, block_size, scale_of, round_to)
    return pack_e2m1(_merge(codes, x.shape[-1])), scale.view(torch.float8_e8m0fnu)


def _fp4_qdq(
    x: torch.Tensor, block_size: int, scale_of: Rule = _fp4_scale, round_to: Rule = round_e2m1
) -> torch.Tensor:
    codes, scale = _quantise(x, block_size, scale_of, round_to)
    return _straight_through(x, _merge(e2m1_values(codes) * scale_values(scale).unsqueeze(-1), x.shape[-1]))


@operator(
    "act_quant(Tensor x, int block_size) -> (Tensor q, Tensor scale)",
    rows=(7,),
    arguments={"x": "float [..., K]"},
    tolerance=_EXACT,
)
def act_quant(x: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 quantisation of consecutive blocks of channels with power-of-two scales.

    x: [..., K] float; block_size: 128 for GEMM inputs, 64 for KV rows; the last block may be short.
    Returns q: float8_e4m3fn [..., K], scale: float8_e8m0fnu [..., ceil(K / block_size)]; x is about q * scale.
    amax of a block is floored at 1e-4, scale = 2^ceil(log2(fp32(amax * fp32(1/448)))) through bits, q is x / scale
    rounded to nearest even. NaN or infinity in a block: its scale is byte 0xFF and its q bytes are 0x7F. Zero rows
    give empty results. No gradient. Source: spec/v4.md 6.1 [OFF-K].
    """
    return _fp8_quant(x, block_size)


@operator(
    "act_qdq(Tensor x, int block_size, int channels) -> Tensor",
    rows=(7,),
    arguments={"x": "float [..., K]"},
    tolerance=_EXACT,
)
def act_qdq(x: torch.Tensor, block_size: int, channels: int) -> torch.Tensor:
    """The first `channels` channels after FP8 quantisation and back (`act_quant`), the others unchanged.

    x: [..., K] float; 0 <= channels <= K. KV rows use block 64 on the 448 channels before the RoPE part.
    Returns [..., K] in x's dtype, one cast of fp32(q * scale): the largest bf16 values become infinite. A block with
    NaN or infinity becomes NaN. Zero rows give an empty result. Gradient: straight-through, that of x.
    Source: spec/v4.md 6.1 step 5 [OFF-K].
    """
    return _fp8_qdq(x, block_size, channels)


@operator(
    "fp4_quant(Tensor x, int block_size) -> (Tensor packed, Tensor scale)",
    rows=(8,),
    arguments={"x": "float [..., K]"},
    tolerance=_EXACT,
)
def fp4_quant(x: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """FP4 (e2m1) quantisation of consecutive blocks of channels with power-of-two scales, two codes per byte.

    x: [..., K] float, K even; block_size: 32; the last block may be short.
    Returns packed: int8 [..., K/2], low nibble = even channel, high nibble = odd channel; scale: float8_e8m0fnu
    [..., ceil(K / block_size)]. amax is floored at 6 * 2^-126, scale = 2^ceil(log2(fp32(amax * fp32(1/6)))) through
    bits, the code is x / scale rounded to nearest, ties to the even code; bit 3 is the sign, also of zero.
    NaN or infinity in a block: its scale is byte 0xFF and its codes are 0. Zero rows give empty results. No gradient.
    Source: spec/v4.md 6.2 [OFF-K].
    """
    return _fp4_quant(x, block_size)


@operator(
    "fp4_qdq(Tensor x, int block_size) -> Tensor",
    rows=(8,),
    arguments={"x": "float [..., K]"},
    tolerance=_EXACT,
)
def fp4_qdq(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """Values after FP4 quantisation and back (`fp4_quant`).

    x: [..., K] float, K of either parity; block_size: 32. Indexer queries and keys, after the Hadamard rotation.
    Returns [..., K] in x's dtype, one cast of fp32(value * scale). A block with NaN or infinity becomes NaN. Zero rows
    give an empty result. Gradient: straight-through, that of x. Source: spec/v4.md 6.2 [OFF-K].
    """
    return _fp4_qdq(x, block_size)


def _check_block_size(op: Operator, block_size: int) -> None:
    if block_size < 1:
        raise op.reject("block_size", block_size, "at least 1")


@act_quant.shapes
def _(x: torch.Tensor, block_size: int) -> None:
    _check_block_size(act_quant, block_size)


@act_qdq.shapes
def _(x: torch.Tensor, block_size: int, channels: int) -> None:
    _check_block_size(act_qdq, block_size)
    if not 0 <= channels <= x.shape[-1]:
        raise act_qdq.reject("channels", channels, f"0 to the {x.shape[-1]} channels of x")


@fp4_quant.shapes
def _(x: torch.Tensor, block_size: int) -> None:
    _check_block_size(fp4_quant, block_size)
    if x.shape[-1] % 2:
        raise fp4_quant.reject("x", f"{x.shape[-1]} channels", "an even number, two codes per byte")


@fp4_qdq.shapes
def _(x: torch.Tensor, block_size: int) -> None:
    _check_block_size(fp4_qdq, block_size)


def quantize_weight_fp8(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float [N, K] -> (float8_e4m3fn [N, K], float8_e8m0fnu [ceil(N/128), ceil(K/128)]), one scale per 128x128 tile.

    Source: spec/v4.md 6.3.
    """
    n, k = w.shape
    wide = w.detach().float().contiguous()
    padded = pad(wide, (0, -k % FP8_TILE, 0, -n % FP8_TILE))
    tiles = padded.reshape(padded.shape[0] // FP8_TILE, FP8_TILE, padded.shape[1] // FP8_TILE, FP8_TILE)
    scale = scale_bytes(tiles.abs().amax((1, 3)).clamp(min=FP8_WEIGHT_FLOOR), E4M3_MAX)
    return round_e4m3(wide / expand_tiles(scale, n, k)), scale.view(torch.float8_e8m0fnu)


def quantize_weight_fp4(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float [N, K], K a multiple of 32 -> (int8 [N, K/2], float8_e8m0fnu [N, K/32]), low nibble = even k.

    Source: spec/v4.md 6.3.
    """
    if w.shape[1] % FP4_BLOCK:
        expected = f"a multiple of {FP4_BLOCK}"
        raise argument_error("quantize_weight_fp4", "w", f"{w.shape[1]} columns", expected)
    return _fp4_quant(w, FP4_BLOCK)


def dequantize_fp8(w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(float8_e4m3fn [N, K], float8_e8m0fnu [ceil(N/128), ceil(K/128)]) -> fp32 [N, K], exact. Spec/v4.md 6.3."""
    return e4m3_values(w) * expand_tiles(scale, w.shape[0], w.shape[1])


def dequantize_fp4(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(int8 [N, K/2], float8_e8m0fnu [N, K/32]) -> fp32 [N, K], exact. Source: spec/v4.md 6.3."""
    return unpack_e2m1(packed) * scale_values(scale).repeat_interleave(FP4_BLOCK, -1)


def expand_tiles(scale: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """fp32 [n, k] scale of every element, from one E8M0 scale per 128x128 tile."""
    rows = scale_values(scale).repeat_interleave(FP8_TILE, 0)[:n]
    return rows.repeat_interleave(FP8_TILE, 1)[:, :k]


Inputs = Iterator[tuple[str, torch.Tensor, int]]


def _inputs(draw: Draw, dtype: torch.dtype, block: int, largest: float, midpoints: torch.Tensor) -> Inputs:
    """Named inputs [..., K] with K even, and their block size; midpoints: ties of the value format."""
    for rows, k in ((0, block), (1, 2), (3, 6), (5, 5 * block // 2), (2, 4 * block)):
        yield f"{rows}x{k}", draw.spread(rows, k, dtype=dtype), block
    yield "other block", draw.spread(3, 4, block + 6, dtype=dtype), block // 2
    yield "strided rows and channels", draw.spread(2 * block, 6, dtype=dtype).T[::2], block
    tiny = torch.tensor([0.0, 1e-40, 1e-38, 1e-7, 1e-6, 1e-5, 9.9e-5, 1e-4])
    yield "zero and tiny blocks", draw.uniform(8, block, low=-1).mul(tiny.unsqueeze(-1)).to(dtype), block
    amax = (largest * torch.exp2(torch.arange(-20.0, 21.0))).to(dtype)
    amax = torch.stack([amax, torch.nextafter(amax, 2 * amax), -torch.nextafter(amax, 0 * amax)], -1)
    near = draw.uniform(41, 2 * block, 3, low=-1).to(dtype) * amax.unsqueeze(1)
    near[:, 1], near[:, block] = amax, -amax
    yield "largest * 2^k and one ulp off", near.transpose(1, 2), block
    ties = torch.cat([torch.tensor([largest, -largest]), midpoints, -midpoints])
    yield "ties", (ties * torch.tensor([[2.0**-10], [1.0], [32.0]])).to(dtype), len(ties)
    special = draw.normal(4, 2 * block, dtype=dtype)
    special[0, 3], special[1, block], special[2, 5], special[3] = torch.nan, torch.inf, -torch.inf, -0.0
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


@act_quant.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in _DTYPES.items():
        for name, x, block in _fp8_inputs(draw, dtype):
            yield Case(name, profile, (x, block))
    yield Case("every bf16", "official", (_every_bf16(), 128))


@act_qdq.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in _DTYPES.items():
        for name, x, block in _fp8_inputs(draw, dtype):
            yield Case(name, profile, (x, block, x.shape[-1]))
        for channels in (0, 1, 448):
            yield Case(f"{channels} of 512", profile, (draw.spread(5, 512, dtype=dtype), 64, channels))
    yield Case("every bf16", "official", (_every_bf16(), 64, 128))


@fp4_quant.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in _DTYPES.items():
        for name, x, block in _fp4_inputs(draw, dtype):
            yield Case(name, profile, (x, block))
    yield Case("every bf16", "official", (_every_bf16(), 32))


@fp4_qdq.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in _DTYPES.items():
        for name, x, block in _fp4_inputs(draw, dtype):
            yield Case(name, profile, (x, block))
        yield Case("odd", profile, (draw.spread(3, 33, dtype=dtype), 32))
    yield Case("every bf16", "official", (_every_bf16(), 32))


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
        "floor of the other format": lambda b: block_scale(b, largest, FP4_FLOOR if floor == ACT_FLOOR else ACT_FLOOR),
        "one scale per token": lambda b: block_scale(b.flatten(-2), largest, floor).unsqueeze(-1).expand(b.shape[:-1]),
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
    "int4 levels": lambda x: x.nan_to_num(0.0).abs().round().to(torch.uint8) + x.signbit().to(torch.uint8) * 8,
    "sign of zero lost": lambda x: torch.where(round_e2m1(x) == 8, 0, round_e2m1(x)),
}


def _add_rule_faults(op: Operator, variant: Reference, scale_faults: dict[str, Rule], faults: dict[str, Rule]) -> None:
    for name, rule in scale_faults.items():
        op.fault(name)(partial(variant, scale_of=rule))
    for name, rule in faults.items():
        op.fault(name)(partial(variant, round_to=rule))


_add_rule_faults(act_quant, _fp8_quant, _scale_faults(E4M3_MAX, ACT_FLOOR), _E4M3_FAULTS)
_add_rule_faults(act_qdq, _fp8_qdq, _scale_faults(E4M3_MAX, ACT_FLOOR), _E4M3_FAULTS)
_add_rule_faults(fp4_quant, _fp4_quant, _scale_faults(E2M1_MAX, FP4_FLOOR), _E2M1_FAULTS)
_add_rule_faults(fp4_qdq, _fp4_qdq, _scale_faults(E2M1_MAX, FP4_FLOOR), _E2M1_FAULTS)
for _op in (act_quant, act_qdq, fp4_quant, fp4_qdq):
    add_output_faults(_op, "last token zero", "stale tail of channels", "tokens shifted by one")


@act_qdq.fault("all channels quantised")
def _(x: torch.Tensor, block_size: int, channels: int) -> torch.Tensor:
    return _fp8_qdq(x, block_size, x.shape[-1])


@act_qdq.fault("last channels quantised")
def _(x: torch.Tensor, block_size: int, channels: int) -> torch.Tensor:
    return _fp8_qdq(x.flip(-1), block_size, channels).flip(-1)


@fp4_quant.fault("nibbles swapped")
def _(x: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    packed, scale = _fp4_quant(x, block_size)
    return (packed << 4 | packed >> 4 & 15), scale
