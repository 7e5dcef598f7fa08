"""RMS norms of a sum, by 1 + gamma and with given scales (see fused_check.py)."""

import numpy as np
import torch
import torch_npu
from dense_check import STEP, empty, int8_rows, launch, refuse, shown_int8
from fused_check import A5, Steps, array, bf16, check, f32, rng, same

I8, I32 = torch.int8, torch.int32
EPS = 0.25


def f16(*shape):
    return f32(*shape).half()


NORM = Steps(
    sum=lambda a, b: a + b,
    rounded=same,
    axes=lambda gamma: tuple(range(-gamma.ndim, 0)),
    mean=lambda x, axes: (x**2).mean(axes, keepdims=True),
    epsilon=EPS,
    gamma=same,
    weigh=lambda y, gamma: y * gamma,
    beta=lambda y, beta: y if beta is None else y + beta,
    scale=lambda y, scale: y / scale,
    shift=lambda y, zero: y if zero is None else y + zero,
    whole=lambda y: np.clip(np.rint(y), -128, 127) * STEP,
    rows=int8_rows,
    smooth=lambda y, smooth: y if smooth is None else y * smooth,
)
FAULTS = {
    "no epsilon": dict(epsilon=0),
    "sum of squares": dict(mean=lambda x, axes: (x**2).sum(axes, keepdims=True)),
    "largest square": dict(mean=lambda x, axes: (x**2).max(axes, keepdims=True)),
    "gamma ignored": dict(weigh=lambda y, gamma: y),
    "gamma divides": dict(weigh=lambda y, gamma: y / (gamma + 0.1)),
    "no norm": dict(mean=lambda x, axes: 1 - EPS + 0 * x),
}


def normed(x, gamma, steps):
    x = steps.rounded(x)
    r = 1 / np.sqrt(steps.mean(x, steps.axes(gamma)) + steps.epsilon)
    return steps.weigh(x * r, steps.gamma(gamma)), r


def optional(x):
    return None if x is None else array(x)


def gemma(case, steps):
    y, r = normed(array(case[0]), array(case[1]), steps)
    return [y, r]


check(
    "npu_gemma_rms_norm",
    lambda x, gamma: torch_npu.npu_gemma_rms_norm(x, gamma, EPS),
    gemma,
    NORM.but(gamma=lambda gamma: 1 + gamma),
    [(f32(3, 64), f32(64)), (f32(2, 3, 32), f32(32)), (f32(4, 2, 16), f32(2, 16))],
    FAULTS
    | {
        "plain gamma": dict(gamma=same),
        "gamma minus one": dict(gamma=lambda gamma: gamma - 1),
        "the last axis alone": dict(axes=lambda gamma: (-1,)),
    },
    1e-5,
)


def in_place(case, steps):
    total = steps.sum(array(case[0]), array(case[1]))
    y, r = normed(total, array(case[2]), steps)
    return [r, y, total]


SUM_FAULTS = {
    "difference": dict(sum=lambda a, b: a - b),
    "first alone": dict(sum=lambda a, b: a),
}
check(
    "npu_add_rms_norm_v2_functional",
    lambda a, b, gamma: torch_npu.npu_add_rms_norm_v2_functional(a, b, gamma, EPS),
    in_place,
    NORM,
    [(f32(3, 64), f32(3, 64), f32(64)), (f32(2, 3, 32), f32(2, 3, 32), f32(32)),
     (f32(1, 128), f32(1, 128), f32(128))],
    FAULTS | SUM_FAULTS,
    1e-5,
)  # fmt: skip


def scaled(y, scale, zero, steps):
    return steps.whole(steps.shift(steps.scale(y, scale), zero))


def sum_quant(case, steps):
    a, b, gamma, scale, zero, beta, second, second_zero = (optional(x) for x in case)
    total = steps.sum(a, b)
    y = steps.beta(normed(total, gamma, steps)[0], beta)
    results = [scaled(y, scale, zero, steps), total]
    return results if second is None else [*results, scaled(y, second, second_zero, steps)]


def call_sum_quant(a, b, gamma, scale, zero, beta, second, second_zero):
    y1, y2, total = torch_npu.npu_add_rms_norm_quant(
        a, b, gamma, scale, zero, beta, second, second_zero, axis=-1, epsilon=EPS
    )
    results = [y1.float() * STEP, total]
    return results if second is None else [*results, y2.float() * STEP]


def scales(*shape):
    return torch.tensor(rng.uniform(0.02, 0.05, shape), dtype=torch.float32)


def zeros(*shape):
    return torch.tensor(rng.integers(-9, 10, shape), dtype=I32)


# Halves of small whole numbers: their sums are exact in fp16.
def halves(*shape):
    return torch.tensor(rng.integers(-8, 9, shape) / 2).half()


QUANT_FAULTS = SUM_FAULTS | {
    "scale multiplies": dict(scale=lambda y, scale: y * scale),
    "no scale": dict(scale=lambda y, scale: y),
    "no zero point": dict(shift=lambda y, zero: y),
    "zero point subtracted": dict(shift=lambda y, zero: y if zero is None else y - zero),
    "cut, not rounded": dict(whole=lambda y: np.clip(np.trunc(y), -128, 127) * STEP),
    "not saturated": dict(whole=lambda y: np.rint(y) * STEP),
}
sum_cases = [
    (halves(4, 32), halves(4, 32), halves(32), scales(32), zeros(32), None, None, None),
    (halves(3, 64), halves(3, 64), halves(64), scales(64) / 9, None, halves(64), None, None),
    (halves(2, 3, 32), halves(2, 3, 32), halves(32), scales(32), zeros(32), None, scales(32),
     zeros(32)),
]  # fmt: skip
check("npu_add_rms_norm_quant", call_sum_quant, sum_quant, NORM, sum_cases,
      FAULTS | QUANT_FAULTS | {"no beta": dict(beta=lambda y, beta: y)}, 5e-5)  # fmt: skip


def sum_dynamic(case, steps):
    a, b, gamma, smooth, second, beta = (optional(x) for x in case)
    total = steps.sum(a, b)
    y = steps.beta(normed(total, gamma, steps)[0], beta)
    results = [total, *steps.rows(steps.smooth(y, smooth))]
    return results if second is None else [*results, *steps.rows(steps.smooth(y, second))]


def call_sum_dynamic(a, b, gamma, smooth, second, beta):
    y1, y2, total, s1, s2 = torch_npu.npu_add_rms_norm_dynamic_quant(
        a, b, gamma, smooth_scale1=smooth, smooth_scale2=second, beta=beta, epsilon=EPS
    )
    results = [total, *shown_int8(y1, s1)]
    return results if second is None else [*results, *shown_int8(y2, s2)]


check(
    "npu_add_rms_norm_dynamic_quant",
    call_sum_dynamic,
    sum_dynamic,
    NORM,
    [(halves(4, 32), halves(4, 32), f16(32), None, None, None),
     (halves(3, 64), halves(3, 64), f16(64), f16(64), None, f16(64)),
     (halves(2, 3, 32), halves(2, 3, 32), f16(32), f16(32), f16(32), None)],
    FAULTS | SUM_FAULTS | {
        "no smooth scale": dict(smooth=lambda y, smooth: y),
        "no beta": dict(beta=lambda y, beta: y),
        "scale by 128": dict(rows=lambda y: int8_rows(y * 127 / 128)),
        "no epsilon": dict(epsilon=0),
    },
    2e-4,
)  # fmt: skip


def given_quant(case, steps):
    x, gamma, beta, scale, offset = (array(c) for c in case)
    y = steps.beta(normed(x, gamma, steps)[0], beta)
    return [scaled(y, scale, offset, steps)]


def call_given_quant(x, gamma, beta, scale, offset):
    y = empty(*x.shape, dtype=I8)
    launch("aclnnRmsNormQuant", x=x, gamma=gamma, beta=beta, scale=scale, offset=offset,
           epsilon=EPS, y=y)  # fmt: skip
    return [y.float() * STEP]


def offset(*shape):
    return torch.tensor(rng.integers(-9, 10, shape), dtype=I8)


check(
    "aclnnRmsNormQuant",
    call_given_quant,
    given_quant,
    NORM,
    [(f16(4, 32), f16(32), f16(32), scales(1).half(), offset(1)),
     (bf16(3, 64), bf16(64), bf16(64), scales(1).bfloat16(), offset(1)),
     (f16(2, 3, 32), f16(32), f16(32), scales(1).half() / 9, offset(1))],
    FAULTS | {k: v for k, v in QUANT_FAULTS.items() if k not in SUM_FAULTS}
    | {"no beta": dict(beta=lambda y, beta: y)},
    5e-5,
)  # fmt: skip


def good_gemma():
    return dict(x=f32(3, 64), gamma=f32(64), epsilon=EPS, y=empty(3, 64), rstd=empty(3, 1))


refuse("aclnnGemmaRmsNorm", good_gemma, "'gamma'", 561002, gamma=f32(63))
refuse("aclnnGemmaRmsNorm", good_gemma, "'gamma'", gamma=f16(64))
refuse("aclnnGemmaRmsNorm", good_gemma, "'x'", 161001, x=None)


def good_sum_quant():
    return dict(
        x1=f16(4, 32), x2=f16(4, 32), gamma=f16(32), scales1=scales(32), scales2=None,
        zero_points1=zeros(32), zero_points2=None, axis=-1, epsilon=EPS, div_mode=True,
        y1=empty(4, 32, dtype=I8), y2=empty(4, 32, dtype=I8), sum=empty(4, 32, dtype=torch.half),
    )  # fmt: skip


refuse("aclnnAddRmsNormQuant", good_sum_quant, "'x2'", x2=f16(3, 32))
refuse("aclnnAddRmsNormQuant", good_sum_quant, "'gamma'", gamma=bf16(32))
refuse("aclnnAddRmsNormQuant", good_sum_quant, "'scales1'", scales1=scales(31))
refuse("aclnnAddRmsNormQuant", good_sum_quant, "'zeroPoints1'", zero_points1=f16(32))
if not A5:
    refuse("aclnnAddRmsNormQuant", good_sum_quant, "'divMode'", div_mode=False)
