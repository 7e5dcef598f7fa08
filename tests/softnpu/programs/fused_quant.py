"""dynamic_quant and trans_quant_param (see fused_check.py): every result is compared bit by bit."""

import numpy as np
import torch
import torch_npu
from fused_check import A5, Steps, array, bf16, check, f32, refused, reseed, same
from fused_formats import LARGEST, encode, pack

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
