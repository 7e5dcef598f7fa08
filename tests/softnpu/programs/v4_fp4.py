"""FLOAT4_E2M1 results of the norm and of the rotation on A5 (see fused_check.py)."""

import numpy as np
import torch
import v4_norm_quant as norms
from aclnn import typed
from dense_check import FAMILY, e8m0, empty, launch, refuse
from fused_check import A5, Steps, bf16, check, same

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
EVEN = np.array([0, 2, 4, 6, 1, 3, 5, 7])  # of two equally near values the even code
STEPS = Steps(**vars(norms.NORM), low_first=True, nearest=lambda v: v, rotation=same)


def to_codes(v):
    """The nearest code, ties to the even one."""
    distance = np.abs(np.minimum(np.abs(v), 6)[..., None] - VALUES[EVEN])
    return EVEN[distance.argmin(-1)] + 8 * np.signbit(v)


def fp4_rows(y, steps):
    blocks = y.reshape(*y.shape[:-1], -1, steps.block)
    exponent = np.floor(np.log2(np.abs(blocks).max(-1))) - 2
    codes = to_codes(steps.nearest(blocks * np.exp2(-exponent)[..., None])).reshape(y.shape)
    pairs = codes.reshape(*y.shape[:-1], -1, 2)
    low, high = (0, 1) if steps.low_first else (1, 0)
    per_32 = exponent.repeat(steps.block // 32, -1)
    return [per_32.reshape(*y.shape[:-1], -1, 2), pairs[..., low] + 16.0 * pairs[..., high]]


def norm(case, steps):
    return fp4_rows(norms.normed((*case, None, None), steps), steps)


def call_norm(x, gamma):
    packed = empty(*x.shape[:-1], x.shape[-1] // 2, dtype=torch.uint8)
    given = norms.mx_arguments(x, gamma, None, 0, rstd=False)
    launch("aclnnRmsNormDynamicMxQuant", **{**given, "y": typed(packed, 40), "dst_type": 40})
    return [e8m0(given["mxscale"]), packed]


def rotate(case, steps):
    x, rotation = case
    turned = norms.rotated(x, rotation, norms.ROTATE.but(rotation=steps.rotation))
    return fp4_rows(turned, steps)


def call_rotate(x, rotation):
    packed = empty(*x.shape[:-1], x.shape[-1] // 2, dtype=torch.uint8)
    given = norms.rotate_mx_arguments(x, rotation, None, 0)
    launch("aclnnRotateQuant", **{**given, "y": typed(packed, 40)})
    return [e8m0(given["scale"]), packed]


def check_fp4():
    faults = {
        "the odd value in the low half": dict(low_first=False),
        "cut off": dict(nearest=np.trunc),
        "blocks of 64": dict(block=64),
    }
    norm_faults = faults | {"no gamma": dict(gamma=lambda y, gamma: y)}
    cases = [(bf16(5, 256), bf16(256)), (bf16(2, 3, 64), bf16(64))]
    check("aclnnRmsNormDynamicMxQuant, FP4", call_norm, norm, STEPS, cases, norm_faults, 1e-4)
    rotate_faults = faults | {"rotation transposed": dict(rotation=lambda r: r.T)}
    cases = [(norms.grid(5, 256), norms.grid(64, 64)), (norms.grid(3, 128), norms.hadamard(128))]
    check("aclnnRotateQuant, FP4", call_rotate, rotate, STEPS, cases, rotate_faults, 1e-4)

    def good():
        packed = typed(empty(3, 64, dtype=torch.uint8), 40)
        return {**norms.rotate_mx_arguments(bf16(3, 128), norms.hadamard(64), None, 0), "y": packed}

    refuse("aclnnRotateQuant", good, "'scaleAlg'", scale_alg=1)
    refuse("aclnnRotateQuant", good, "'dstTypeMax'", scale_alg=2)
    launch("aclnnRotateQuant", **{**good(), "scale_alg": 2, "dst_type_max": 7.0})


if FAMILY and A5:
    check_fp4()
