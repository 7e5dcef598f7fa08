"""grouped_matmul: int4, float by integer, FP8 and MX forms (see fused_check.py)."""

import numpy as np
import torch
import torch_npu
from fused_check import A5, Steps, array, bf16, check, f32, refused, reseed, same
from grouped_data import COUNT_FAULTS, as_int32, fp8, i4, i8, low64, nz, pack4, positive, spans

reseed(__name__)
gmm = torch_npu.npu_grouped_matmul
E8M0 = torch_npu.float8_e8m0fnu
E2M1 = torch_npu.float4_e2m1fn_x2
half, brain = torch.float16, torch.bfloat16
SCALE_FAULTS = {  # of scales [groups, parts of K, N]
    "scale of expert 0": dict(scale=lambda scale: np.broadcast_to(scale[:1], scale.shape)),
    "scale shifted by a column": dict(scale=lambda scale: np.roll(scale, 1, -1)),
    "no scale": dict(scale=np.ones_like),
    "scales of K reversed": dict(scale=lambda scale: scale[:, ::-1]),
}
ROW_FAULTS = {
    "no per-token scale": dict(rows=np.ones_like),
    "rows' scale": dict(rows=lambda rows: np.roll(rows, 1, 0)),
}
BIAS_FAULTS = {
    "no bias": dict(bias=np.zeros_like),
    "first bias": dict(bias=lambda bias: bias[:1].repeat(len(bias), 0)),
}
OFFSET_FAULTS = {"no offset": dict(offset=np.zeros_like)}
STEPS = Steps(spans=spans, scale=same, rows=same, bias=same, offset=same)


def spread(scale, k):
    return np.repeat(scale, -(-k // scale.shape[0]), 0)[:k]


def mixed(case, steps):
    """Values of x and weight with scales [groups, parts of K, N] and [M, parts of K];
    bias behind or in front of rows'.
    """
    x, w, scale, rows, bias, offset = (np.asarray(c, dtype=float) for c in case["values"])
    scale, rows, bias, offset = (
        steps.scale(scale),
        steps.rows(rows),
        steps.bias(bias),
        steps.offset(offset),
    )
    k = x.shape[1]
    y = np.zeros((len(x), w.shape[2]))
    for expert, start, end in steps.spans(torch.tensor(case["counts"]), 1):
        if start >= end:
            continue
        each = x[start:end] * np.repeat(rows[start:end], -(-k // rows.shape[1]), 1)[:, :k]
        weight = (w[expert] + spread(offset[expert], k)) * spread(scale[expert], k)
        value = each @ weight + bias[expert]
        y[start:end] = value[: len(y[start:end])]
    return [y]


def family(name, cases, faults, call, tolerance=2e-2):
    check(
        name,
        lambda index: call(cases[index]),
        lambda index, steps: mixed(cases[index[0]], steps),
        STEPS,
        [(i,) for i in range(len(cases))],
        faults,
        tolerance,
    )


def values(x, w, scale, rows=None, bias=None, offset=None):
    scale = scale[:, None] if scale.ndim == 2 else scale
    rows = np.ones((len(x), 1)) if rows is None else rows[:, None] if rows.ndim == 1 else rows
    bias = np.zeros((len(w), w.shape[2])) if bias is None else bias
    return [x, w, scale, rows, bias, np.zeros_like(scale) if offset is None else offset[:, None]]


def send(case):
    counts = torch.tensor(case["counts"]).npu()
    arguments = {
        k: [v.npu()] if isinstance(v, torch.Tensor) else v for k, v in case["call"].items()
    }
    return gmm(**arguments, group_list=counts, split_item=2, group_type=0, group_list_type=1)


def int4_case(m, k, n, counts, parts, x4, weight_nz, out, rows=True, with_offset=False):
    e = len(counts)
    x = i4(m, k) if x4 else i8(m, k)
    w = i4(e, k, n)
    scale, row = positive(e, parts, n) / 8, positive(m) if rows else None
    call = {"scale": low64(scale if parts > 1 or not x4 else scale[:, 0]), "output_dtype": out}
    call["x"] = as_int32(x) if x4 else x
    call["weight"] = [nz(pack4(w).view(torch.int8)).view(torch.int32)] if weight_nz else as_int32(w)
    if rows:
        call["per_token_scale"] = row
    if not x4:  # made offline: 8 * weight * scale, summed along K
        call["bias"] = (
            (8 * w.double() * scale.double().repeat_interleave(k // parts, 1)).sum(1).float()
        )
    offset = i4(e, n).float() if with_offset else None
    if with_offset:
        call["offset"] = offset[:, None] * scale
    return {
        "counts": counts,
        "call": call,
        "values": values(
            *(array(t) for t in (x, w, scale)),
            rows=array(row) if rows else None,
            offset=array(offset) if with_offset else None,
        ),
    }


def antiquant_case(m, k, n, counts, parts, dtype, int4, with_offset, with_bias, transposed=False):
    e = len(counts)
    x, w = f32(m, k).to(dtype), i4(e, k, n) if int4 else i8(e, k, n)
    shape = (e, parts, n) if parts > 1 else (e, n)
    scale = positive(*shape, dtype=dtype)
    offset = i4(e, n).to(dtype) if with_offset else None
    bias = f32(e, n).to(dtype if dtype == half else torch.float32) if with_bias else None
    sent = as_int32(w) if int4 else w
    if transposed:
        sent = w.transpose(1, 2).contiguous()
        sent = (as_int32(sent) if int4 else sent).npu().transpose(1, 2)
    call = {
        "x": x,
        "weight": [sent.npu()],
        "antiquant_scale": scale,
        "bias": bias,
        "output_dtype": dtype,
    }
    if with_offset:
        call["antiquant_offset"] = offset
    return {
        "counts": counts,
        "call": call,
        "values": values(
            array(x),
            array(w),
            array(scale),
            bias=array(bias) if with_bias else None,
            offset=array(offset) if with_offset else None,
        ),
    }


MIXED_FAULTS = COUNT_FAULTS | SCALE_FAULTS
family(
    "grouped_matmul float by int8",
    [
        antiquant_case(7, 12, 6, (2, 0, 5), 1, half, False, True, True),
        antiquant_case(9, 33, 5, (4, 5), 1, brain, False, False, True),
        antiquant_case(40, 512, 64, (8, 30, 2), 1, brain, False, True, False, transposed=True),
    ],
    {name: replaced for name, replaced in MIXED_FAULTS.items() if name != "scales of K reversed"}
    | BIAS_FAULTS
    | OFFSET_FAULTS,
    send,
)
family(
    "grouped_matmul float by int4",
    [
        antiquant_case(7, 64, 16, (2, 0, 5), 2, half, True, False, True),
        antiquant_case(9, 40, 8, (4, 5), 1, brain, True, True, True),
        antiquant_case(20, 256, 64, (8, 10, 2), 4, brain, True, False, False),
        antiquant_case(6, 32, 8, (1, 5), 1, half, True, True, False, transposed=True),
    ],
    MIXED_FAULTS | BIAS_FAULTS | OFFSET_FAULTS,
    send,
)
if not A5:
    family(
        "grouped_matmul A8W4",
        [
            int4_case(9, 256, 8, (3, 0, 6), 1, False, False, half),
            int4_case(12, 512, 64, (5, 7), 2, False, False, brain),
            int4_case(9, 256, 8, (3, 6), 1, False, False, half, with_offset=True),
            int4_case(33, 2048, 128, (3, 0, 20, 10), 8, False, True, brain),
        ],
        MIXED_FAULTS | ROW_FAULTS | OFFSET_FAULTS,
        send,
    )
    family(
        "grouped_matmul A4W4",
        [
            int4_case(9, 40, 8, (3, 0, 6), 1, True, False, half),
            int4_case(12, 64, 64, (5, 7), 4, True, False, brain, rows=False),
            int4_case(33, 256, 128, (3, 0, 20, 10), 2, True, True, brain),
        ],
        MIXED_FAULTS | ROW_FAULTS,
        send,
    )

    def a8w4_with(**changes):
        case = int4_case(9, 256, 8, (3, 0, 6), 1, False, False, half)
        case["call"].update(changes)
        return lambda: send(case)

    def a4w4_with(k=40, n=8, **changes):
        case = int4_case(9, k, n, (3, 0, 6), 1, True, False, half)
        case["call"].update(changes)
        return lambda: send(case)

    for argument, call in [
        ("bias", a8w4_with(bias=None)),
        ("offset", a8w4_with(offset=f32(3, 8))),
        ("out", a8w4_with(offset=f32(3, 1, 8), output_dtype=torch.int32)),
        ("scale", a8w4_with(scale=low64(positive(3, 2, 8)))),
        ("scale", a8w4_with(scale=positive(3, 1, 8))),
        ("per_token_scale", a8w4_with(per_token_scale=positive(8))),
        ("out", a8w4_with(output_dtype=torch.float32)),
        ("act_type", a8w4_with(act_type=1)),
        ("x", a8w4_with(x=i8(9, 128), weight=as_int32(i4(3, 128, 8)))),
        ("scale", a4w4_with(scale=low64(positive(3, 3, 8)))),
        ("scale", a4w4_with(scale=None)),
        ("bias", a4w4_with(bias=f32(3, 8))),
    ]:
        refused("grouped_matmul int4", call, argument)


def antiquant_with(parts=1, **changes):
    case = antiquant_case(7, 64, 8, (2, 5), parts, half, parts > 1, False, True)
    case["call"].update(changes)
    return lambda: send(case)


for argument, call in [
    ("antiquant_scale", antiquant_with(antiquant_scale=positive(2, 8))),
    ("antiquant_scale", antiquant_with(antiquant_scale=positive(2, 7, dtype=half))),
    ("antiquant_scale", antiquant_with(antiquant_scale=positive(2, 2, 8, dtype=half))),
    ("antiquant_scale", antiquant_with(parts=2, antiquant_scale=positive(2, 3, 8, dtype=half))),
    ("antiquant_scale", antiquant_with(antiquant_scale=None)),
    ("bias", antiquant_with(bias=bf16(2, 8))),
    ("weight", antiquant_with(weight=f32(2, 64, 8).to(torch.int16))),
    ("scale", antiquant_with(scale=positive(2, 8))),
    ("act_type", antiquant_with(act_type=1)),
]:
    refused("grouped_matmul float by integer", call, argument)
if A5:
    refused(
        "grouped_matmul float by int4",
        antiquant_with(parts=4, x=f32(7, 64).half(), antiquant_scale=positive(2, 4, 8, dtype=half)),
        "antiquant_scale",
    )
    import grouped_a5  # noqa: F401
else:
    refused(
        "grouped_matmul",
        lambda: send({"counts": (3, 4), "call": {"x": fp8(7, 8), "weight": fp8(2, 8, 8)}}),
        "x",
    )
