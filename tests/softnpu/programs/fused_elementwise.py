"""Normalisation, activation, rotary and quantisation operators (see fused_check.py)."""

import numpy as np
import torch
import torch_npu
from fused_check import A5, array, bf16, check, f32, refused, sigmoid


def rms(case, fault):
    x, gamma, eps = array(case[0]), array(case[1]), case[2]
    axes = tuple(range(-gamma.ndim, 0))
    square = (x**2).sum(axes, keepdims=True) if fault == "sum instead of mean" else (x**2).mean(axes, keepdims=True)
    if fault == "mean subtracted":
        square = ((x - x.mean(axes, keepdims=True)) ** 2).mean(axes, keepdims=True)
    r = (
        1 / np.sqrt(square + (0 if fault == "no epsilon" else eps))
        if fault != "epsilon outside the root"
        else 1 / (np.sqrt(square) + eps)
    )
    y = x * r * (1 if fault == "no gamma" else 1 + gamma if fault == "gamma plus one" else gamma)
    return [y, r]


norm_cases = [
    (f32(5, 7), f32(7), 1e-1),
    (f32(2, 3, 4, 8), f32(4, 8), 1e-2),
    (f32(1, 1) * 0, f32(1), 1e-1),
    (f32(3, 128), f32(128), 1e-1),
]
norm_faults = [
    "sum instead of mean",
    "no epsilon",
    "no gamma",
    "gamma plus one",
    "mean subtracted",
    "epsilon outside the root",
]
check("rms_norm", lambda x, g, e: torch_npu.npu_rms_norm(x, g, e), rms, norm_cases, norm_faults, 1e-5)
refused("rms_norm", lambda: torch_npu.npu_rms_norm(f32(3, 4).npu(), f32(5).npu()), "gamma")
refused("rms_norm", lambda: torch_npu.npu_rms_norm(f32(3, 4).npu(), f32(4).half().npu()), "gamma")


def add_rms(case, fault):
    a, b = array(case[0]), array(case[1])
    x = a if fault == "no addition" else a - b if fault == "subtraction" else a + b
    y, r = rms((torch.tensor(x), *case[2:]), fault)
    return [y, r, a if fault == "sum not stored" else x]


add_cases = [(f32(5, 7), f32(5, 7), f32(7), 1e-1), (f32(2, 3, 8), f32(2, 3, 8), f32(3, 8), 1e-2)]
check(
    "add_rms_norm",
    lambda a, b, g, e: torch_npu.npu_add_rms_norm(a, b, g, e),
    add_rms,
    add_cases,
    [*norm_faults, "no addition", "subtraction", "sum not stored"],
    1e-5,
)
refused("add_rms_norm", lambda: torch_npu.npu_add_rms_norm(f32(3, 4).npu(), f32(2, 4).npu(), f32(4).npu()), "x2")


def swiglu(case, fault):
    a, b = np.split(array(case[0]), 2, axis=-1 if fault == "last axis always" else case[1])
    if fault == "halves swapped":
        a, b = b, a
    gate = {"no sigmoid": a, "sigmoid only": sigmoid(a), "gelu": a * sigmoid(1.702 * a)}.get(fault, a * sigmoid(a))
    return [gate * (1 if fault == "no product" else b)]


check(
    "swiglu",
    lambda x, d: [torch_npu.npu_swiglu(x, d)],
    swiglu,
    [(f32(5, 6), -1), (f32(4, 2), 0), (f32(2, 4, 6), 1), (f32(1, 2), -1)],
    ["halves swapped", "no sigmoid", "sigmoid only", "gelu", "no product", "last axis always"],
    1e-5,
)
refused("swiglu", lambda: torch_npu.npu_swiglu(f32(3, 5).npu()), "dim")


def clipped(case, fault):
    x, interleaved = array(case[0]), case[1] ^ (fault == "the other split")
    alpha, limit, bias = 1.702, 2.0, 1.0
    a, b = (x[:, ::2], x[:, 1::2]) if interleaved else np.split(x, 2, -1)
    a = (
        a
        if fault == "gate not clipped"
        else np.clip(a, -limit, limit)
        if fault == "gate clipped below"
        else np.minimum(a, limit)
    )
    b = (
        b
        if fault == "up not clipped"
        else np.minimum(b, limit)
        if fault == "up clipped above only"
        else np.clip(b, -limit, limit)
    )
    return [a * sigmoid((1 if fault == "no alpha" else alpha) * a) * (b + (0 if fault == "no bias" else bias))]


def call_clipped(x, i):
    return [torch_npu.npu_clipped_swiglu(x, limit=2.0, interleaved=i)]


if A5:
    refused("clipped_swiglu", lambda: call_clipped(f32(4, 6).npu(), True), "does not exist on Ascend950")
else:
    check(
        "clipped_swiglu",
        call_clipped,
        clipped,
        [(f32(7, 6, scale=3), True), (f32(9, 8, scale=3), False)],
        [
            "the other split",
            "gate not clipped",
            "gate clipped below",
            "up not clipped",
            "up clipped above only",
            "no alpha",
            "no bias",
        ],
        1e-5,
    )
    refused("clipped_swiglu", lambda: call_clipped(f32(4, 5).npu(), True), "dim")


def rotary(case, fault):
    x, cos, sin = (array(c) for c in case[:3])
    mode = case[3] if fault != "the other mode" else {"half": "interleave", "interleave": "half"}[case[3]]
    if mode == "half":
        a, b = np.split(x, 2, -1)
        turned = np.concatenate([-b, a], -1)
    else:
        turned = np.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
    if fault == "inverse":
        turned = -turned
    if fault == "cos and sin swapped":
        cos, sin = sin, cos
    if fault == "first position only":
        cos, sin = cos[:, :1] + 0 * cos, sin[:, :1] + 0 * sin
    return [x * (1 if fault == "no cos" else cos) + turned * (0 if fault == "no sin" else sin)]


rotary_faults = ["the other mode", "inverse", "cos and sin swapped", "no cos", "no sin", "first position only"]
check(
    "rotary_mul",
    lambda x, c, s, m: [torch_npu.npu_rotary_mul(x, c, s, m)],
    rotary,
    [
        (f32(2, 5, 3, 8), f32(1, 5, 1, 8), f32(1, 5, 1, 8), "half"),
        (f32(1, 4, 2, 6), f32(1, 4, 1, 6), f32(1, 4, 1, 6), "interleave"),
    ],
    rotary_faults,
    1e-5,
)
refused(
    "rotary_mul",
    lambda: torch_npu.npu_rotary_mul(f32(1, 2, 1, 898).npu(), f32(1, 2, 1, 898).npu(), f32(1, 2, 1, 898).npu()),
    "x",
)


def interleave_rope(case, fault):
    x = array(case[0])
    q = x if fault == "not regrouped" else np.concatenate([x[..., ::2], x[..., 1::2]], -1)
    c = tuple(torch.tensor(v) for v in (q, array(case[1]), array(case[2])))
    return rotary((*c, "half"), {"first position only": "no sin"}.get(fault, fault))


check(
    "interleave_rope",
    lambda x, c, s: [torch_npu.npu_interleave_rope(x, c, s)],
    interleave_rope,
    [(bf16(2, 3, 5, 64), bf16(2, 1, 5, 64), bf16(2, 1, 5, 64))],
    ["not regrouped", *rotary_faults[:5]],
    1e-2,
)
refused(
    "interleave_rope",
    lambda: torch_npu.npu_interleave_rope(bf16(1, 1, 1, 32).npu(), bf16(1, 1, 1, 32).npu(), bf16(1, 1, 1, 32).npu()),
    "x",
)
refused("interleave_rope", lambda: torch_npu.npu_interleave_rope(*(f32(1, 1, 1, 64).npu() for _ in range(3))), "x")
