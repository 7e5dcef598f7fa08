"""Quantising operators (see fused_check.py): every result is compared bit by bit."""

import numpy as np
import torch
import torch_npu
from fused_check import A5, array, bf16, check, f32, refused
from fused_formats import LARGEST, LARGEST_EXPONENT, encode, pack, reseed

reseed()
KINDS = {"e4m3": torch_npu.float8_e4m3fn, "e5m2": torch_npu.float8_e5m2, "e2m1": torch_npu.float4_e2m1fn_x2}


def half(*shape):
    return f32(*shape).half()


def wide(x):
    return np.float32(array(x)) if x is not None else None


# ---- dynamic_quant and dynamic_quant_asymmetric


def quantise(case, fault):
    x, smooth, groups, mode, kind, symmetric = wide(case[0]), wide(case[1]), case[2], *case[3:]
    top = {"int8": 127, "int4": 7, **LARGEST}[kind]
    if smooth is not None and fault != "no smooth scales":
        if groups is not None:
            ends = array(groups)
            rows = np.arange(x.size // x.shape[-1])
            owner = np.searchsorted(ends, rows, "left" if fault == "first row to the group before" else "right")
            owner = owner * 0 if fault == "scales of group 0" else np.minimum(owner, len(ends) - 1)
            x = (x.reshape(-1, x.shape[-1]) * smooth[owner]).reshape(x.shape)
        else:
            x = x * (smooth[:, None] if mode == "perchannel" else smooth)
    axis = {"pertoken": -1, "perchannel": -2, "pertensor": None}[mode]
    if fault == "always by token":
        axis = -1
    keep = {} if axis is None else {"axis": axis, "keepdims": True}
    top = np.float32(top + (fault == "one more than the maximum"))
    high, low = x.max(**keep), x.min(**keep)
    peak = high if fault == "peak without sign" else np.abs(x).max(**keep)
    steps = np.float32(2 * top + (kind in ("int8", "int4") and fault != "254 steps"))
    scale = peak / top if symmetric or fault == "symmetric scale" else (high - low) / steps
    with np.errstate(all="ignore"):
        quotient = np.where(scale == 0, np.float32(0), x / scale)
        offset = top - np.where(scale == 0, np.float32(0), high / scale)
    if not symmetric and fault != "no offset":
        quotient = quotient + offset
    if kind in ("e4m3", "e5m2"):
        y = encode(quotient, kind, "trunc" if fault == "truncated" else "rint")
    else:
        rounded = np.trunc(quotient) if fault == "truncated" else np.rint(quotient)
        if fault == "ties away from zero":
            rounded = np.sign(quotient) * np.floor(np.abs(quotient) + 0.5)
        y = np.clip(rounded, -top - 1, top)
        if kind == "int4":
            y = pack(y, fault == "nibbles swapped").astype(float)
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
quantise_faults = [
    "no smooth scales",
    "first row to the group before",
    "scales of group 0",
    "one more than the maximum",
    "peak without sign",
    "254 steps",
    "symmetric scale",
    "no offset",
    "truncated",
    "ties away from zero",
    "nibbles swapped",
    *(["always by token"] if A5 else []),
]
check("dynamic_quant", call_quantise, quantise, quantise_cases, quantise_faults, 1e-6)


def refuse_quantise(argument, x, smooth=None, groups=None, mode="pertoken", kind="int8"):
    given = [a.npu() if a is not None else None for a in (x, smooth, groups)]
    refused("dynamic_quant", lambda: call_quantise(*given, mode, kind, True), argument)


refuse_quantise("x", f32(3, 8))
refuse_quantise("smooth_scales", bf16(3, 8), half(8))
refuse_quantise("smooth_scales", bf16(3, 8), bf16(7))
refuse_quantise("smooth_scales", bf16(3, 8), bf16(2, 8))
refuse_quantise("smooth_scales", bf16(1030, 8), bf16(1025, 8), torch.arange(1025, dtype=torch.int32))
refuse_quantise("smooth_scales", bf16(3, 8), None, ends(3))
refuse_quantise("group_index", bf16(3, 8), bf16(2, 8), torch.tensor([1, 3]))
refuse_quantise("group_index", bf16(3, 8), bf16(2, 8), ends(3))
refuse_quantise("group_index", bf16(1, 8), bf16(2, 8), ends(0, 1))
refuse_quantise("x", bf16(*[1] * 8, 8))
if A5:
    refuse_quantise("group_index", bf16(3, 8), bf16(2, 8), ends(1, 3), "pertensor")
    refuse_quantise("quant_mode", bf16(3, 8), mode="perrow")
    refused("dynamic_quant", lambda: torch_npu.npu_dynamic_quant(bf16(3, 8).npu(), dst_type_max=4e4), "dst_type_max")
else:
    refuse_quantise("'y'", bf16(3, 8), kind="e4m3")
    refuse_quantise("does not exist", bf16(3, 8), mode="pertensor")


# ---- dynamic_mx_quant


def blocks_of(x, axis, block):
    x = np.moveaxis(x, axis, -1)
    count = -(-x.shape[-1] // block)
    x = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count * block - x.shape[-1])])
    return x.reshape(*x.shape[:-1], count, block)


def shared_exponent(peak, kind, algorithm, dst_max, fault):
    emax = LARGEST_EXPONENT[kind]
    if fault == "exponent of the other FLOAT8" and kind != "e2m1":
        emax = 23 - emax
    with np.errstate(divide="ignore", invalid="ignore"):
        logarithm = np.log2(peak)
        exponent = np.floor(logarithm) - emax
        if fault == "exponent rounded up":
            exponent = np.ceil(logarithm) - emax
        if algorithm == 2 and dst_max in (0, 6, 7):
            limit = 1.5 if dst_max != 7 or fault == "7 as 6" else 1.75
            exponent += peak > limit * 2.0 ** np.floor(logarithm)
        elif algorithm:
            maximum = dst_max if algorithm == 2 and fault != "maximum ignored" else LARGEST[kind]
            exponent = np.ceil(np.log2(np.float64(np.float32(peak) / np.float32(maximum))))
        if fault == "always algorithm 0":
            exponent = np.floor(logarithm) - emax
    exponent = np.where(peak == 0, -127, np.maximum(exponent, -127))
    return np.where(np.isfinite(peak), exponent, -127 if fault == "NaN block as zero" else np.nan)


def mx(case, fault):
    x, axis, mode, kind, block, algorithm, dst_max, low = array(case[0]), *case[1:]
    axis = x.ndim - 1 if fault == "always the last axis" else axis % x.ndim
    if fault == "blocks of 32":
        block = 32
    parts = blocks_of(x, axis, block)
    peak = np.abs(parts).max(-1) if parts.size else parts.sum(-1)
    if algorithm == 1 and fault != "low bound ignored":
        peak = np.maximum(peak, low)
    exponent = shared_exponent(peak, kind, algorithm, dst_max, fault)
    scaled = parts * 2.0 ** -exponent[..., None]
    scaled = scaled.reshape(*parts.shape[:-2], parts.shape[-2] * block)[..., : x.shape[axis]]
    with np.errstate(invalid="ignore"):
        rounding = "trunc" if fault == "truncated" else "rint" if fault == "round mode ignored" else mode
        y = encode(np.moveaxis(scaled, -1, axis), kind, "round" if fault == "ties away" else rounding, fault)
    scale = np.where(np.isnan(exponent), 255, exponent + 127).astype(np.uint8)
    if scale.shape[-1] % 2:
        scale = np.pad(scale, [(0, 0)] * (scale.ndim - 1) + [(0, 1)], constant_values=127 * (fault == "padded with 1"))
    if fault == "pairs not interleaved" and axis != x.ndim - 1:
        scale = np.moveaxis(scale, -1, axis)
        scale = scale.reshape(*scale.shape[:axis], scale.shape[axis] // 2, *scale.shape[axis + 1 :], 2)
    else:
        scale = np.moveaxis(scale.reshape(*scale.shape[:-1], scale.shape[-1] // 2, 2), -2, axis)
    if kind == "e2m1":
        y = pack(y, fault == "nibbles swapped")
    return [y.astype(float), scale.astype(float)]


def call_mx(x, axis, mode, kind, block, algorithm, dst_max, low):
    options = dict(round_mode=mode, block_size=block, scale_alg=algorithm, dst_type_max=dst_max, max_low_bound=low)
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
mx_faults = [
    "exponent of the other FLOAT8",
    "exponent rounded up",
    "7 as 6",
    "maximum ignored",
    "always algorithm 0",
    "NaN block as zero",
    "always the last axis",
    "blocks of 32",
    "low bound ignored",
    "truncated",
    "round mode ignored",
    "ties away",
    "overflow is NaN",
    "padded with 1",
    "pairs not interleaved",
    "nibbles swapped",
]


def refuse_mx(argument, x, axis=-1, mode="rint", kind="e4m3", block=32, algorithm=0, dst_max=0.0, low=0.0):
    x = x.npu()
    refused("dynamic_mx_quant", lambda: call_mx(x, axis, mode, kind, block, algorithm, dst_max, low), argument)


if A5:
    check("dynamic_mx_quant", call_mx, mx, mx_cases, mx_faults, 0)
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
        lambda: torch_npu.npu_dynamic_mx_quant(bf16(2, 64).npu(), dst_type=torch_npu.float4_e1m2fn_x2),
        "not emulated",
    )
else:
    refuse_mx("does not exist", bf16(2, 64))


# ---- trans_quant_param


def parameter(case, fault):
    scale, offset, mode = array(case[0]).astype(np.float32), case[1], case[2]
    bits = scale.view(np.uint32).astype(np.int64)
    low = bits & 0x1FFF
    cut = bits - low
    if mode == 1 and fault != "always cut":
        odd = cut >> 13 & 1 if fault != "ties up" else 1
        cut = cut + 0x2000 * ((low > 0x1000) | (low == 0x1000) & (odd == 1))
    result = (bits if fault == "all bits" else cut) | (
        0 if fault == "no mark" else 1 << (45 if fault == "mark at 45" else 46)
    )
    if offset is not None and fault != "no offset":
        limits = (-128, 127) if fault == "8 bits" else (-256, 255)
        rounding = np.trunc if fault == "offset truncated" else np.rint
        shift = np.clip(rounding(array(offset)), *limits).astype(np.int64)
        result = result | (
            (shift if fault == "sign spreads" else shift & 0x1FF) << (36 if fault == "offset at 36" else 37)
        )
    return [result]


offsets = torch.tensor([-300.0, -0.5, 1.5, 300.0, -200.4])
halfway = torch.tensor([0x3F801000, 0x3F803000, 0x3F802FFF, 0x3F801001], dtype=torch.int32).view(torch.float32)
check(
    "trans_quant_param",
    lambda s, o, m: [torch_npu.npu_trans_quant_param(s, o, m)],
    parameter,
    [(f32(5), None, 0), (f32(5), offsets, 0), (halfway, None, 1), (f32(1, 9), f32(1, 9), 1), (f32(1), offsets, 0)],
    [
        "always cut",
        "ties up",
        "all bits",
        "no mark",
        "mark at 45",
        "no offset",
        "8 bits",
        "offset truncated",
        "sign spreads",
        "offset at 36",
    ],
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
