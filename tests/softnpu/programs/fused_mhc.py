"""Hyper-connection operators (see fused_check.py)."""

import os

import numpy as np
import torch_npu
from fused_check import A5, array, bf16, check, f32, refused, sigmoid, softmax


def sinkhorn(case, fault):
    x, rounds = array(case[0]), case[1] - (fault == "a round too few")
    m = softmax(x) + 1e-2 if fault != "softmax over columns" else softmax(x.swapaxes(-1, -2)).swapaxes(-1, -2) + 1e-2
    if fault == "no softmax":
        m = np.exp(x) + 1e-2
    eps = 0 if fault == "no epsilon" else 1e-2
    for i in range(rounds):
        if i or fault == "rows first":
            m = m / (m.sum(-1, keepdims=True) + eps)
        m = m / (m.sum(-2, keepdims=True) + eps)
    return [m.swapaxes(-1, -2) if fault == "transposed" else m]


def mhc_post(case, fault):
    x, res, out, post = (array(c) for c in case)
    res = res if fault == "not transposed" else res.swapaxes(-1, -2)
    mixed = x if fault == "no mixing" else res @ x
    gate = np.roll(post, 1, -1) if fault == "streams rotated" else post
    if fault == "no branch":
        return [mixed]
    return [
        (0 if fault == "no residual" else mixed) + out[..., None, :] * (1 if fault == "no gate" else gate[..., None])
    ]


def mhc_pre(case, fault):
    x, phi, alpha, bias, gamma = (array(c) for c in case)
    n = x.shape[-2]
    flat = x.reshape(*x.shape[:-2], -1)
    r = 1 / np.sqrt((flat**2).mean(-1, keepdims=True) + (0 if fault == "no norm epsilon" else 0.5))
    z = (flat if fault == "no gamma" else (x * gamma).reshape(flat.shape)) @ phi.T * (1 if fault == "no norm" else r)
    pre, post, res = z[..., :n], z[..., n : 2 * n], z[..., 2 * n :]
    if fault == "pre and post swapped":
        pre, post = post, pre
    b = np.zeros_like(bias) if fault == "no bias" else bias
    a = np.ones(3) if fault == "no alpha" else alpha
    pre = sigmoid(a[0] * pre + b[:n]) + (0 if fault == "no epsilon" else 0.25)
    post = sigmoid(a[1] * post + b[n : 2 * n]) * (1 if fault == "post not doubled" else 2)
    res = (a[2] * res + b[2 * n :]).reshape(*x.shape[:-2], n, n)
    return [(x * pre[..., None]).sum(-2), post, res]


def call_sinkhorn(x, rounds):
    return [torch_npu.npu_mhc_sinkhorn(x, eps=1e-2, num_iters=rounds)[0]]


def call_pre(x, phi, alpha, bias, gamma):
    return torch_npu.npu_mhc_pre(x, phi, alpha, bias, gamma=gamma, norm_eps=0.5, hc_eps=0.25)[:3]


if A5:
    check(
        "mhc_sinkhorn",
        call_sinkhorn,
        sinkhorn,
        [(f32(5, 4, 4), 3), (f32(2, 3, 6, 6), 2)],
        ["a round too few", "softmax over columns", "no softmax", "no epsilon", "rows first", "transposed"],
        1e-5,
    )
    refused("mhc_sinkhorn", lambda: call_sinkhorn(f32(5, 5, 5).npu(), 3), "x")
    refused("mhc_sinkhorn", lambda: call_sinkhorn(f32(5, 4, 4).npu(), 101), "num_iters")
    check(
        "mhc_post",
        lambda *a: [torch_npu.npu_mhc_post(*a)],
        mhc_post,
        [(bf16(5, 4, 16), f32(5, 4, 4), bf16(5, 16), f32(5, 4))],
        ["not transposed", "no mixing", "streams rotated", "no branch", "no residual", "no gate"],
        1.5e-2,
    )
if A5 and os.environ.get("SOFTNPU_CANN", "8") >= "9":  # torch_npu wants this CANN for it
    check(
        "mhc_pre",
        call_pre,
        mhc_pre,
        [(bf16(5, 4, 16), f32(24, 64, scale=0.3), f32(3) + 2, f32(24), f32(4, 16))],
        [
            "no norm epsilon",
            "no gamma",
            "no norm",
            "pre and post swapped",
            "no bias",
            "no alpha",
            "no epsilon",
            "post not doubled",
        ],
        1.5e-2,
    )
else:
    refused("mhc_sinkhorn", lambda: call_sinkhorn(f32(5, 4, 4).npu(), 3), "does not exist on Ascend910")
