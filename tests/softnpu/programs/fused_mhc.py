"""Hyper-connection operators (see fused_check.py)."""

import numpy as np
import torch_npu
from fused_check import A5, CANN, Steps, array, bf16, check, f32, refused, same, sigmoid, softmax


def turned(x):
    return x.swapaxes(-1, -2)


SINKHORN = Steps(
    rounds=0,  # more than asked for
    softmax=softmax,
    first_eps=1,
    eps=1,
    rows=lambda i: i > 0,
    columns=lambda i, rounds: True,
    result=same,
)


def sinkhorn(case, steps):
    x, rounds, eps = array(case[0]), case[1] + steps.rounds, case[2]
    m = steps.softmax(x) + steps.first_eps * eps
    for i in range(rounds):
        if steps.rows(i):
            m = m / (m.sum(-1, keepdims=True) + steps.eps * eps)
        if steps.columns(i, rounds):
            m = m / (m.sum(-2, keepdims=True) + steps.eps * eps)
    return [steps.result(m)]


def call_sinkhorn(x, rounds, eps=1e-2, flag=0):
    return [torch_npu.npu_mhc_sinkhorn(x, eps=eps, num_iters=rounds, out_flag=flag)[0]]


POST = Steps(
    res=turned,
    no_res=lambda x: x,
    mixed=lambda res, x: res @ x,
    gate=same,
    gated=lambda out, gate: out[..., None, :] * gate[..., None],
    residual=same,
)


def mhc_post(case, steps):
    x, res, out, post = (None if c is None else array(c) for c in case)
    mixed = steps.no_res(x) if res is None else steps.mixed(steps.res(res), x)
    return [steps.residual(mixed) + steps.gated(out, steps.gate(post))]


POST_FAULTS = {
    "not transposed": dict(res=same),
    "no mixing": dict(mixed=lambda res, x: x),
    "streams rotated": dict(gate=lambda gate: np.roll(gate, 1, -1)),
    "gates of another token": dict(gate=lambda gate: np.roll(gate, 1, 0)),
    "no gate": dict(gated=lambda out, gate: out[..., None, :] * np.ones_like(gate)[..., None]),
    "first stream only": dict(gate=lambda gate: gate * (np.arange(gate.shape[-1]) == 0)),
    "streams averaged": dict(residual=lambda mixed: mixed.mean(-2, keepdims=True) + 0 * mixed),
    "no residual": dict(residual=np.zeros_like),
    "no branch": dict(gated=lambda out, gate: 0),
    "mixing unasked": dict(no_res=lambda x: np.ones((*x.shape[:-1], x.shape[-2])) @ x),
}


def call_post(*case):
    return [torch_npu.npu_mhc_post(*case)]


PRE = Steps(
    square=lambda flat: (flat**2).mean(-1),
    norm_eps=0.5,
    gamma=lambda x, gamma: x * gamma,
    normed=lambda mix, r: mix * r[..., None],
    order=lambda pre, post: (pre, post),
    bias=same,
    alpha=same,
    eps=0.25,
    doubled=2,
    post_eps=lambda post, values: post + (0.25 if values == 2 else 0),
    res=same,
    shown=lambda mix, z: mix,
)


def mhc_pre(case, steps):
    x, phi, alpha, bias, gamma = (None if c is None else array(c) for c in case[:5])
    n = x.shape[-2]
    flat = x.reshape(*x.shape[:-2], -1)
    r = 1 / np.sqrt(steps.square(flat) + steps.norm_eps)
    mix = (flat if gamma is None else steps.gamma(x, gamma).reshape(flat.shape)) @ phi.T
    z = steps.normed(mix, r)
    pre, post = steps.order(z[..., :n], z[..., n : 2 * n])
    a, b = steps.alpha(alpha), steps.bias(bias)
    pre = sigmoid(a[0] * pre + b[:n]) + steps.eps
    post = steps.post_eps(sigmoid(a[1] * post + b[n : 2 * n]) * steps.doubled, len(alpha))
    res = np.zeros(1)
    if len(alpha) == 3:
        res = steps.res((a[2] * z[..., 2 * n :] + b[2 * n :]).reshape(*x.shape[:-2], n, n))
    outputs = [(x * pre[..., None]).sum(-2), post, res]
    return outputs + ([r, steps.shown(mix, z), pre] if case[5] else [])


PRE_FAULTS = {
    "sum instead of mean": dict(square=lambda flat: (flat**2).sum(-1)),
    "no norm epsilon": dict(norm_eps=0),
    "no gamma": dict(gamma=same),
    "no norm": dict(normed=same),
    "pre and post swapped": dict(order=lambda pre, post: (post, pre)),
    "no bias": dict(bias=np.zeros_like),
    "no alpha": dict(alpha=lambda alpha: np.ones(3)),
    "no epsilon": dict(eps=0),
    "post not doubled": dict(doubled=1),
    "the other post": dict(post_eps=lambda post, values: post + (0.25 if values == 3 else 0)),
    "res transposed": dict(res=turned),
    "mix normalised": dict(shown=lambda mix, z: z),
}


def call_pre(x, phi, alpha, bias, gamma, flag):
    outputs = torch_npu.npu_mhc_pre(
        x, phi, alpha, bias, gamma=gamma, norm_eps=0.5, hc_eps=0.25, out_flag=flag
    )
    return outputs[: 6 if flag else 3]


def pre_case(rows, n, width, gamma=True, flag=0, alpha=3):
    heights = {3: n * n + 2 * n, 2: 2 * n}[alpha]
    phi = f32(heights, n * width, scale=2 / (n * width) ** 0.5)
    return (
        bf16(*rows, n, width),
        phi,
        f32(alpha) + 2,
        f32(heights),
        f32(n, width) if gamma else None,
        flag,
    )


def check_sinkhorn():
    check(
        "mhc_sinkhorn",
        call_sinkhorn,
        sinkhorn,
        SINKHORN,
        [
            (f32(5, 4, 4), 3, 1e-2),
            (f32(2, 3, 6, 6), 2, 1e-2),
            (f32(3, 8, 8), 1, 1e-2),
            (f32(1, 7, 4, 4, scale=3), 20, 1e-6),
            (f32(2, 4, 4), 100, 1e-2),
        ],
        {
            "a round too few": dict(rounds=-1),
            "a round too many": dict(rounds=1),
            "softmax over columns": dict(softmax=lambda x: turned(softmax(turned(x)))),
            "no softmax": dict(softmax=np.exp),
            "no epsilon behind softmax": dict(first_eps=0),
            "no epsilon": dict(eps=0),
            "rows first": dict(rows=lambda i: True),
            "columns not last": dict(columns=lambda i, rounds: i + 1 < rounds),
            "transposed": dict(result=turned),
        },
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
    refused(
        "mhc_post", lambda: call_post(*(None if c is None else c.npu() for c in case)), argument
    )


def check_post():
    cases = [
        post_case((5,), 4, 128),
        post_case((2, 3), 4, 256),
        post_case((3,), 4, 128, lambda *s: f32(*s).half()),
        post_case((2,), 4, 4096),
        post_case((2,), 4, 7168),
        post_case((1,), 4, 99968),
    ]
    faults = {name: replaced for name, replaced in POST_FAULTS.items() if name != "mixing unasked"}
    if A5:
        cases += [post_case((3,), 6, 16), post_case((3,), 8, 33)]
    if A5 and CANN >= (9, 2):
        x, _, out, post = post_case((5,), 4, 128)
        cases, faults = [*cases, (x, None, out, post)], POST_FAULTS
    else:
        refuse_post("'h_res'", res=None)
    check("mhc_post", call_post, mhc_post, POST, cases, faults, 1.5e-2)
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
    refused(
        "mhc_pre", lambda: call_pre(*(c.npu() if hasattr(c, "npu") else c for c in case)), argument
    )


def check_pre():
    cases = [
        pre_case((5,), 4, 128),
        pre_case((2, 3), 4, 256, flag=1),
        pre_case((2,), 4, 4096, gamma=False),
        pre_case((2,), 4, 7168, gamma=False),
        pre_case((1,), 4, 16384, gamma=False),
    ]
    if A5:
        cases += [
            pre_case((5,), 4, 16),
            pre_case((3,), 6, 16, gamma=False),
            pre_case((3,), 8, 48, flag=1),
        ]
    else:
        refuse_pre("'x'", pre_case((3,), 6, 128))
        refuse_pre("'x'", pre_case((3,), 4, 64))
    if CANN >= (9, 2):
        cases += [pre_case((5,), 4, 128, alpha=2, flag=1)]
    else:
        refuse_pre("'alpha'", pre_case((5,), 4, 128, alpha=2))
    check("mhc_pre", call_pre, mhc_pre, PRE, cases, PRE_FAULTS, 1.5e-2)
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
