"""Proof of the heads' projection in MX formats (spec/deployments.md 3): cases, oracle, faults."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from dsv4_backend.contract import Case, Draw
from dsv4_backend.faults import on_bytes
from dsv4_backend.ops.mx import quantize_weight_mxfp8
from dsv4_backend.ops.mx_projection import mx_output_projection
from dsv4_backend.ops.quant import act_quant
from dsv4_backend.proofs.bounds import NO_ROWS_OF_NOTHING
from dsv4_backend.proofs.by_expert import explain_experts
from dsv4_backend.proofs.mx import PROFILE, SCALE_EDITS, sum_of_blocks
from dsv4_backend.proofs.numerics import (
    Array,
    quantise_fp8,
)
from dsv4_backend.proofs.quant import ACT_QUANT_EQUIVALENTS
from dsv4_backend.proofs.rounding_rows import NO_257TH_CODE, WHOLE, whole, whole_fp8


@mx_output_projection.oracle
def _(o: Array, weight: Array, scale: Array) -> Array:
    """Group after group."""
    heads = o.reshape(len(o), len(weight), weight.shape[2])
    parts = []
    for g, (matrix, of_matrix) in enumerate(zip(weight, scale, strict=True)):
        codes, of_codes = quantise_fp8(heads[:, g], 32)
        parts.append(sum_of_blocks(codes, of_codes, matrix, of_matrix))
    return np.concatenate(parts, 1)


def _groups(draw: Draw, groups: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = quantize_weight_mxfp8(draw.normal(groups * n, k) * k**-0.5)
    return codes.unflatten(0, (groups, n)), scales.unflatten(0, (groups, n))


def _heads(draw: Draw, t: int, h: int, d: int) -> torch.Tensor:
    """bf16 [t, h, d] of another size in every 16 channels; the largest are 448 times a power."""
    powers = torch.exp2(draw.integers(t, h, -(-d // 16), low=-6, high=4).float())
    sizes = powers.repeat_interleave(16, -1)[..., :d]
    values = draw.normal(t, h, d).clamp(-2, 2) * sizes
    values[..., ::16] = 7 * sizes[..., ::16]
    return values.bfloat16()


def _outweighed(
    draw: Draw, t: int, h: int, d: int, groups: int, n: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first channel of 32 is so large that the others have few bits, and its weight is 0."""
    o = draw.normal(t, h, d)
    o[..., ::32] = -(7 * 2.0**14)
    o[:, 0, 0] *= 2.0**4
    codes, scales = _groups(draw, groups, n, h * d // groups)
    codes = on_bytes(lambda b: b.masked_fill(torch.arange(b.shape[-1]) % 32 == 0, 0))(codes)
    return o.bfloat16(), codes, scales


@mx_output_projection.cases
def _(draw: Draw) -> Iterator[Case]:
    for t, h, d, g, n in (
        (0, 2, 64, 2, 8),
        (1, 1, 1, 1, 1),
        (3, 4, 64, 2, 16),
        (5, 4, 64, 4, 24),
        (2, 6, 20, 3, 7),
        (4, 8, 128, 2, 32),
    ):
        o = _heads(draw, t, h, d)
        weight = _groups(draw, g, n, h * d // g)
        yield Case(f"{t} tokens, {h} heads of {d}, {g} groups to {n}", PROFILE, (o, *weight))
    o = _heads(draw, 8, 4, 128)[::2, :, ::2]
    codes, scales = _groups(draw, 2, 16, 128)
    yield Case("strided", PROFILE, (o, codes.mT.contiguous().mT, scales))
    yield Case("large channels without a weight", PROFILE, _outweighed(draw, 3, 4, 64, 2, 16))
    small, below = _heads(draw, 3, 4, 64) * 2.0**-30, on_bytes(lambda b: b + 30)
    codes, scales = _groups(draw, 2, 16, 128)
    yield Case("rows below the floor", PROFILE, (small, codes, below(scales)))
    special = o.clone()
    special[1, 2, 3], special[2], special[3, 1, 5] = torch.nan, 0.0, torch.inf
    yield Case("NaN, infinity, a row of zeros", PROFILE, (special, codes, scales))
    arguments = (whole(draw, 3, 4, 64), *whole_fp8(draw, 2, 16, 128))
    yield Case(WHOLE, PROFILE, arguments, decided=True)


mx_output_projection.wrong_arguments(
    {
        **{f"weight scales {name}": {"scale": edit} for name, edit in SCALE_EDITS.items()},
        "groups of the next heads": {"o": lambda o: o.roll(1, 1)},
        "weights of the first group for all": {
            "weight": lambda w: w[:1].expand_as(w),
            "scale": lambda s: s[:1].expand_as(s),
        },
        "heads interleaved over groups": lambda a: a._replace(
            o=a.o.unflatten(1, (-1, a.weight.shape[0])).transpose(1, 2).flatten(1, 2)
            if a.o.shape[1] % a.weight.shape[0] == 0
            else a.o
        ),
    }
)
mx_output_projection.wrong_steps(
    {
        "heads in one scale per 128 channels": {
            act_quant.reference: lambda x, _: (
                (codes := act_quant.reference(x, 128))[0],
                _repeated(codes[1], x.shape[-1]),
            )
        }
    }
)


def _repeated(scale: torch.Tensor, channels: int) -> torch.Tensor:
    """Scales per 128 channels as scales per 32."""
    four = scale.view(torch.uint8).repeat_interleave(4, -1)
    return four[..., : -(-channels // 32)].contiguous().view(scale.dtype)


explain_experts(mx_output_projection)
_NO_NUMBERS = "codes of a block without numbers are NaN, whatever its scale"
mx_output_projection.equivalent(*NO_257TH_CODE)
mx_output_projection.explain(
    ACT_QUANT_EQUIVALENTS,
    NO_ROWS_OF_NOTHING,
    dict.fromkeys(
        (
            "scale_bytes: 255 -> 256 (2)",
            "scale_bytes: rounded_up.clamp(max=255) -> rounded_up",
        ),
        _NO_NUMBERS,
    ),
    {"by_expert: 0 -> 1": "without rows any expert gives the width alone"},
)
mx_output_projection.explain(
    dict.fromkeys(
        (
            "compute: x.dtype == torch.float64 -> x.dtype != torch.float64",
            "compute: x.float() -> x",
        ),
        "quotients of bf16 and a power of two are exact in bf16 too, or far below e4m3",
    )
)
