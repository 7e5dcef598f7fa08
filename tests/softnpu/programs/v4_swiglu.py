"""Clamped SwiGLU between dequantisation and quantisation: aclnnDequantSwigluQuantV2 and, on A5,
aclnnSwigluGroupQuant (see fused_check.py).
"""

import numpy as np
import torch
from dense_check import (
    FAMILY,
    STEP,
    absent,
    as_e4m3,
    e8m0,
    empty,
    from_fp8,
    int8_rows,
    launch,
    refuse,
    round_up_exponent,
)
from fused_check import A5, Steps, array, bf16, check, f32, refused, rng, sigmoid

I8, E4M3, E8M0 = torch.int8, torch.float8_e4m3fn, torch.float8_e8m0fnu
DEQUANT, GROUP = "aclnnDequantSwigluQuantV2", "aclnnSwigluGroupQuant"
LIMIT, ALPHA, BIAS = 1.5, 1.25, 0.5
DEFAULTS = (7.0, 1.702, 1.0)

HALVES = lambda v: np.split(v, 2, -1)
PAIRS = lambda v: (v[..., ::2], v[..., 1::2])
STEPS = Steps(
    columns=lambda v, scale: v * scale,
    rows=lambda v, scale: v * scale[:, None],
    bias=lambda v, bias, whole: v + bias,
    parts=lambda v, mode: PAIRS(v) if mode == 1 else HALVES(v),
    side=lambda gate, up, left: (gate, up) if left else (up, gate),
    gate=lambda g, limit: np.minimum(g, limit),
    up=lambda u, limit: np.clip(u, -limit, limit),
    alpha=lambda alpha: alpha,
    linear=lambda u, bias: u + bias,
    smooth=lambda h, scale: h * scale,
    group=lambda counts: np.repeat(np.arange(len(counts)), counts),
)


def swiglu(values, mode, left, settings, steps):
    gate, up = steps.side(*steps.parts(values, mode), left)
    if mode == 0:
        return gate * sigmoid(gate) * up
    limit, alpha, bias = settings
    gate, up = steps.gate(gate, limit), steps.linear(steps.up(up, limit), bias)
    return gate * sigmoid(steps.alpha(alpha) * gate) * up


def rows_of(parameter, group):
    table = array(parameter).astype(float)
    return table[group] if table.ndim == 2 else table


def dequant(case, steps):
    x, scale, row_scale, bias, smooth, counts, mode, left, settings = case
    rows = len(x) if counts is None else int(counts.sum())
    group = np.zeros(rows, int) if counts is None else steps.group(array(counts))
    v = array(x)[:rows].astype(float)
    whole = bias is not None and bias.dtype == torch.int32
    if whole:
        v = steps.bias(v, rows_of(bias, group), True)
    if scale is not None:
        v = steps.columns(v, rows_of(scale, group))
    if row_scale is not None:
        v = steps.rows(v, array(row_scale)[:rows])
    if bias is not None and not whole:
        v = steps.bias(v, rows_of(bias, group), False)
    h = swiglu(v, mode, left, settings, steps)
    return int8_rows(h if smooth is None else steps.smooth(h, rows_of(smooth, group)))


def dequant_arguments(x, scale, row_scale, bias, smooth, counts, mode, left, settings):
    limit, alpha, glu_bias = settings
    return dict(x=x, weight_scale=scale, activation_scale=row_scale, bias=bias,
                quant_scale=smooth, group_index=counts, activate_left=left, quant_mode="dynamic",
                dst_type=2, round_mode="rint", activate_dim=-1, swiglu_mode=mode,
                clamp_limit=limit, glu_alpha=alpha, glu_bias=glu_bias,
                y=empty(len(x), x.shape[1] // 2, dtype=I8), scale=empty(len(x)))  # fmt: skip


def call_dequant(*case):
    given = dequant_arguments(*case)
    launch(DEQUANT, **given)
    y, scale = given["y"], given["scale"]
    rows = len(y) if case[5] is None else int(case[5].sum().item())
    behind = torch.isnan(scale[rows:]).all() & (y[rows:] == -1).all()
    assert behind.item(), "rows of no group are written"
    return [scale[:rows] * 127, y[:rows].float() * STEP]


def sums(m, width):
    return torch.tensor(rng.integers(-3000, 3000, (m, width)), dtype=torch.int32)


def dequant_case(m, width, counts, mode, left=True, bias=None, smooth=False, settings=None):
    groups = 1 if counts is None else len(counts)
    lead = () if counts is None else (groups,)
    return (
        sums(m, width),
        f32(*lead, width).abs() * 1e-3,
        f32(m).abs() + 0.5,
        bias(*lead, width) if bias else None,
        f32(*lead, width // 2) if smooth else None,
        None if counts is None else torch.tensor(counts),
        mode,
        left,
        settings or (LIMIT, ALPHA, BIAS),
    )


def integers(*shape):
    return torch.tensor(rng.integers(-900, 900, shape), dtype=torch.int32)


DEQUANT_FAULTS = {
    "no column scale": dict(columns=lambda v, scale: v * 1e-3),
    "no row scale": dict(rows=lambda v, scale: v),
    "bias in another place": dict(bias=lambda v, bias, whole: v + (0 if whole else 2 * bias)),
    "gate and up exchanged": dict(side=lambda gate, up, left: (up, gate)),
    "no smooth scale": dict(smooth=lambda h, scale: h),
}
CLAMP_FAULTS = {
    "gate not clamped": dict(gate=lambda g, limit: g),
    "gate clamped below": dict(gate=lambda g, limit: np.clip(g, -limit, limit)),
    "up not clamped": dict(up=lambda u, limit: u),
    "up clamped above only": dict(up=lambda u, limit: np.minimum(u, limit)),
    "no alpha": dict(alpha=lambda alpha: 1),
    "no linear bias": dict(linear=lambda u, bias: u),
}
GROUP_FAULTS = {
    "counts backwards": dict(group=lambda c: np.repeat(np.arange(len(c))[::-1], c[::-1])),
    "the first group for all": dict(group=lambda c: np.zeros(c.sum(), int)),
}


def check_dequant():
    if A5:
        cases = [
            dequant_case(4, 96, None, 0, settings=DEFAULTS),
            dequant_case(7, 64, [3, 0, 2], 1, bias=f32, settings=DEFAULTS),
            dequant_case(3, 64, None, 0, left=False, bias=integers, smooth=True, settings=DEFAULTS),
            (f32(3, 40).half() * 4, *[None] * 4, None, 1, True, DEFAULTS),
        ]
        faults = DEQUANT_FAULTS | GROUP_FAULTS
        faults |= {"halves always": dict(parts=lambda v, mode: HALVES(v))}
    else:
        plan = (10.0, 1.0, 0.0)
        cases = [
            dequant_case(9, 128, [3, 0, 5], 2),
            dequant_case(6, 128, [6], 2, settings=plan),  # no groups: one count for all rows
            dequant_case(5, 64, [2, 1], 1, bias=f32),
            dequant_case(4, 64, [1, 3], 0, left=False, bias=integers, smooth=True),
            (bf16(4, 64) * 3, *[None] * 4, torch.tensor([4]), 2, False, (LIMIT, ALPHA, BIAS)),
        ]
        faults = DEQUANT_FAULTS | GROUP_FAULTS | CLAMP_FAULTS
        faults |= {
            "mode 1 by halves": dict(parts=lambda v, mode: HALVES(v)),
            "mode 2 by pairs": dict(parts=lambda v, mode: PAIRS(v) if mode else HALVES(v)),
        }
    check(DEQUANT, call_dequant, dequant, STEPS, cases, faults, 1e-4)


STATIC = Steps(**vars(STEPS), quantised=lambda h, scale, offset: h / scale + offset)


def static(case, steps):
    x, scale, row_scale, quant_scale, quant_offset, counts = case
    group = np.zeros(len(x), int) if counts is None else steps.group(array(counts))
    v = array(x)[: len(group)] * rows_of(scale, group)
    h = swiglu(steps.rows(v, array(row_scale)[: len(group)]), 0, True, DEFAULTS, steps)
    picked = [array(q)[group] if len(q) == group.max() + 1 else array(q) for q in
              (quant_scale, quant_offset)]  # fmt: skip
    scale, offset = (q[:, None] if q.ndim == 1 else q for q in picked)
    return [np.clip(np.rint(steps.quantised(h, scale, offset)), -128, 127) * STEP]


def call_static(x, scale, row_scale, quant_scale, quant_offset, counts):
    given = dequant_arguments(x, scale, row_scale, None, quant_scale, counts, 0, True, DEFAULTS)
    launch(DEQUANT, **{**given, "quant_mode": "static", "quant_offset": quant_offset})
    assert torch.isnan(given["scale"]).all().item(), "a static quantisation writes scales"
    rows = len(x) if counts is None else int(counts.sum().item())
    return [given["y"][:rows].float() * STEP]


def check_static():
    x, scale, row_scale, *_ = dequant_case(5, 64, None if A5 else [2, 3], 0)
    counts = None if A5 else torch.tensor([2, 3])
    groups = 1 if A5 else 2
    cases = [
        (x, scale, row_scale, f32(groups).abs() * 0.05 + 0.02, f32(groups) * 9, counts),
        (x, scale, row_scale, f32(groups, 32).abs() * 0.05 + 0.02, f32(groups, 32) * 9, counts),
    ]
    faults = {
        "scale multiplies": dict(quantised=lambda h, scale, offset: h * scale + offset),
        "no offset": dict(quantised=lambda h, scale, offset: h / scale),
        "no row scale": DEQUANT_FAULTS["no row scale"],
    }
    check(f"{DEQUANT}, static", call_static, static, STATIC, cases, faults, 1e-4)


def refuse_dequant():
    settings = DEFAULTS if A5 else None

    def good():
        return dequant_arguments(*dequant_case(6, 128, [2, 3], 1, settings=settings))

    refuse(DEQUANT, good, "'x'", x=torch.zeros(6, 128))
    refuse(DEQUANT, good, "'weightScale'", 161001, weight_scale=None)
    refuse(DEQUANT, good, "'weightScale'", weight_scale=f32(128))
    refuse(DEQUANT, good, "'activationScale'", activation_scale=f32(5))
    refuse(DEQUANT, good, "'bias'", bias=f32(2, 127))
    refuse(DEQUANT, good, "'quantScale'", quant_scale=f32(3, 64))
    refuse(DEQUANT, good, "'quantOffset'", quant_offset=f32(2, 64))
    refuse(DEQUANT, good, "'quantScale'", 161001, quant_mode="static")
    refuse(DEQUANT, good, "'quantMode'", quant_mode="tensor")
    refuse(DEQUANT, good, "'dstType'", dst_type=36)
    refuse(DEQUANT, good, "'roundMode'", round_mode="floor")
    refuse(DEQUANT, good, "'activateDim'", activate_dim=0)
    refuse(DEQUANT, good, "'activateLeft'", activate_left=False)  # in mode 1
    refuse(DEQUANT, good, "'swigluMode'", swiglu_mode=3)
    refuse(DEQUANT, good, "'clampLimit'", clamp_limit=0.0)
    refuse(DEQUANT, good, "'yOut'", y=empty(6, 63, dtype=I8))
    refuse(DEQUANT, good, "'scaleOut'", scale=empty(5))
    refuse(DEQUANT, good, "'weightScale'", x=bf16(6, 128))
    if A5:
        refuse(DEQUANT, good, "'swigluMode'", swiglu_mode=2)
        refuse(DEQUANT, good, "'clampLimit'", clamp_limit=10.0)
    else:
        refuse(DEQUANT, good, "'groupIndex'", group_index=None, weight_scale=f32(128))
        refuse(DEQUANT, good, "'x'", x=sums(6, 96))
        refuse(DEQUANT, lambda: dequant_arguments(*dequant_case(1, 7296, [1], 2)), "'x'")
    for counts in ([4, 3], [-1, 3]):  # beyond the rows, or negative
        refused(DEQUANT, lambda c=counts: launch(DEQUANT, **{**good(), "group_index":
                torch.tensor(c)}), "'groupIndex'", 507015)  # fmt: skip


MX = Steps(
    gate=STEPS.gate,
    up=STEPS.up,
    side=lambda gate, up: (gate, up),
    weight=lambda h, w: h * w[:, None],
    floor=1e-4,
    exponent=round_up_exponent,
    rounded=lambda h: h,
    block=32,
)


def group_quant(case, steps):
    x, weight, counts, mode, limit, round_scale = case
    rows = len(x) if counts is None else min(len(x), int(counts.sum()))
    gate, up = steps.side(*HALVES(array(x)[:rows]))
    if limit > 0:
        gate, up = steps.gate(gate, limit), steps.up(up, limit)
    h = gate * sigmoid(gate) * up
    if weight is not None:
        h = steps.weight(h, array(weight).reshape(-1)[:rows])
    block = steps.block if mode == 1 else 128
    blocks = steps.rounded(h).reshape(rows, -1, block)
    scale = np.maximum(np.abs(blocks).max(-1), steps.floor) / 448
    if round_scale:
        scale = np.exp2(steps.exponent(scale).astype(float))
    y = as_e4m3(blocks / scale[..., None]).reshape(rows, -1) * 0.9e-3
    if mode == 0:
        return [scale * 448, y]
    per_32 = np.log2(scale).repeat(steps.block // 32, -1)
    return [per_32.reshape(rows, -1, 2), y]


def group_arguments(x, weight, counts, mode, limit, round_scale):
    rows, width = x.shape
    half = width // 2
    scale = empty(rows, half // 64, 2, dtype=E8M0) if mode else empty(rows, half // 128)
    return dict(x=x, weight=weight, group_index=counts, dst_type=36, quant_mode=mode,
                block_size=0, round_scale=round_scale, clamp_limit=limit, dst_type_max=0.0,
                output_origin=False, y=empty(rows, half, dtype=E4M3), y_scale=scale,
                y_origin=empty(rows, half, dtype=x.dtype))  # fmt: skip


def call_group(*case):
    given = group_arguments(*case)
    launch(GROUP, **given)
    x, counts, mode = case[0], case[2], case[3]
    rows = len(x) if counts is None else min(len(x), int(counts.sum().item()))
    scale = given["y_scale"]
    behind = given["y"].view(torch.uint8)[rows:].eq(255).all()
    behind &= scale.view(torch.uint8)[rows:].eq(255).all()
    assert behind.item(), "rows of no group are written"
    shown = e8m0(scale[:rows]) if mode else scale[:rows] * 448
    return [shown, from_fp8(given["y"][:rows]) * 0.9e-3]


def faint(*shape):
    """Rows that fade below the floor of the scale."""
    return (f32(*shape) * torch.logspace(1, -4, shape[0]).unsqueeze(-1)).bfloat16()


def check_group():
    cases = [
        (bf16(5, 512) * 4, None, torch.tensor([2, 0, 2]), 1, 2.5, True),
        (faint(6, 256), f32(6).abs(), None, 1, 10.0, True),
        (f32(3, 256).half(), f32(3, 1), torch.tensor([9]), 1, -1.0, True),
    ]
    faults = {
        "gate not clamped": dict(gate=lambda g, limit: g),
        "gate clamped below": dict(gate=lambda g, limit: np.clip(g, -limit, limit)),
        "up not clamped": dict(up=lambda u, limit: u),
        "gate and up exchanged": dict(side=lambda gate, up: (up, gate)),
        "no weight": dict(weight=lambda h, w: h),
        "no floor": dict(floor=1e-30),
        "rounded to bf16 before": dict(
            rounded=lambda h: torch.tensor(h).bfloat16().double().numpy()
        ),
        "scale rounded down": dict(exponent=lambda s: np.floor(np.log2(s))),
        "blocks of 64": dict(block=64),
    }
    check(GROUP, call_group, group_quant, MX, cases, faults, 1e-4)
    blocks = [
        (bf16(4, 512), None, None, 0, 1.0, False),
        (faint(4, 256), f32(4), torch.tensor([1, 3]), 0, -1.0, True),
    ]
    kept = ("up not clamped", "no weight", "no floor", "gate and up exchanged")
    few = {name: faults[name] for name in kept}
    check(f"{GROUP} in blocks", call_group, group_quant, MX, blocks, few, 1e-4)


def refuse_group():
    def good():
        return group_arguments(bf16(3, 256), None, None, 1, 10.0, True)

    refuse(GROUP, good, "'x'", x=f32(3, 256))
    refuse(GROUP, lambda: group_arguments(bf16(3, 384), None, None, 1, 10.0, True), "'x'", 561002)
    refuse(GROUP, good, "'weight'", 561002, weight=f32(4))
    refuse(GROUP, good, "'groupIndex'", group_index=torch.tensor([1]).int())
    refuse(GROUP, good, "'scale'", inv_scale=f32(1))
    refuse(GROUP, good, "'dstType'", dst_type=35)
    refuse(GROUP, good, "'quantMode'", quant_mode=3, y_scale=empty(3, 1))
    refuse(GROUP, good, "'blockSize'", block_size=128)
    refuse(GROUP, good, "'roundScale'", round_scale=False)
    refuse(GROUP, good, "'clampLimit'", clamp_limit=0.0)
    refuse(GROUP, good, "'outputOrigin'", output_origin=True)
    refuse(GROUP, good, "'yOriginOut'", 161001, y_origin=None)
    refuse(GROUP, good, "'yOut'", 561002, y=empty(3, 127, dtype=E4M3))
    refuse(GROUP, good, "'yScaleOut'", 561002, y_scale=empty(3, 4, 2, dtype=E8M0))
    refused(GROUP, lambda: launch(GROUP, **{**good(), "group_index": torch.tensor([-1])}),
            "'groupIndex'", 507015)  # fmt: skip


def one_group():
    return dequant_arguments(*dequant_case(6, 128, [2, 3], 0, settings=DEFAULTS))


if FAMILY:
    check_dequant()
    check_static()
    refuse_dequant()
else:
    absent(DEQUANT, one_group)
if FAMILY and A5:
    check_group()
    refuse_group()
else:
    absent(GROUP, lambda: group_arguments(bf16(3, 256), None, None, 1, 10.0, True))
