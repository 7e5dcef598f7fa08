"""Quantising operators (see fused_check.py): every result is compared bit by bit."""

import numpy as np
import torch
import torch_npu
from fused_check import A5, Steps, array, bf16, check, f32, refused, reseed, same
from fused_formats import LARGEST, LARGEST_EXPONENT, encode, pack

reseed(__name__)
KINDS = {
    "e4m3": torch_npu.float8_e4m3fn,
    "e5m2": torch_npu.float8_e5m2,
    "e2m1": torch_npu.float4_e2m1fn_x2,
}


def half(*shape):
    return f32(*shape).half()


def wide(x):
    return np.float32(array(x)) if x is not None else None


# ---- dynamic_quant and dynamic_quant_asymmetric


def owners(ends, rows):
    return np.minimum(np.searchsorted(ends, rows, "right"), len(ends) - 1)


QUANTISE = Steps(
    smooths=True,
    owners=owners,
    axis={"pertoken": -1, "perchannel": -2, "pertensor": None}.get,
    more=0,  # than the largest value
    peak=np.abs,
    steps=lambda top, kind: np.float32(2 * top + (kind in ("int8", "int4"))),
    symmetric_scale=same,
    offset=np.add,
    round=np.rint,
    float_mode="rint",
    swapped=False,
)


def smoothed(x, smooth, groups, mode, steps):
    if groups is None:
        return x * (smooth[:, None] if mode == "perchannel" else smooth)
    rows = steps.owners(array(groups), np.arange(x.size // x.shape[-1]))
    return (x.reshape(-1, x.shape[-1]) * smooth[rows]).reshape(x.shape)


def quantise(case, steps):
    x, smooth, groups, mode, kind, symmetric = wide(case[0]), wide(case[1]), case[2], *case[3:]
    if smooth is not None and steps.smooths:
        x = smoothed(x, smooth, groups, mode, steps)
    axis = steps.axis(mode)
    keep = {} if axis is None else {"axis": axis, "keepdims": True}
    top = np.float32({"int8": 127, "int4": 7, **LARGEST}[kind] + steps.more)
    high, low = x.max(**keep), x.min(**keep)
    peak = steps.peak(x).max(**keep)
    scale = (
        peak / top if steps.symmetric_scale(symmetric) else (high - low) / steps.steps(top, kind)
    )
    with np.errstate(all="ignore"):
        quotient = np.where(scale == 0, np.float32(0), x / scale)
        offset = top - np.where(scale == 0, np.float32(0), high / scale)
    if not symmetric:
        quotient = steps.offset(quotient, offset)
    if kind in ("e4m3", "e5m2"):
        y = encode(quotient, kind, steps.float_mode)
    else:
        y = np.clip(steps.round(quotient), -top - 1, top)
        if kind == "int4":
            y = pack(y, steps.swapped).astype(float)
    shape = [1] if axis is None else np.delete(x.shape, axis)
    return [y, *(np.reshape(v, shape) for v in ((scale,) if symmetric else (scale, offset)))]


def call_quantise(x, smooth, groups, mode, kind, symmetric):
    call = torch_npu.npu_dynamic_quant if symmetric else torch_npu.npu_dynamic_quant_asymmetric
    dtype = {"int8": torch.int8, "int4": torch.quint4x2}.get(kind, KINDS.get(kind))
    given = {} if mode == "pertoken" else {"quant_mode": mode}
    y, *rest = call(x, smooth_scales=smooth, group_index=groups, dst_type=dtype, **given)
    return [y if kind == "int8" else y.view(torch.uint8), *rest]


def ends(*values):
    return torch.tensor(values, dtype=torch.int32)


zero_row = half(4, 24)
zero_row[1] = 0
tied = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3]]).bfloat16()
quantise_cases = [
    (x, smooth, groups, "pertoken", kind, symmetric)
    for kind in ("int8", "int4")
    for symmetric in (True, False)
    for x, smooth, groups in (
        (bf16(3, 8), None, None),
        (zero_row, half(24), None),
        (bf16(2, 3, 16), bf16(4, 16), ends(1, 1, 4, 6)),
        (half(2, 2, 1, 3, 8), half(8), None),
        (tied, None, None),
    )
]
quantise_cases += [
    (bf16(5, 7), bf16(7), None, "pertoken", "int8", True),
    (bf16(16, 7168), None, None, "pertoken", "int8", True),
    (bf16(0, 16), None, None, "pertoken", "int8", True),
    (bf16(6, 5).t(), None, None, "pertoken", "int8", True),
]
if A5:
    quantise_cases += [
        (x, smooth, None, mode, kind, symmetric)
        for mode, x, smooth in (
            ("pertoken", bf16(9, 40), bf16(40)),
            ("pertensor", half(5, 3, 8), half(8)),
            ("perchannel", bf16(2, 6, 8), bf16(6)),
            ("perchannel", half(7, 16), None),
        )
        for kind in ("e4m3", "e5m2", "int8", "int4")
        for symmetric in (True, False)
    ]
quantise_faults = {
    "no smooth scales": dict(smooths=False),
    "first row to the group before": dict(
        owners=lambda ends, rows: np.minimum(np.searchsorted(ends, rows, "left"), len(ends) - 1)
    ),
    "scales of group 0": dict(owners=lambda ends, rows: rows * 0),
    "one more than the maximum": dict(more=1),
    "peak without sign": dict(peak=same),
    "254 steps": dict(steps=lambda top, kind: np.float32(2 * top)),
    "symmetric scale": dict(symmetric_scale=lambda symmetric: True),
    "no offset": dict(offset=same),
    "truncated": dict(round=np.trunc, float_mode="trunc"),
    "ties away from zero": dict(round=lambda q: np.sign(q) * np.floor(np.abs(q) + 0.5)),
    "nibbles swapped": dict(swapped=True),
}
if A5:
    quantise_faults |= {"always by token": dict(axis=lambda mode: -1)}
check("dynamic_quant", call_quantise, quantise, QUANTISE, quantise_cases, quantise_faults, 1e-6)


def refuse_quantise(argument, x, smooth=None, groups=None, mode="pertoken", kind="int8"):
    given = [a.npu() if a is not None else None for a in (x, smooth, groups)]
    refused("dynamic_quant", lambda: call_quantise(*given, mode, kind, True), argument)


refuse_quantise("x", f32(3, 8))
refuse_quantise("smooth_scales", bf16(3, 8), half(8))
refuse_quantise("smooth_scales", bf16(3, 8), bf16(7))
refuse_quantise("smooth_scales", bf16(3, 8), bf16(2, 8))
refuse_quantise(
    "smooth_scales", bf16(1030, 8), bf16(1025, 8), torch.arange(1025, dtype=torch.int32)
)
refuse_quantise("smooth_scales", bf16(3, 8), None, ends(3))
refuse_quantise("group_index", bf16(3, 8), bf16(2, 8), torch.tensor([1, 3]))
refuse_quantise("group_index", bf16(3, 8), bf16(2, 8), ends(3))
refuse_quantise("group_index", bf16(1, 8), bf16(2, 8), ends(0, 1))
refuse_quantise("x", bf16(*[1] * 8, 8))
if A5:
    refuse_quantise("group_index", bf16(3, 8), bf16(2, 8), ends(1, 3), "pertensor")
    refuse_quantise("quant_mode", bf16(3, 8), mode="perrow")
    refused(
        "dynamic_quant",
        lambda: torch_npu.npu_dynamic_quant(bf16(3, 8).npu(), dst_type_max=4e4),
        "dst_type_max",
    )
else:
    refuse_quantise("'y'", bf16(3, 8), kind="e4m3")
    refuse_quantise("does not exist", bf16(3, 8), mode="pertensor")


# ---- dynamic_mx_quant


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


# ---- trans_quant_param


def to_nearest(cut, low):
    return cut + 0x2000 * ((low > 0x1000) | (low == 0x1000) & (cut >> 13 & 1 == 1))


PARAMETER = Steps(
    rounded=to_nearest,
    kept=lambda cut, bits: cut,
    mark=1 << 46,
    offset=np.bitwise_or,
    limits=(-256, 255),
    whole=np.rint,
    nine_bits=lambda shift: shift & 0x1FF,
    place=37,
)


def parameter(case, steps):
    scale, offset, mode = array(case[0]).astype(np.float32), case[1], case[2]
    bits = scale.view(np.uint32).astype(np.int64)
    low = bits & 0x1FFF
    cut = bits - low
    result = steps.kept(steps.rounded(cut, low) if mode == 1 else cut, bits) | steps.mark
    if offset is not None:
        shift = np.clip(steps.whole(array(offset)), *steps.limits).astype(np.int64)
        result = steps.offset(result, steps.nine_bits(shift) << steps.place)
    return [result]


offsets = torch.tensor([-300.0, -0.5, 1.5, 300.0, -200.4])
halfway = torch.tensor([0x3F801000, 0x3F803000, 0x3F802FFF, 0x3F801001], dtype=torch.int32).view(
    torch.float32
)
check(
    "trans_quant_param",
    lambda s, o, m: [torch_npu.npu_trans_quant_param(s, o, m)],
    parameter,
    PARAMETER,
    [
        (f32(5), None, 0),
        (f32(5), offsets, 0),
        (halfway, None, 1),
        (f32(1, 9), f32(1, 9), 1),
        (f32(1), offsets, 0),
    ],
    {
        "always cut": dict(rounded=same),
        "ties up": dict(rounded=lambda cut, low: cut + 0x2000 * (low >= 0x1000)),
        "all bits": dict(kept=lambda cut, bits: bits),
        "no mark": dict(mark=0),
        "mark at 45": dict(mark=1 << 45),
        "no offset": dict(offset=same),
        "8 bits": dict(limits=(-128, 127)),
        "offset truncated": dict(whole=np.trunc),
        "sign spreads": dict(nine_bits=same),
        "offset at 36": dict(place=36),
    },
    0,
)


def refuse_parameter(argument, scale, offset=None):
    given = [a.npu() if a is not None else None for a in (scale, offset)]
    refused("trans_quant_param", lambda: torch_npu.npu_trans_quant_param(*given), argument)


refuse_parameter("scale", bf16(4))
refuse_parameter("scale", f32(1, 1, 4))
refuse_parameter("offset", f32(4), bf16(4))
refuse_parameter("offset", f32(4), f32(3))
refuse_parameter("offset", f32(1, 4), f32(4))
