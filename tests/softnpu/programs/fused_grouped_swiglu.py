"""grouped_matmul_swiglu_quant, both versions (see fused_check.py)."""

from functools import wraps

import numpy as np
import torch
import torch_npu
from fused_check import A5, Steps, array, check, distance, f32, refused, reseed, same, sigmoid
from grouped_data import (
    COUNT_FAULTS,
    FP4,
    as_int32,
    codes4,
    e8m0,
    exponent,
    fp8,
    i4,
    i8,
    low64,
    nz,
    pack4,
    positive,
    spans,
    tiles,
)

E8M0, E2M1, E4M3, E5M2 = (
    torch_npu.float8_e8m0fnu,
    torch_npu.float4_e2m1fn_x2,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
reseed(__name__)
np.seterr(all="ignore")  # faults divide by zero
TYPES = {  # largest value, largest exponent, smallest exponent, bits behind the point
    "e4m3": (448, 8, -6, 3),
    "e5m2": (57344, 15, -14, 2),
    "fp4": (6, 2, 0, 1),
}


def swish(a, b):
    return a * sigmoid(a) * b


def rounded(v, kind, whole):
    if kind == "int8":
        return np.clip(whole(v), -128, 127)
    largest, _, lowest, bits = TYPES[kind]
    size = np.where(v == 0, 1, np.abs(v))
    step = 2.0 ** (np.maximum(np.floor(np.log2(size)), lowest) - bits)
    return np.clip(whole(v / step) * step, -largest, largest)


def between(c, dtype):
    return c if dtype is None else array(torch.tensor(c, dtype=torch.float32).to(dtype))


STEPS = Steps(
    spans=spans,
    scale=same,
    rows=same,
    between=between,
    halves=lambda c: np.split(c, 2, -1),
    swish=swish,
    smoothed=np.multiply,
    top=0,  # more than the largest value or exponent
    by_row=lambda largest: largest,
    whole=np.round,
)


def swiglu(case, steps):
    """x, weight, its scale [groups, parts of K, N], that of x [M, parts of K];
    smoothing; what the result is.
    """
    x, w, scale, rows, smooth = (np.asarray(c, dtype=float) for c in case["values"])
    kind, mx, counts = case["kind"], case["mx"], torch.tensor(case["counts"])
    scale, rows = steps.scale(scale), steps.rows(rows)
    k, n, m = x.shape[1], w.shape[2], int(counts.sum())
    s = np.zeros((m, n // 2))
    for expert, start, end in steps.spans(counts, 1):
        end = min(end, m)
        if start >= end:
            continue
        each = x[start:end] * np.repeat(rows[start:end], -(-k // rows.shape[1]), 1)[:, :k]
        c = each @ (w[expert] * np.repeat(scale[expert], -(-k // scale.shape[1]), 0)[:k])
        a, b = steps.halves(steps.between(c, case.get("between")))
        s[start:end] = steps.smoothed(steps.swish(a, b), smooth[expert])
    if not mx:
        q = steps.by_row(
            np.abs(s).max(-1) / ({"int8": 127, "e4m3": 448, "e5m2": 57344}[kind] + steps.top)
        )
        return [rounded(s / q[:, None], kind, steps.whole), 4 * np.log(q)]
    blocks = -(-n // 2 // 64) * 2
    padded = np.zeros((m, blocks * 32))
    padded[:, : n // 2] = s
    parts = padded.reshape(m, blocks, 32)
    largest = np.abs(parts).max(-1)
    power = steps.by_row(np.floor(np.log2(np.where(largest == 0, 2.0**-126, largest))))
    power = np.clip(power - TYPES[kind][1] - steps.top, -127, 127)
    q = (parts / 2.0 ** power[..., None]).reshape(m, -1)[:, : n // 2]
    return [rounded(q, kind, steps.whole), power.reshape(m, -1, 2) + 127]


def one_for_all(largest):
    """Of rows [M] the largest; of blocks [M, blocks] those of the first block."""
    return np.broadcast_to(largest.max() if largest.ndim == 1 else largest[:, :1], largest.shape)


def read_result(case, result):
    m = sum(case["counts"])
    q, scale = (t[:m].cpu() for t in result[:2])
    if case["kind"] == "fp4":
        raw = q.view(torch.uint8).numpy()
        q = torch.tensor(FP4[np.stack([raw & 15, raw >> 4], -1).reshape(m, -1)])
    if case["mx"]:
        return [q.double(), scale.view(torch.uint8)]
    return [q, 4 * torch.log(scale)]


def call_v2(case):
    if case.get("first"):
        call = case["call"]
        ends = torch.tensor(case["counts"]).cumsum(0).npu()
        return torch_npu.npu_grouped_matmul_swiglu_quant(
            call["x"].npu(),
            call["weight"][0].npu(),
            ends,
            call["weight_scale"][0].npu(),
            call["x_scale"].npu(),
            bias=None if case.get("assist") is None else case["assist"].npu(),
        )
    counts = torch.tensor(case["counts"])
    kind = case.get("list_type", 1)
    arguments = {
        k: v.npu()
        if isinstance(v, torch.Tensor)
        else [t.npu() for t in v]
        if isinstance(v, list)
        else v
        for k, v in case["call"].items()
    }
    groups = (counts if kind == 1 else counts.cumsum(0)).npu()
    return torch_npu.npu_grouped_matmul_swiglu_quant_v2(
        group_list=groups, group_list_type=kind, **arguments
    )


def family(name, cases, faults, tolerance=1e-3):
    check(
        name,
        lambda index: read_result(cases[index], call_v2(cases[index])),
        lambda index, steps: swiglu(cases[index[0]], steps),
        STEPS,
        [(i,) for i in range(len(cases))],
        faults,
        tolerance,
    )


NEAR = 4e-6  # above the rounding of fp32 sums


def settled(make):
    """Cases are drawn until no code hangs on the rounding of a sum:
    near ties are no business of the operator.
    """

    @wraps(make)
    def drawn(*arguments, **options):
        while True:
            case = make(*arguments, **options)
            right, *others = (
                swiglu(case, STEPS.but(scale=lambda scale, by=by: scale * by))
                for by in (1, 1 - NEAR, 1 + NEAR)
            )
            if all(
                distance(o, r) < 1e-4 for other in others for o, r in zip(other, right, strict=True)
            ):
                return case

    return drawn


def case_of(x, w, scale, rows, call, kind="int8", mx=False, smooth=None, **more):
    e = len(w)
    smooth = np.ones((e, 1)) if smooth is None else array(smooth).reshape(e, -1)
    return {"values": [x, w, scale, rows, smooth], "call": call, "kind": kind, "mx": mx, **more}


@settled
def int8_case(m, k, n, counts, layout, dtype=torch.float32, **more):
    e = len(counts)
    x, w, s, r = i8(m, k), i8(e, k, n), (positive(e, n) / 64).to(dtype), positive(m)
    sent = nz(w) if layout == "nz" else tiles(w, 32) if layout == "tiles" else w
    call = {"x": x, "weight": [sent], "weight_scale": [s], "x_scale": r}
    if not more.get("first"):
        call |= {"quant_dtype": torch.int8}
    return case_of(
        array(x), array(w), array(s)[:, None], array(r)[:, None], call, counts=counts, **more
    )


@settled
def int4_case(m, k, n, counts, x4, in_nz, parts=0, smooth=None, **more):
    e = len(counts)
    x, w = i4(m, k) if x4 else i8(m, k), i4(e, k, n)
    s, r = positive(e, max(parts, 1), n) / 8, positive(m)
    sent = nz(pack4(w).view(torch.int8)).view(torch.int32) if in_nz else as_int32(w)
    call = {"x": as_int32(x) if x4 else x, "weight": [sent], "x_scale": r}
    call["weight_scale"] = [low64(s if parts else s[:, 0])]
    assist = (8 * w.double() * s.double().repeat_interleave(k // max(parts, 1), 1)).sum(1).float()
    if not more.get("first"):
        call |= {"quant_dtype": torch.int8, "dequant_mode": 1 if parts else 0}
        if not x4:
            call["weight_assist_matrix"] = [assist]
    if smooth is not None:
        call["smooth_scale"] = smooth
    more |= {"assist": assist} if more.get("first") else {}
    return case_of(
        array(x), array(w), array(s), array(r)[:, None], call, smooth=smooth, counts=counts, **more
    )


SWIGLU_FAULTS = COUNT_FAULTS | {
    "no scale": dict(scale=np.ones_like),
    "scale of expert 0": dict(scale=lambda scale: np.broadcast_to(scale[:1], scale.shape)),
    "rows' scale": dict(rows=lambda rows: np.roll(rows, 1, 0)),
    "pairs instead of halves": dict(halves=lambda c: (c[:, 0::2], c[:, 1::2])),
    "gate first": dict(halves=lambda c: np.split(c, 2, -1)[::-1]),
    "no swish": dict(swish=np.multiply),
    "gelu": dict(swish=lambda a, b: a * sigmoid(1.702 * a) * b),
    "scale by one more": dict(top=1),
    "one scale for all rows": dict(by_row=one_for_all),
    "rounded to zero": dict(whole=np.trunc),
}


@settled
def fp8_case(m, k, n, counts, dtype=E4M3, between=None, **more):
    e = len(counts)
    x, w, s, r = fp8(m, k, dtype=dtype), fp8(e, k, n, dtype=dtype), positive(e, n), positive(m)
    call = {"x": x, "weight": [w], "weight_scale": [s], "x_scale": r, "quant_dtype": dtype}
    call["dequant_dtype"] = between or torch.float32
    kind = "e4m3" if dtype == E4M3 else "e5m2"
    values = (array(x), array(w), array(s)[:, None], array(r)[:, None])
    return case_of(*values, call, kind=kind, counts=counts, between=between, **more)


@settled
def mx_case(m, k, n, counts, kind="e4m3", transposed=False, four=False, in_nz=False):
    e = len(counts)
    x, w = (codes4(m, k), codes4(e, k, n)) if four else (fp8(m, k), fp8(e, k, n))
    s, r = e8m0(e, -(-k // 64), n, 2), e8m0(m, -(-k // 64), 2)
    numbers = [FP4[t] if four else array(t) for t in (x, w)]
    numbers += [exponent(s.permute(0, 1, 3, 2).reshape(e, -1, n)), exponent(r.reshape(m, -1))]
    numbers[2] = np.repeat(numbers[2], 32, 1)[:, :k]
    numbers[3] = np.repeat(numbers[3], 32, 1)[:, :k]
    pack = pack4 if four else lambda t: t
    sent = pack(w).npu()
    if transposed:
        sent = pack(w.transpose(1, 2).contiguous()).npu().transpose(1, 2)
        s = s.transpose(1, 2).contiguous().npu().transpose(1, 2)
    sent = tiles(w, 32) if in_nz == "tiles" else nz(w) if in_nz else sent
    quant = {"e4m3": E4M3, "e5m2": E5M2, "fp4": E2M1}[kind]
    call = {"x": pack(x), "weight": [sent], "weight_scale": [s], "x_scale": r, "quant_dtype": quant}
    call |= {"dequant_mode": 2, "quant_mode": 2, "weight_scale_dtype": E8M0, "x_scale_dtype": E8M0}
    if four:
        call |= {"x_dtype": E2M1, "weight_dtype": E2M1}
    return case_of(*numbers, call, kind=kind, mx=True, counts=counts)


def with_(case, **changes):
    case["call"].update(changes)
    return lambda: call_v2(case)


if A5:
    family(
        "grouped_matmul_swiglu_quant_v2 per token",
        [
            int8_case(9, 20, 10, (3, 0, 6), "nd"),
            fp8_case(9, 20, 6, (3, 2, 3)),
            fp8_case(7, 33, 8, (3, 4), dtype=E5M2, list_type=0),
            fp8_case(30, 33, 64, (13, 17), between=torch.bfloat16),
            fp8_case(30, 33, 64, (13, 17), between=torch.float16),
        ],
        SWIGLU_FAULTS | {"fp32 between": dict(between=same)},
    )
    family(
        "grouped_matmul_swiglu_quant_v2 MX",
        [
            mx_case(9, 64, 6, (3, 0, 6)),
            mx_case(9, 100, 140, (3, 6), transposed=True),
            mx_case(33, 256, 256, (3, 20, 8), in_nz=True),
            mx_case(9, 64, 128, (3, 6), in_nz="tiles"),
            mx_case(7, 70, 132, (3, 4), four=True),
            mx_case(7, 70, 132, (3, 4), four=True, kind="fp4"),
            mx_case(7, 64, 128, (3, 4), four=True, kind="fp4", transposed=True),
        ],
        SWIGLU_FAULTS,
    )
    refusals = [
        ("weight_scale", with_(fp8_case(7, 33, 8, (3, 4)), weight_scale=[positive(2, 7)])),
        ("x_scale", with_(fp8_case(7, 33, 8, (3, 4)), x_scale=positive(6))),
        ("quant_mode", with_(fp8_case(7, 33, 8, (3, 4)), quant_mode=1)),
        ("dequant_mode", with_(mx_case(9, 64, 6, (3, 6)), dequant_mode=0)),
        ("weight_scale", with_(mx_case(9, 128, 8, (3, 6)), weight_scale=[e8m0(2, 1, 8, 2)])),
        ("smooth_scale", with_(fp8_case(7, 33, 8, (3, 4)), smooth_scale=f32(2))),
        ("x", with_(int8_case(9, 20, 10, (3, 6), "nd"), x=i8(9, 20).to(torch.int16))),
        ("x", with_(int8_case(9, 32, 64, (3, 6), "nd"), weight=[nz(i8(2, 32, 64))])),
    ]
else:
    family(
        "grouped_matmul_swiglu_quant",
        [
            int8_case(9, 32, 64, (3, 0, 6), "nz", first=True),
            int8_case(9, 48, 96, (3, 4), "nz", torch.bfloat16, first=True),
            int4_case(9, 64, 128, (3, 6), False, True, first=True),
            int4_case(9, 64, 64, (3, 6), False, True, parts=2, first=True),
        ],
        SWIGLU_FAULTS,
    )
    family(
        "grouped_matmul_swiglu_quant_v2 A8W8, A8W4",
        [
            int8_case(9, 32, 64, (3, 0, 6), "nz"),
            int8_case(9, 48, 64, (3, 4), "tiles", torch.float16),
            int8_case(40, 512, 256, (8, 30, 2), "nz", torch.bfloat16, list_type=0),
            int4_case(9, 20, 16, (3, 6), False, False),
            int4_case(17, 256, 64, (3, 14), False, True, parts=4),
        ],
        SWIGLU_FAULTS,
    )
    family(
        "grouped_matmul_swiglu_quant_v2 A4W4",
        [
            int4_case(9, 24, 16, (3, 6), True, False),
            int4_case(9, 64, 64, (3, 6), True, True, parts=2, smooth=positive(2) * 9),
            int4_case(9, 64, 64, (3, 6), True, False, parts=4, smooth=positive(2, 32) * 9),
        ],
        SWIGLU_FAULTS | {"not smoothed": dict(smoothed=same)},
    )
    refusals = [
        ("weight", with_(int8_case(9, 32, 64, (3, 6), "nd"))),
        ("weight_scale", with_(int8_case(9, 32, 64, (3, 6), "nz"), weight_scale=[positive(2, 63)])),
        ("x_scale", with_(int8_case(9, 32, 64, (3, 6), "nz"), x_scale=positive(8))),
        ("dequant_mode", with_(int8_case(9, 32, 64, (3, 6), "nz"), dequant_mode=1)),
        ("dequant_mode", with_(int4_case(9, 64, 64, (3, 6), False, True, parts=2), dequant_mode=0)),
        (
            "weight_assist_matrix",
            with_(int4_case(9, 64, 64, (3, 6), False, True), weight_assist_matrix=None),
        ),
        ("smooth_scale", with_(int4_case(9, 64, 64, (3, 6), False, True), smooth_scale=f32(2))),
        ("smooth_scale", with_(int4_case(9, 64, 64, (3, 6), True, True), smooth_scale=f32(3))),
        ("bias", with_(int8_case(9, 32, 64, (3, 6), "nz"), bias=f32(2, 64))),
        ("weight", with_(int8_case(9, 32, 10272, (3, 6), "nz"))),
        ("x", with_(int4_case(9, 20000, 8, (3, 6), False, False))),
    ]
for argument, call in refusals:
    refused("grouped_matmul_swiglu_quant_v2", call, argument)
