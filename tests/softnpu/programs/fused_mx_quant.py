"""dynamic_mx_quant (see fused_check.py): every result is compared bit by bit."""

import numpy as np
import torch
import torch_npu
from fused_check import A5, Steps, array, bf16, check, f32, refused, reseed, same
from fused_formats import LARGEST, LARGEST_EXPONENT, encode, pack
from fused_quant import KINDS, half

reseed(__name__)


def blocks_of(x, axis, block):
    x = np.moveaxis(x, axis, -1)
    count = -(-x.shape[-1] // block)
    x = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count * block - x.shape[-1])])
    return x.reshape(*x.shape[:-1], count, block)


MX = Steps(
    axis=same,
    block=same,
    bounded=np.maximum,
    emax=lambda kind: LARGEST_EXPONENT[kind],
    whole=np.floor,
    algorithm=same,
    limit=lambda dst_max: 1.5 if dst_max != 7 else 1.75,
    maximum=lambda kind, algorithm, dst_max: dst_max if algorithm == 2 else LARGEST[kind],
    not_finite=np.nan,
    mode=same,
    overflow="largest",
    padding=0,
    interleaved=lambda scale, axis: np.moveaxis(
        scale.reshape(*scale.shape[:-1], scale.shape[-1] // 2, 2), -2, axis
    ),
    swapped=False,
)


def shared_exponent(peak, kind, algorithm, dst_max, steps):
    with np.errstate(divide="ignore", invalid="ignore"):
        logarithm = np.log2(peak)
        exponent = steps.whole(logarithm) - steps.emax(kind)
        if algorithm == 2 and dst_max in (0, 6, 7):
            exponent += peak > steps.limit(dst_max) * 2.0 ** np.floor(logarithm)
        elif algorithm:
            maximum = steps.maximum(kind, algorithm, dst_max)
            exponent = np.ceil(np.log2(np.float64(np.float32(peak) / np.float32(maximum))))
    exponent = np.where(peak == 0, -127, np.maximum(exponent, -127))
    return np.where(np.isfinite(peak), exponent, steps.not_finite)


def mx(case, steps):
    x, axis, mode, kind, block, algorithm, dst_max, low = array(case[0]), *case[1:]
    axis, block = steps.axis(axis % x.ndim, x.ndim), steps.block(block)
    parts = blocks_of(x, axis, block)
    peak = np.abs(parts).max(-1) if parts.size else parts.sum(-1)
    if algorithm == 1:
        peak = steps.bounded(peak, low)
    exponent = shared_exponent(peak, kind, steps.algorithm(algorithm), dst_max, steps)
    scaled = parts * 2.0 ** -exponent[..., None]
    scaled = scaled.reshape(*parts.shape[:-2], parts.shape[-2] * block)[..., : x.shape[axis]]
    with np.errstate(invalid="ignore"):
        y = encode(np.moveaxis(scaled, -1, axis), kind, steps.mode(mode), steps.overflow)
    scale = np.where(np.isnan(exponent), 255, exponent + 127).astype(np.uint8)
    if scale.shape[-1] % 2:
        scale = np.pad(scale, [(0, 0)] * (scale.ndim - 1) + [(0, 1)], constant_values=steps.padding)
    scale = steps.interleaved(scale, axis)
    if kind == "e2m1":
        y = pack(y, steps.swapped)
    return [y.astype(float), scale.astype(float)]


def in_order(scale, axis):
    """Pairs of neighbours without a move: right along the last axis only."""
    if axis == scale.ndim - 1:
        return MX.interleaved(scale, axis)
    scale = np.moveaxis(scale, -1, axis)
    return scale.reshape(*scale.shape[:axis], scale.shape[axis] // 2, *scale.shape[axis + 1 :], 2)


def call_mx(x, axis, mode, kind, block, algorithm, dst_max, low):
    options = dict(
        round_mode=mode,
        block_size=block,
        scale_alg=algorithm,
        dst_type_max=dst_max,
        max_low_bound=low,
    )
    y, scale = torch_npu.npu_dynamic_mx_quant(x, axis=axis, dst_type=KINDS[kind], **options)
    return [y.view(torch.uint8), scale]


special = bf16(4, 128)
special[0, 5], special[1, 40], special[2], special[3, :32] = torch.inf, torch.nan, 0, 1e-38
uneven = f32(3, 70) * torch.tensor([1e-3, 1.0, 1e4])[:, None]
steps = torch.arange(-64, 64).reshape(1, 128) / 16  # every tie of FLOAT4 under a scale of one
mx_cases = [
    (x, axis, "rint", kind, block, algorithm, 0.0, 0.0)
    for kind in ("e4m3", "e5m2", "e2m1")
    for algorithm in (0, 2 if kind == "e2m1" else 1)
    for x, axis, block in (
        (bf16(5, 70), -1, 32),
        (uneven, -1, 32),
        (half(2, 96, 6), 1, 32),
        (special, -1, 32),
        (bf16(66, 4), 0, 32),
        (bf16(130), 0, 32),
    )
]
mx_cases += [
    (bf16(4, 7168), -1, "rint", "e4m3", 32, 1, 0.0, 0.0),
    (bf16(3, 200), -1, "rint", "e4m3", 64, 0, 0.0, 0.0),
    (bf16(3, 2050), -1, "rint", "e2m1", 1024, 0, 0.0, 0.0),
    (bf16(1, 2, 1, 3, 1, 2, 34), -1, "rint", "e5m2", 32, 1, 0.0, 0.0),
    (f32(3, 64, scale=1e-39), -1, "rint", "e4m3", 32, 1, 0.0, 0.0),
    (f32(3, 64), -1, "rint", "e4m3", 32, 1, 0.0, 2.5),
    (torch.zeros(2, 64), -1, "rint", "e5m2", 32, 1, 0.0, 0.5),
    (bf16(0, 64), -1, "rint", "e4m3", 32, 0, 0.0, 0.0),
    (torch.linspace(-1.6, 1.6, 64).bfloat16().repeat(2, 1), -1, "rint", "e2m1", 32, 2, 7.0, 0.0),
    *[(steps, -1, mode, "e2m1", 32, 0, 0.0, 0.0) for mode in ("rint", "floor", "round")],
    *[(half(9, 64), -1, "round", "e2m1", 32, 2, maximum, 0.0) for maximum in (6.0, 7.0, 9.5, 12.0)],
]
mx_faults = {
    "exponent of the other FLOAT8": dict(
        emax=lambda kind: {"e2m1": 2, "e4m3": 15, "e5m2": 8}[kind]
    ),
    "exponent rounded up": dict(whole=np.ceil),
    "7 as 6": dict(limit=lambda dst_max: 1.5),
    "maximum ignored": dict(maximum=lambda kind, algorithm, dst_max: LARGEST[kind]),
    "always algorithm 0": dict(algorithm=lambda algorithm: 0),
    "NaN block as zero": dict(not_finite=-127),
    "always the last axis": dict(axis=lambda axis, rank: rank - 1),
    "blocks of 32": dict(block=lambda block: 32),
    "low bound ignored": dict(bounded=same),
    "truncated": dict(mode=lambda mode: "trunc"),
    "round mode ignored": dict(mode=lambda mode: "rint"),
    "ties away": dict(mode=lambda mode: "round"),
    "overflow is NaN": dict(overflow="NaN"),
    "padded with 1": dict(padding=127),
    "pairs not interleaved": dict(interleaved=in_order),
    "nibbles swapped": dict(swapped=True),
}


def refuse_mx(
    argument, x, axis=-1, mode="rint", kind="e4m3", block=32, algorithm=0, dst_max=0.0, low=0.0
):
    x = x.npu()
    refused(
        "dynamic_mx_quant",
        lambda: call_mx(x, axis, mode, kind, block, algorithm, dst_max, low),
        argument,
    )


if A5:
    check("dynamic_mx_quant", call_mx, mx, MX, mx_cases, mx_faults, 0)
    refuse_mx("x", torch.zeros(2, 64, dtype=torch.int32))
    refuse_mx("x", bf16(*[1] * 7, 64))
    refuse_mx("x", f32(2, 31))
    refuse_mx("round_mode", bf16(2, 64), mode="floor")
    refuse_mx("round_mode", bf16(2, 64), mode="ceil", kind="e2m1")
    refuse_mx("block_size", f32(2, 64), block=64)
    refuse_mx("block_size", bf16(2, 64), kind="e2m1", algorithm=2, block=64)
    refuse_mx("scale_alg", bf16(2, 64), algorithm=2)
    refuse_mx("scale_alg", bf16(2, 64), kind="e2m1", algorithm=1)
    refuse_mx("dst_type_max", bf16(2, 64), dst_max=6.0)
    refuse_mx("dst_type_max", bf16(2, 64), kind="e2m1", algorithm=2, dst_max=13.0)
    refuse_mx("max_low_bound", bf16(2, 64), low=0.5)
    refuse_mx("max_low_bound", bf16(2, 64), algorithm=1, low=-0.5)
    refused(
        "dynamic_mx_quant",
        lambda: torch_npu.npu_dynamic_mx_quant(
            bf16(2, 64).npu(), dst_type=torch_npu.float4_e1m2fn_x2
        ),
        "not emulated",
    )
else:
    refuse_mx("does not exist", bf16(2, 64))
