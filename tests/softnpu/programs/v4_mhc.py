"""aclnnMhcPreSinkhorn (see fused_check.py)."""

import numpy as np
import torch
from dense_check import FAMILY, absent, empty, hf32, launch, refuse, rounded_hf32
from fused_check import A5, Steps, array, bf16, check, f32, same, sigmoid, softmax

EPS, NORM_EPS = 0.02, 0.5
NAME = "aclnnMhcPreSinkhorn"
STEPS = Steps(
    phi=hf32,
    rms=lambda flat: 1 / np.sqrt((flat**2).mean(-1, keepdims=True) + NORM_EPS),
    mixes=lambda product, r: product * r,
    bias=same,
    alpha=same,
    pre_eps=EPS,
    doubled=2,
    soft_eps=EPS,
    eps=EPS,
    rounds=20,
    rows_first=False,
    order=lambda pre, post: (pre, post),
)


def sinkhorn(logits, steps):
    m = softmax(logits) + steps.soft_eps
    sums, norms = [], [m]
    for i in range(steps.rounds):
        axes = ([-2] if i == 0 else [-1, -2]) if not steps.rows_first else [-1, -2]
        for axis in axes:
            total = m.sum(axis, keepdims=True) + steps.eps
            m = m / total
            sums.append(total.squeeze(axis)), norms.append(m)
    return m, sums, norms


def formula(case, steps):
    x, phi, alpha, bias = (array(c) for c in case)
    flat = x.reshape(*x.shape[:2], -1)
    r = steps.rms(flat)
    product = flat @ steps.phi(phi).T
    z, a, b = steps.mixes(product, r), steps.alpha(alpha), steps.bias(bias)
    pre, post = steps.order(z[..., :4], z[..., 4:8])
    pre = sigmoid(a[0] * pre + b[:4]) + steps.pre_eps
    post = sigmoid(a[1] * post + b[4:8]) * steps.doubled
    m, sums, norms = sinkhorn((a[2] * z[..., 8:] + b[8:]).reshape(*x.shape[:2], 4, 4), steps)
    return [
        (x * pre[..., None]).sum(-2), post, m.reshape(*x.shape[:2], 16), pre, product, r,
        np.stack(sums[:39]), np.stack(norms[:40]),
    ]  # fmt: skip


def outputs(x, backward):
    b, s, _, d = x.shape
    result = dict(hin=empty(b, s, d, dtype=x.dtype), h_post=empty(b, s, 4), h_res=empty(b, s, 16))
    if backward:
        result |= dict(h_pre=empty(b, s, 4), hc_before_norm=empty(b, s, 24),
                       inv_rms=empty(b, s, 1), sum_out=empty(40, b, s, 4),
                       norm_out=empty(40, b, s, 4, 4))  # fmt: skip
    return result


def arguments(x, phi, alpha, bias, backward=True):
    return dict(x=x, phi=phi, alpha=alpha, bias=bias, hc_mult=4, num_iters=20, hc_eps=EPS,
                norm_eps=NORM_EPS, need_backward=backward, **outputs(x, backward))  # fmt: skip


def call_all(*case):
    given = arguments(*case)
    launch(NAME, **given)
    assert torch.isnan(given["sum_out"][0]).all().item(), "the sum that does not exist is written"
    names = ("hin", "h_post", "h_res", "h_pre", "hc_before_norm", "inv_rms", "sum_out", "norm_out")
    return [given[name][1:] if name == "sum_out" else given[name] for name in names]


def call_forward(*case):
    given = arguments(*case, backward=False)
    launch(NAME, **given)
    return [given["hin"]]


def case(b, s, d, make=bf16):
    return make(b, s, 4, d), f32(24, 4 * d, scale=1 / d**0.5), f32(3) * 0.2 + 1, f32(24)


FAULTS = {
    "GEMM in full fp32": dict(phi=same),
    "phi rounded": dict(phi=rounded_hf32),
    "sum instead of mean": dict(
        rms=lambda flat: 1 / np.sqrt((flat**2).sum(-1, keepdims=True) + NORM_EPS)
    ),
    "no norm epsilon": dict(rms=lambda flat: 1 / np.sqrt((flat**2).mean(-1, keepdims=True))),
    "not normalised": dict(mixes=lambda product, r: product),
    "no bias": dict(bias=np.zeros_like),
    "no alpha": dict(alpha=np.ones_like),
    "no epsilon behind the gate": dict(pre_eps=0),
    "post not doubled": dict(doubled=1),
    "no epsilon behind softmax": dict(soft_eps=0),
    "no epsilon in the sums": dict(eps=0),
    "rows first": dict(rows_first=True),
    "pre and post swapped": dict(order=lambda pre, post: (post, pre)),
}


def without_hin(f):
    return lambda *given: f(*given)[1:]


def check_all():
    width = 4096 if A5 else 128
    cases = [case(1, 3, width), case(2, 2, width, lambda *s: f32(*s).half())]
    cases += [case(1, 2, 7168)] if A5 else [case(3, 1, 384)]
    check(NAME, without_hin(call_all), without_hin(formula), STEPS, cases, FAULTS, 3e-5)
    pre_faults = {
        name: FAULTS[name]
        for name in ("not normalised", "no bias", "no epsilon behind the gate", "no alpha")
    }
    only_hin = lambda *given: formula(*given)[:1]
    check(f"{NAME} hin", call_forward, only_hin, STEPS, cases, pre_faults, 1e-2)


def refuse_all():
    width = 4096 if A5 else 128
    base = case(1, 2, width)

    def good():
        return arguments(*base)

    x, phi, alpha, bias = base
    refuse(NAME, good, "'x'", x=x[0])
    refuse(NAME, good, "'x'", x=x.float())
    refuse(NAME, good, "'hcMult'", hc_mult=6)
    refuse(NAME, good, "'numIters'", num_iters=19)
    refuse(NAME, good, "'phi'", phi=phi[:8])
    refuse(NAME, good, "'phi'", phi=phi.bfloat16())
    refuse(NAME, good, "'alpha'", alpha=alpha[:2])
    refuse(NAME, good, "'bias'", bias=bias[:8])
    refuse(NAME, good, "'hin'", hin=empty(1, 2, width))
    refuse(NAME, good, "'hRes'", h_res=empty(1, 2, 4))
    refuse(NAME, good, "'hPre'", 161001, h_pre=None)
    refuse(NAME, good, "'sumOut'", sum_out=empty(39, 1, 2, 4))
    for wrong in (128, 4224) if A5 else (64, 100096):
        refuse(NAME, lambda wrong=wrong: arguments(*case(1, 1, wrong)), "'x'")
    none = case(0, 2, width)
    launch(NAME, **arguments(*none))
    torch.npu.synchronize()


if FAMILY:
    check_all()
    refuse_all()
else:
    absent(NAME, lambda: arguments(*case(1, 1, 4096)))
