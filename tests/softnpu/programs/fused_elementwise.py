"""Normalisation and activation operators (see fused_check.py)."""

import numpy as np
import torch
import torch_npu
from fused_check import A5, CANN, Steps, array, bf16, check, f32, refused, same, sigmoid


def mean_square(x, axes):
    return (x**2).mean(axes, keepdims=True)


RMS = Steps(
    axes=lambda gamma: tuple(range(-gamma.ndim, 0)),
    square=mean_square,
    factor=lambda square, eps: 1 / np.sqrt(square + eps),
    scaled=lambda y, gamma: y * gamma,
    shown=same,
)


def rms(case, steps):
    x, gamma, eps = array(case[0]), array(case[1]), case[2]
    r = steps.factor(steps.square(x, steps.axes(gamma)), eps)
    return [steps.scaled(x * r, gamma), steps.shown(r)]


norm_cases = [
    (f32(5, 7), f32(7), 1e-1),
    (f32(2, 3, 4, 8), f32(4, 8), 1e-2),
    (f32(1, 1) * 0, f32(1), 1e-1),
    (f32(3, 128), f32(128), 1e-1),
    (f32(9), f32(9), 1e-1),
    (f32(3, 4096), f32(4096), 1e-6),
    (f32(0, 8), f32(8), 1e-6),
]
norm_faults = {
    "sum instead of mean": dict(square=lambda x, axes: (x**2).sum(axes, keepdims=True)),
    "no epsilon": dict(factor=lambda square, eps: 1 / np.sqrt(square)),
    "no gamma": dict(scaled=same),
    "gamma plus one": dict(scaled=lambda y, gamma: y * (1 + gamma)),
    "mean subtracted": dict(
        square=lambda x, axes: mean_square(x - x.mean(axes, keepdims=True), axes)
    ),
    "epsilon outside the root": dict(factor=lambda square, eps: 1 / (np.sqrt(square) + eps)),
    "last axis only": dict(axes=lambda gamma: (-1,)),
    "no root": dict(factor=lambda square, eps: (1 / np.sqrt(square + eps)) ** 2),
    "gamma of the next column": dict(scaled=lambda y, gamma: y * np.roll(gamma, 1, -1)),
    "not inverted": dict(shown=lambda r: 1 / r),
}
half_faults = {fault: replaced for fault, replaced in norm_faults.items() if "epsilon" not in fault}


def call_rms(x, g, e=1e-6):
    return torch_npu.npu_rms_norm(x, g, e)


check("rms_norm", call_rms, rms, RMS, norm_cases, norm_faults, 1e-5)
half_cases = [
    (bf16(2, 7168), bf16(7168), 1e-6),
    (bf16(5, 1536), f32(1536), 1e-6),  # x and gamma may differ so
    (f32(3, 64, 512).half(), f32(512), 1e-6),
    (bf16(3, 4, 6) + 1, bf16(4, 6), 1e-6),
]
check("rms_norm in 16 bits", call_rms, rms, RMS, half_cases, half_faults, 1e-2)
refused("rms_norm", lambda: call_rms(f32(3, 4).npu(), f32(5).npu()), "'gamma'")
refused("rms_norm", lambda: call_rms(f32(3, 4).npu(), f32(4).half().npu()), "'gamma'")
refused("rms_norm", lambda: call_rms(bf16(3, 4).npu(), f32(4).half().npu()), "'gamma'")
refused("rms_norm", lambda: call_rms(f32(3, 0).npu(), f32(0).npu()), "'gamma'")
refused(
    "rms_norm", lambda: call_rms(torch.ones(3, 4, dtype=torch.int32).npu(), f32(4).npu()), "'x'"
)
refused("rms_norm", lambda: call_rms(f32(*[1] * 9).npu(), f32(1).npu()), "'x'")


ADD_RMS = Steps(**vars(RMS), added=np.add, stored=lambda x, a: x)


def add_rms(case, steps):
    a, b = array(case[0]), array(case[1])
    x = steps.added(a, b)
    y, r = rms((torch.tensor(x), *case[2:]), steps)
    return [y, r, steps.stored(x, a)]


def call_add_rms(a, b, g, e=1e-6):
    return torch_npu.npu_add_rms_norm(a, b, g, e)


add_cases = [(f32(5, 7), f32(5, 7), f32(7), 1e-1), (f32(2, 3, 8), f32(2, 3, 8), f32(3, 8), 1e-2)]
add_faults = {
    "no addition": dict(added=same),
    "subtraction": dict(added=np.subtract),
    "sum not stored": dict(stored=lambda x, a: a),
}
check("add_rms_norm", call_add_rms, add_rms, ADD_RMS, add_cases, norm_faults | add_faults, 1e-5)
add_cases = [
    (bf16(3, 4096), bf16(3, 4096), bf16(4096), 1e-6),
    (bf16(2, 3, 8) + 1, bf16(2, 3, 8), bf16(3, 8), 1e-6),
]
check(
    "add_rms_norm in 16 bits",
    call_add_rms,
    add_rms,
    ADD_RMS,
    add_cases,
    half_faults | add_faults,
    1.5e-2,
)
refused(
    "add_rms_norm", lambda: call_add_rms(f32(3, 4).npu(), f32(2, 4).npu(), f32(4).npu()), "'x2'"
)
refused(
    "add_rms_norm", lambda: call_add_rms(f32(3, 4).npu(), bf16(3, 4).npu(), f32(4).npu()), "'x2'"
)
refused(
    "add_rms_norm",
    lambda: call_add_rms(bf16(3, 4).npu(), bf16(3, 4).npu(), f32(4).npu()),
    "'gamma'",
)
refused(
    "add_rms_norm", lambda: call_add_rms(f32(3, 4).npu(), f32(3, 4).npu(), f32(3).npu()), "'gamma'"
)
refused(
    "add_rms_norm",
    lambda: call_add_rms(f32(3, 4).npu(), f32(3, 4).npu(), f32(4).npu(), -1.0),
    "'epsilon'",
)
empty = [(f32(0, 8), f32(0, 8), f32(8), 1e-6)]
if CANN >= (9, 0):
    check(
        "add_rms_norm of nothing",
        call_add_rms,
        add_rms,
        ADD_RMS,
        [*empty, *add_cases],
        add_faults,
        1.5e-2,
    )
else:
    refused("add_rms_norm", lambda: call_add_rms(*(t.npu() for t in empty[0][:3])), "'x1'")


SWIGLU = Steps(
    axis=same,
    halves=lambda x: np.split(x, 2, -1),
    gate=lambda a: a * sigmoid(a),
    product=np.multiply,
)


def swiglu(case, steps):
    axis = steps.axis(case[1])
    a, b = steps.halves(np.moveaxis(array(case[0]), axis, -1))
    return [np.moveaxis(steps.product(steps.gate(a), b), -1, axis)]


swiglu_cases = [
    (f32(5, 6), -1),
    (f32(4, 2), 0),
    (f32(2, 4, 6), 1),
    (f32(1, 2), -1),
    (f32(8), 0),
    (f32(3, 4096), -1),
    (f32(0, 6), -1),
]
swiglu_faults = {
    "halves swapped": dict(halves=lambda x: np.split(x, 2, -1)[::-1]),
    "no sigmoid": dict(gate=same),
    "sigmoid only": dict(gate=sigmoid),
    "gelu": dict(gate=lambda a: a * sigmoid(1.702 * a)),
    "relu": dict(gate=lambda a: np.maximum(a, 0)),
    "no product": dict(product=same),
    "sum": dict(product=np.add),
    "even and odd": dict(halves=lambda x: (x[..., ::2], x[..., 1::2])),
    "last axis always": dict(axis=lambda axis: -1),
}


def call_swiglu(x, d=-1):
    return [torch_npu.npu_swiglu(x, d)]


check("swiglu", call_swiglu, swiglu, SWIGLU, swiglu_cases, swiglu_faults, 1e-5)
half_cases = [(bf16(3, 4096), -1), (bf16(4, 2), 0), (f32(5, 6144).half(), -1)]
check("swiglu in 16 bits", call_swiglu, swiglu, SWIGLU, half_cases, swiglu_faults, 1.5e-2)
refused("swiglu", lambda: call_swiglu(f32(3, 5).npu()), "'dim'")
refused("swiglu", lambda: call_swiglu(f32(6, 4).npu().t()), "'x'")
refused("swiglu", lambda: call_swiglu(torch.ones(3, 4, dtype=torch.int32).npu()), "'x'")


ALPHA, LIMIT = 1.702, 2.0
CLIPPED = Steps(
    interleaved=same,
    gate=lambda a: np.minimum(a, LIMIT),
    gated=lambda clipped, a: clipped * sigmoid(ALPHA * clipped),
    up=lambda b: np.clip(b, -LIMIT, LIMIT),
    bias=1.0,
    rows=same,
)


def clipped(case, steps):
    x, groups, axis = array(case[0]), case[1], case[2] % case[0].dim()
    flat = x.reshape(int(np.prod(x.shape[:axis])), -1)
    a, b = (flat[:, ::2], flat[:, 1::2]) if steps.interleaved(case[3]) else np.split(flat, 2, -1)
    y = steps.gated(steps.gate(a), a) * (steps.up(b) + steps.bias)
    return [y[: len(y) if groups is None else steps.rows(int(groups.sum()))]]


clipped_faults = {
    "the other split": dict(interleaved=lambda interleaved: not interleaved),
    "gate not clipped": dict(gate=same),
    "gate clipped below": dict(gate=lambda a: np.clip(a, -LIMIT, LIMIT)),
    "up not clipped": dict(up=same),
    "up clipped above only": dict(up=lambda b: np.minimum(b, LIMIT)),
    "no alpha": dict(gated=lambda clipped, a: sigmoid(clipped) * clipped),
    "no bias": dict(bias=0),
    "sigmoid only": dict(gated=lambda clipped, a: sigmoid(ALPHA * clipped)),
    "clipped behind the gate": dict(
        gated=lambda clipped, a: np.minimum(a * sigmoid(ALPHA * a), LIMIT)
    ),
    "a row too few": dict(rows=lambda rows: rows - 1),
}


def call_clipped(x, groups, dim, interleaved):
    y = torch_npu.npu_clipped_swiglu(
        x, group_index=groups, dim=dim, limit=2.0, interleaved=interleaved
    )
    half = [*x.shape]
    half[dim] //= 2
    assert [*y.shape] == half
    rows = y.flatten(0, dim % x.dim() - 1) if dim % x.dim() else y[None]
    return [rows.flatten(1)[: len(rows) if groups is None else int(groups.sum())]]


if A5 and CANN < (9, 1):
    refused(
        "clipped_swiglu",
        lambda: call_clipped(f32(4, 6).npu(), None, -1, True),
        "does not exist on Ascend950",
    )
else:
    check(
        "clipped_swiglu",
        call_clipped,
        clipped,
        CLIPPED,
        [
            (f32(7, 6, scale=3), None, -1, True),
            (f32(9, 8, scale=3), None, -1, False),
            (f32(9, 8, scale=3), torch.tensor([3, 0, 4]), -1, True),
            (f32(3, 4, 5, scale=3), None, 1, False),
            (f32(6, 4, scale=3), torch.tensor([0] * 8191 + [5]), -1, True),
            (f32(6, scale=3), None, 0, True),
            (f32(3, 4096, scale=3), torch.tensor([2]), 1, False),
        ],
        clipped_faults,
        1e-5,
    )
    refused("clipped_swiglu", lambda: call_clipped(f32(4, 5).npu(), None, -1, True), "'dim'")
    refused("clipped_swiglu", lambda: call_clipped(f32(6, 4).npu().t(), None, -1, True), "'x'")
    many = torch.zeros(8193, dtype=torch.int64)
    refused(
        "clipped_swiglu",
        lambda: call_clipped(f32(4, 6).npu(), many.npu(), -1, True),
        "'group_index'",
    )
    refused(
        "clipped_swiglu",
        lambda: call_clipped(f32(4, 6).npu(), many[:2].int().npu(), -1, True),
        "'group_index'",
    )
    refused(
        "clipped_swiglu",
        lambda: torch_npu.npu_clipped_swiglu(f32(4, 6).npu(), limit=0.0),
        "'limit'",
    )
    for groups in ([-1, 3], [2, 3]):  # negative; more rows than there are
        rows = torch.tensor(groups).npu()
        refused(
            "clipped_swiglu",
            lambda g=rows: torch_npu.npu_clipped_swiglu(f32(4, 6).npu(), group_index=g),
            "'group_index'",
        )
    assert torch_npu.npu_clipped_swiglu(f32(0, 6).npu()).cpu().shape == (0, 3)
    if A5:
        refused(
            "clipped_swiglu",
            lambda: call_clipped(f32(4, 6).npu(), many[:0].npu(), -1, True),
            "'group_index'",
        )
