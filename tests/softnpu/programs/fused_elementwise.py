"""Normalisation and activation operators (see fused_check.py)."""

import numpy as np
import torch
import torch_npu
from fused_check import A5, CANN, array, bf16, check, f32, refused, sigmoid


def rms(case, fault):
    x, gamma, eps = array(case[0]), array(case[1]), case[2]
    axes = tuple(range(-gamma.ndim, 0)) if fault != "last axis only" else (-1,)
    square = (x**2).sum(axes, keepdims=True) if fault == "sum instead of mean" else (x**2).mean(axes, keepdims=True)
    if fault == "mean subtracted":
        square = ((x - x.mean(axes, keepdims=True)) ** 2).mean(axes, keepdims=True)
    r = (
        1 / np.sqrt(square + (0 if fault == "no epsilon" else eps))
        if fault != "epsilon outside the root"
        else 1 / (np.sqrt(square) + eps)
    )
    if fault == "no root":
        r = r**2
    if fault == "gamma of the next column":
        gamma = np.roll(gamma, 1, -1)
    y = x * r * (1 if fault == "no gamma" else 1 + gamma if fault == "gamma plus one" else gamma)
    return [y, 1 / r if fault == "not inverted" else r]


norm_cases = [
    (f32(5, 7), f32(7), 1e-1),
    (f32(2, 3, 4, 8), f32(4, 8), 1e-2),
    (f32(1, 1) * 0, f32(1), 1e-1),
    (f32(3, 128), f32(128), 1e-1),
    (f32(9), f32(9), 1e-1),
    (f32(3, 4096), f32(4096), 1e-6),
    (f32(0, 8), f32(8), 1e-6),
]
norm_faults = [
    "sum instead of mean",
    "no epsilon",
    "no gamma",
    "gamma plus one",
    "mean subtracted",
    "epsilon outside the root",
    "last axis only",
    "no root",
    "gamma of the next column",
    "not inverted",
]
half_faults = [fault for fault in norm_faults if fault not in ("no epsilon", "epsilon outside the root")]


def call_rms(x, g, e=1e-6):
    return torch_npu.npu_rms_norm(x, g, e)


check("rms_norm", call_rms, rms, norm_cases, norm_faults, 1e-5)
half_cases = [
    (bf16(2, 7168), bf16(7168), 1e-6),
    (bf16(5, 1536), f32(1536), 1e-6),  # x and gamma may differ so
    (f32(3, 64, 512).half(), f32(512), 1e-6),
    (bf16(3, 4, 6) + 1, bf16(4, 6), 1e-6),
]
check("rms_norm in 16 bits", call_rms, rms, half_cases, half_faults, 1e-2)
refused("rms_norm", lambda: call_rms(f32(3, 4).npu(), f32(5).npu()), "'gamma'")
refused("rms_norm", lambda: call_rms(f32(3, 4).npu(), f32(4).half().npu()), "'gamma'")
refused("rms_norm", lambda: call_rms(bf16(3, 4).npu(), f32(4).half().npu()), "'gamma'")
refused("rms_norm", lambda: call_rms(f32(3, 0).npu(), f32(0).npu()), "'gamma'")
refused("rms_norm", lambda: call_rms(torch.ones(3, 4, dtype=torch.int32).npu(), f32(4).npu()), "'x'")
refused("rms_norm", lambda: call_rms(f32(*[1] * 9).npu(), f32(1).npu()), "'x'")


def add_rms(case, fault):
    a, b = array(case[0]), array(case[1])
    x = a if fault == "no addition" else a - b if fault == "subtraction" else a + b
    y, r = rms((torch.tensor(x), *case[2:]), fault)
    return [y, r, a if fault == "sum not stored" else x]


def call_add_rms(a, b, g, e=1e-6):
    return torch_npu.npu_add_rms_norm(a, b, g, e)


add_cases = [(f32(5, 7), f32(5, 7), f32(7), 1e-1), (f32(2, 3, 8), f32(2, 3, 8), f32(3, 8), 1e-2)]
add_faults = ["no addition", "subtraction", "sum not stored"]
check("add_rms_norm", call_add_rms, add_rms, add_cases, [*norm_faults, *add_faults], 1e-5)
add_cases = [(bf16(3, 4096), bf16(3, 4096), bf16(4096), 1e-6), (bf16(2, 3, 8) + 1, bf16(2, 3, 8), bf16(3, 8), 1e-6)]
check("add_rms_norm in 16 bits", call_add_rms, add_rms, add_cases, [*half_faults, *add_faults], 1.5e-2)
refused("add_rms_norm", lambda: call_add_rms(f32(3, 4).npu(), f32(2, 4).npu(), f32(4).npu()), "'x2'")
refused("add_rms_norm", lambda: call_add_rms(f32(3, 4).npu(), bf16(3, 4).npu(), f32(4).npu()), "'x2'")
refused("add_rms_norm", lambda: call_add_rms(bf16(3, 4).npu(), bf16(3, 4).npu(), f32(4).npu()), "'gamma'")
refused("add_rms_norm", lambda: call_add_rms(f32(3, 4).npu(), f32(3, 4).npu(), f32(3).npu()), "'gamma'")
refused("add_rms_norm", lambda: call_add_rms(f32(3, 4).npu(), f32(3, 4).npu(), f32(4).npu(), -1.0), "'epsilon'")
empty = [(f32(0, 8), f32(0, 8), f32(8), 1e-6)]
if CANN >= (9, 0):
    check("add_rms_norm of nothing", call_add_rms, add_rms, [*empty, *add_cases], add_faults, 1.5e-2)
else:
    refused("add_rms_norm", lambda: call_add_rms(*(t.npu() for t in empty[0][:3])), "'x1'")


def swiglu(case, fault):
    axis = -1 if fault == "last axis always" else case[1]
    x = np.moveaxis(array(case[0]), axis, -1)
    a, b = np.split(x, 2, -1) if fault != "even and odd" else (x[..., ::2], x[..., 1::2])
    if fault == "halves swapped":
        a, b = b, a
    gate = {
        "no sigmoid": a,
        "sigmoid only": sigmoid(a),
        "gelu": a * sigmoid(1.702 * a),
        "relu": np.maximum(a, 0),
    }.get(fault, a * sigmoid(a))
    y = gate if fault == "no product" else gate + b if fault == "sum" else gate * b
    return [np.moveaxis(y, -1, axis)]


swiglu_cases = [
    (f32(5, 6), -1),
    (f32(4, 2), 0),
    (f32(2, 4, 6), 1),
    (f32(1, 2), -1),
    (f32(8), 0),
    (f32(3, 4096), -1),
    (f32(0, 6), -1),
]
swiglu_faults = [
    "halves swapped",
    "no sigmoid",
    "sigmoid only",
    "gelu",
    "relu",
    "no product",
    "sum",
    "even and odd",
    "last axis always",
]


def call_swiglu(x, d=-1):
    return [torch_npu.npu_swiglu(x, d)]


check("swiglu", call_swiglu, swiglu, swiglu_cases, swiglu_faults, 1e-5)
half_cases = [(bf16(3, 4096), -1), (bf16(4, 2), 0), (f32(5, 6144).half(), -1)]
check("swiglu in 16 bits", call_swiglu, swiglu, half_cases, swiglu_faults, 1.5e-2)
refused("swiglu", lambda: call_swiglu(f32(3, 5).npu()), "'dim'")
refused("swiglu", lambda: call_swiglu(f32(6, 4).npu().t()), "'x'")
refused("swiglu", lambda: call_swiglu(torch.ones(3, 4, dtype=torch.int32).npu()), "'x'")


def clipped(case, fault):
    x, groups, axis = array(case[0]), case[1], case[2] % case[0].dim()
    interleaved = case[3] ^ (fault == "the other split")
    alpha, limit, bias = 1.702, 2.0, 1.0
    flat = x.reshape(int(np.prod(x.shape[:axis])), -1)
    a, b = (flat[:, ::2], flat[:, 1::2]) if interleaved else np.split(flat, 2, -1)
    if fault != "gate not clipped":
        a = np.clip(a, -limit, limit) if fault == "gate clipped below" else np.minimum(a, limit)
    if fault != "up not clipped":
        b = np.minimum(b, limit) if fault == "up clipped above only" else np.clip(b, -limit, limit)
    gate = sigmoid((1 if fault == "no alpha" else alpha) * a) * (1 if fault == "sigmoid only" else a)
    if fault == "clipped behind the gate":
        a = np.split(flat, 2, -1)[0] if not interleaved else flat[:, ::2]
        gate = np.minimum(a * sigmoid(alpha * a), limit)
    y = gate * (b + (0 if fault == "no bias" else bias))
    return [y[: len(y) if groups is None else int(groups.sum()) - (fault == "a row too few")]]


def call_clipped(x, groups, dim, interleaved):
    y = torch_npu.npu_clipped_swiglu(x, group_index=groups, dim=dim, limit=2.0, interleaved=interleaved)
    half = [*x.shape]
    half[dim] //= 2
    assert [*y.shape] == half
    rows = y.flatten(0, dim % x.dim() - 1) if dim % x.dim() else y[None]
    return [rows.flatten(1)[: len(rows) if groups is None else int(groups.sum())]]


if A5 and CANN < (9, 1):
    refused("clipped_swiglu", lambda: call_clipped(f32(4, 6).npu(), None, -1, True), "does not exist on Ascend950")
else:
    check(
        "clipped_swiglu",
        call_clipped,
        clipped,
        [
            (f32(7, 6, scale=3), None, -1, True),
            (f32(9, 8, scale=3), None, -1, False),
            (f32(9, 8, scale=3), torch.tensor([3, 0, 4]), -1, True),
            (f32(3, 4, 5, scale=3), None, 1, False),
            (f32(6, 4, scale=3), torch.tensor([0] * 8191 + [5]), -1, True),
            (f32(6, scale=3), None, 0, True),
            (f32(3, 4096, scale=3), torch.tensor([2]), 1, False),
        ],
        [
            "the other split",
            "gate not clipped",
            "gate clipped below",
            "up not clipped",
            "up clipped above only",
            "no alpha",
            "no bias",
            "sigmoid only",
            "clipped behind the gate",
            "a row too few",
        ],
        1e-5,
    )
    refused("clipped_swiglu", lambda: call_clipped(f32(4, 5).npu(), None, -1, True), "'dim'")
    refused("clipped_swiglu", lambda: call_clipped(f32(6, 4).npu().t(), None, -1, True), "'x'")
    many = torch.zeros(8193, dtype=torch.int64)
    refused("clipped_swiglu", lambda: call_clipped(f32(4, 6).npu(), many.npu(), -1, True), "'group_index'")
    refused("clipped_swiglu", lambda: call_clipped(f32(4, 6).npu(), many[:2].int().npu(), -1, True), "'group_index'")
    refused("clipped_swiglu", lambda: torch_npu.npu_clipped_swiglu(f32(4, 6).npu(), limit=0.0), "'limit'")
    for groups in ([-1, 3], [2, 3]):  # negative; more rows than there are
        rows = torch.tensor(groups).npu()
        refused(
            "clipped_swiglu",
            lambda g=rows: torch_npu.npu_clipped_swiglu(f32(4, 6).npu(), group_index=g),
            "'group_index'",
        )
    assert torch_npu.npu_clipped_swiglu(f32(0, 6).npu()).cpu().shape == (0, 3)
    if A5:
        refused("clipped_swiglu", lambda: call_clipped(f32(4, 6).npu(), many[:0].npu(), -1, True), "'group_index'")
