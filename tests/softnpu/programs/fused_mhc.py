"""Hyper-connection operators (see fused_check.py)."""

import numpy as np
import torch_npu
from fused_check import A5, CANN, array, bf16, check, f32, refused, sigmoid, softmax


def sinkhorn(case, fault):
    x, rounds, eps = array(case[0]), case[1], case[2]
    rounds += {"a round too few": -1, "a round too many": 1}.get(fault, 0)
    m = softmax(x) if fault != "softmax over columns" else softmax(x.swapaxes(-1, -2)).swapaxes(-1, -2)
    if fault == "no softmax":
        m = np.exp(x)
    m = m + (0 if fault == "no epsilon behind softmax" else eps)
    eps = 0 if fault == "no epsilon" else eps
    for i in range(rounds):
        if i or fault == "rows first":
            m = m / (m.sum(-1, keepdims=True) + eps)
        if i + 1 < rounds or fault != "columns not last":
            m = m / (m.sum(-2, keepdims=True) + eps)
    return [m.swapaxes(-1, -2) if fault == "transposed" else m]


def call_sinkhorn(x, rounds, eps=1e-2, flag=0):
    return [torch_npu.npu_mhc_sinkhorn(x, eps=eps, num_iters=rounds, out_flag=flag)[0]]


def mhc_post(case, fault):
    x, res, out, post = (None if c is None else array(c) for c in case)
    if fault == "mixing unasked" and res is None:
        res = np.ones((*x.shape[:-1], x.shape[-2]))
    if res is not None:
        res = res if fault == "not transposed" else res.swapaxes(-1, -2)
    mixed = x if res is None or fault == "no mixing" else res @ x
    gate = np.roll(post, 1, -1) if fault == "streams rotated" else post
    gate = np.roll(post, 1, 0) if fault == "gates of another token" else gate
    branch = out[..., None, :] * (1 if fault == "no gate" else gate[..., None])
    if fault == "first stream only":
        branch = branch * (np.arange(x.shape[-2]) == 0)[:, None]
    if fault == "streams averaged":
        mixed = mixed.mean(-2, keepdims=True) + 0 * mixed
    return [(0 if fault == "no residual" else mixed) + (0 if fault == "no branch" else branch)]


def call_post(*case):
    return [torch_npu.npu_mhc_post(*case)]


def mhc_pre(case, fault):
    x, phi, alpha, bias, gamma = (None if c is None else array(c) for c in case[:5])
    n = x.shape[-2]
    flat = x.reshape(*x.shape[:-2], -1)
    square = (flat**2).sum(-1) if fault == "sum instead of mean" else (flat**2).mean(-1)
    r = 1 / np.sqrt(square + (0 if fault == "no norm epsilon" else 0.5))
    mix = (flat if gamma is None or fault == "no gamma" else (x * gamma).reshape(flat.shape)) @ phi.T
    z = mix * (1 if fault == "no norm" else r[..., None])
    pre, post, res = z[..., :n], z[..., n : 2 * n], z[..., 2 * n :]
    if fault == "pre and post swapped":
        pre, post = post, pre
    b = np.zeros_like(bias) if fault == "no bias" else bias
    a = np.ones(3) if fault == "no alpha" else alpha
    pre = sigmoid(a[0] * pre + b[:n]) + (0 if fault == "no epsilon" else 0.25)
    post = sigmoid(a[1] * post + b[n : 2 * n]) * (1 if fault == "post not doubled" else 2)
    post = post + (0.25 if (len(alpha) == 2) ^ (fault == "the other post") else 0)
    res = (a[2] * res + b[2 * n :]).reshape(*x.shape[:-2], n, n) if len(alpha) == 3 else np.zeros(1)
    if fault == "res transposed" and len(alpha) == 3:
        res = res.swapaxes(-1, -2)
    outputs = [(x * pre[..., None]).sum(-2), post, res]
    return outputs + ([r, mix if fault != "mix normalised" else z, pre] if case[5] else [])


def call_pre(x, phi, alpha, bias, gamma, flag):
    outputs = torch_npu.npu_mhc_pre(x, phi, alpha, bias, gamma=gamma, norm_eps=0.5, hc_eps=0.25, out_flag=flag)
    return outputs[: 6 if flag else 3]


def pre_case(rows, n, width, gamma=True, flag=0, alpha=3):
    heights = {3: n * n + 2 * n, 2: 2 * n}[alpha]
    phi = f32(heights, n * width, scale=2 / (n * width) ** 0.5)
    return bf16(*rows, n, width), phi, f32(alpha) + 2, f32(heights), f32(n, width) if gamma else None, flag


def check_sinkhorn():
    check(
        "mhc_sinkhorn",
        call_sinkhorn,
        sinkhorn,
        [
            (f32(5, 4, 4), 3, 1e-2),
            (f32(2, 3, 6, 6), 2, 1e-2),
            (f32(3, 8, 8), 1, 1e-2),
            (f32(1, 7, 4, 4, scale=3), 20, 1e-6),
            (f32(2, 4, 4), 100, 1e-2),
        ],
        [
            "a round too few",
            "a round too many",
            "softmax over columns",
            "no softmax",
            "no epsilon behind softmax",
            "no epsilon",
            "rows first",
            "columns not last",
            "transposed",
        ],
        1e-5,
    )
    for x, rounds, argument in [
        (f32(5, 5, 5), 3, "'x'"),
        (f32(5, 4, 6), 3, "'x'"),
        (f32(4, 4), 3, "'x'"),
        (f32(0, 4, 4), 3, "'x'"),
        (f32(5, 4, 4).half(), 3, "'x'"),
        (f32(5, 4, 4), 101, "'num_iters'"),
        (f32(5, 4, 4), 0, "'num_iters'"),
    ]:
        refused("mhc_sinkhorn", lambda x=x, r=rounds: call_sinkhorn(x.npu(), r), argument)
    refused("mhc_sinkhorn", lambda: call_sinkhorn(f32(5, 4, 4).npu(), 3, flag=1), "not emulated")


def post_case(rows, n, width, make=bf16):
    return make(*rows, n, width), f32(*rows, n, n), make(*rows, width), f32(*rows, n)


def refuse_post(argument, x=(5, 4, 128), res=(5, 4, 4), out=(5, 128), post=(5, 4)):
    """A good call with something replaced: a shape, or the tensor itself."""
    shapes = ((x, bf16), (res, f32), (out, bf16), (post, f32))
    case = [make(*what) if isinstance(what, tuple) else what for what, make in shapes]
    refused("mhc_post", lambda: call_post(*(None if c is None else c.npu() for c in case)), argument)


def check_post():
    cases = [
        post_case((5,), 4, 128),
        post_case((2, 3), 4, 256),
        post_case((3,), 4, 128, lambda *s: f32(*s).half()),
        post_case((2,), 4, 4096),
        post_case((2,), 4, 7168),
        post_case((1,), 4, 99968),
    ]
    faults = [
        "not transposed",
        "no mixing",
        "streams rotated",
        "gates of another token",
        "first stream only",
        "streams averaged",
        "no branch",
        "no residual",
        "no gate",
    ]
    if A5:
        cases += [post_case((3,), 6, 16), post_case((3,), 8, 33)]
    if A5 and CANN >= (9, 2):
        x, _, out, post = post_case((5,), 4, 128)
        cases, faults = [*cases, (x, None, out, post)], [*faults, "mixing unasked"]
    else:
        refuse_post("'h_res'", res=None)
    check("mhc_post", call_post, mhc_post, cases, faults, 1.5e-2)
    refuse_post("'x'", x=(5, 5, 128), res=(5, 5, 5), post=(5, 5))
    refuse_post("'x'", x=f32(5, 4, 128))
    refuse_post("'x'", x=(0, 4, 128), res=(0, 4, 4), out=(0, 128), post=(0, 4))
    refuse_post("'h_out'", out=(4, 128))
    refuse_post("'h_out'", out=f32(5, 128).half())
    refuse_post("'h_post'", post=(5, 3))
    refuse_post("'h_post'", post=bf16(5, 4))
    refuse_post("'h_res'", res=(5, 4, 5))
    refuse_post("'h_res'", res=bf16(5, 4, 4))
    if not A5:
        refuse_post("'x'", x=(5, 6, 128), res=(5, 6, 6), post=(5, 6))
        refuse_post("'x'", x=(5, 4, 64), out=(5, 64))
        refuse_post("'x'", x=(1, 4, 100096), res=(1, 4, 4), out=(1, 100096), post=(1, 4))


def refuse_pre(argument, case, **replaced):
    names = ("x", "phi", "alpha", "bias", "gamma", "flag")
    case = [replaced.get(name, value) for name, value in zip(names, case, strict=True)]
    refused("mhc_pre", lambda: call_pre(*(c.npu() if hasattr(c, "npu") else c for c in case)), argument)


def check_pre():
    cases = [
        pre_case((5,), 4, 128),
        pre_case((2, 3), 4, 256, flag=1),
        pre_case((2,), 4, 4096, gamma=False),
        pre_case((2,), 4, 7168, gamma=False),
        pre_case((1,), 4, 16384, gamma=False),
    ]
    if A5:
        cases += [pre_case((5,), 4, 16), pre_case((3,), 6, 16, gamma=False), pre_case((3,), 8, 48, flag=1)]
    else:
        refuse_pre("'x'", pre_case((3,), 6, 128))
        refuse_pre("'x'", pre_case((3,), 4, 64))
    if CANN >= (9, 2):
        cases += [pre_case((5,), 4, 128, alpha=2, flag=1)]
    else:
        refuse_pre("'alpha'", pre_case((5,), 4, 128, alpha=2))
    faults = [
        "sum instead of mean",
        "no norm epsilon",
        "no gamma",
        "no norm",
        "pre and post swapped",
        "no bias",
        "no alpha",
        "no epsilon",
        "post not doubled",
        "the other post",
        "res transposed",
        "mix normalised",
    ]
    check("mhc_pre", call_pre, mhc_pre, cases, faults, 1.5e-2)
    good = pre_case((5,), 4, 128)
    refuse_pre("'x'", pre_case((5,), 4, 24))
    refuse_pre("'x'", pre_case((5,), 5, 128))
    refuse_pre("'x'", good, x=f32(5, 4, 128))
    if A5:
        refuse_pre("'x'", pre_case((1,), 4, 16400, gamma=False))
    refuse_pre("'phi'", good, phi=f32(24, 511))
    refuse_pre("'phi'", good, phi=f32(23, 512))
    refuse_pre("'phi'", good, phi=bf16(24, 512))
    refuse_pre("'alpha'", good, alpha=bf16(3))
    refuse_pre("'bias'", good, bias=f32(23))
    refuse_pre("'gamma'", good, gamma=f32(4, 127))
    refuse_pre("'gamma'", good, gamma=bf16(4, 128))


if A5 and CANN >= (9, 0):
    check_sinkhorn()
else:
    refused("mhc_sinkhorn", lambda: call_sinkhorn(f32(5, 4, 4).npu(), 3), "does not exist")
if CANN >= (9, 2) or (A5 and CANN >= (9, 0)):
    check_pre()
if CANN >= (9, 1) or (A5 and CANN >= (9, 0)):
    check_post()
else:
    refuse_post("does not exist before CANN")
