"""Norms, rotations and casts that quantise in one call (see fused_check.py)."""

import numpy as np
import torch
from dense_check import (
    FAMILY,
    absent,
    as_bf16,
    as_e4m3,
    as_f16,
    e8m0,
    empty,
    from_fp8,
    int8_rows,
    launch,
    refuse,
    round_up_exponent,
    shown_int8,
)
from fused_check import A5, Steps, array, bf16, check, f32, rng, same

BF16, F16, I8 = torch.bfloat16, torch.float16, torch.int8
E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
EPS = 0.25


def f16(*shape):
    return f32(*shape).half()


NORM = Steps(
    rms=lambda x: 1 / np.sqrt((x**2).mean(-1, keepdims=True) + EPS),
    gamma=lambda y, gamma: y * gamma,
    beta=lambda y, beta: y + beta,
    smooth=lambda y, smooth: y * smooth,
    rounded=same,
    rows=int8_rows,
    exponents=lambda peak, algorithm: (
        round_up_exponent(peak / 448) if algorithm == 1 else np.floor(np.log2(peak)) - 8
    ),
    block=32,
    rstd=same,
)


def normed(case, steps):
    x, gamma, smooth, beta = (None if c is None else array(c) for c in case[:4])
    y = steps.gamma(x * steps.rms(x), gamma)
    if beta is not None:
        y = steps.beta(y, beta)
    return steps.rounded(y if smooth is None else steps.smooth(y, smooth))


def norm_int8(case, steps):
    return steps.rows(normed(case, steps))


def norm_arguments(x, gamma, smooth, beta):
    return dict(x=x, gamma=gamma, smooth_scales=smooth, beta=beta, epsilon=EPS, dst_type=2,
                y=empty(*x.shape, dtype=I8), scale=empty(*x.shape[:-1]))  # fmt: skip


def call_norm_int8(*case):
    given = norm_arguments(*case)
    launch("aclnnRmsNormDynamicQuant", **given)
    return shown_int8(given["y"], given["scale"])


NORM_FAULTS = {
    "sum instead of mean": dict(rms=lambda x: 1 / np.sqrt((x**2).sum(-1, keepdims=True) + EPS)),
    "no epsilon": dict(rms=lambda x: 1 / np.sqrt((x**2).mean(-1, keepdims=True))),
    "no norm": dict(rms=np.ones_like),
    "no gamma": dict(gamma=lambda y, gamma: y),
    "rounded to bf16 before": dict(rounded=as_bf16),
    "no beta": dict(beta=lambda y, beta: y),
}


def check_norm_int8():
    name = "aclnnRmsNormDynamicQuant"
    cases = [
        (bf16(3, 1536), bf16(1536), None, None),  # q_norm of Flash
        (bf16(2, 3, 96), bf16(96), bf16(96), None),
        (f16(4, 64), f16(64), f16(64), f16(64)),
        (bf16(1, 8192), bf16(8192), None, bf16(8192)),
    ]
    faults = NORM_FAULTS | {
        "no smooth scale": dict(smooth=lambda y, smooth: y),
        "smooth before beta": dict(beta=lambda y, beta: y + 2 * beta),
        "scale by 128": dict(rows=lambda y: int8_rows(y * 127 / 128)),
        "scale of the tensor": dict(
            rows=lambda y: [np.full(y.shape[:-1], np.abs(y).max()), int8_rows(y)[1]]
        ),
    }
    check(name, call_norm_int8, norm_int8, NORM, cases, faults, 1e-4)

    def good():
        return norm_arguments(bf16(3, 96), bf16(96), None, None)

    refuse(name, good, "'gamma'", gamma=f32(96))
    refuse(name, good, "'gamma'", 561002, gamma=bf16(95))
    refuse(name, good, "'x'", x=f32(3, 96))
    refuse(name, good, "'x'", 561002, x=bf16(96))
    refuse(name, lambda: norm_arguments(bf16(1, 8256), bf16(8256), None, None), "'x'", 561002)
    refuse(name, good, "'dstType'", 561002, dst_type=3)
    refuse(name, good, "'yOut'", 561002, y=empty(3, 95, dtype=I8))
    refuse(name, good, "'scaleOut'", 561002, scale=empty(3, 1))
    refuse(name, good, "'beta'", 561002, beta=bf16(95))
    refuse(name, good, "'gamma'", 161001, gamma=None)
    zero = norm_arguments(torch.zeros(2, 96, dtype=BF16), bf16(96), None, None)
    launch(name, **zero)
    assert torch.isnan(zero["scale"]).all().item(), "rows of zeros have a scale"


def mx_rows(y, steps, algorithm, low=0.0):
    blocks = y.reshape(*y.shape[:-1], -1, steps.block)
    peak = np.maximum(np.abs(blocks).max(-1), low)
    exponent = steps.exponents(peak, algorithm)
    values = as_e4m3(blocks * np.exp2(-exponent)[..., None]).reshape(y.shape)
    per_32 = exponent.repeat(steps.block // 32, -1)[..., : y.shape[-1] // 32]
    return [per_32.reshape(*y.shape[:-1], -1, 2), values * 0.9e-3]


def shown_mx(y, scale):
    return [e8m0(scale), from_fp8(y) * 0.9e-3]


MX_FAULTS = {
    "blocks of 64": dict(block=64),
    "exponent rounded down": dict(exponents=lambda peak, _: np.floor(np.log2(peak)) - 8),
    "exponent of the other algorithm": dict(
        exponents=lambda peak, algorithm: NORM.exponents(peak, 1 - algorithm)
    ),
}


def norm_mx(case, steps):
    x, gamma, beta, algorithm = case
    return [*mx_rows(normed((x, gamma, None, beta), steps), steps, algorithm),
            steps.rstd(steps.rms(array(x)))]  # fmt: skip


def mx_arguments(x, gamma, beta, algorithm, rstd=True):
    *lead, d = x.shape
    return dict(x=x, gamma=gamma, beta=beta, epsilon=EPS, scale_alg=algorithm, round_mode="rint",
                dst_type=36, output_rstd=rstd, y=empty(*lead, d, dtype=E4M3),
                mxscale=empty(*lead, -(-d // 64), 2, dtype=E8M0),
                rstd=empty(*lead, 1))  # fmt: skip


def call_norm_mx(*case):
    given = mx_arguments(*case)
    launch("aclnnRmsNormDynamicMxQuant", **given)
    return [*shown_mx(given["y"], given["mxscale"]), given["rstd"]]


def check_norm_mx():
    name = "aclnnRmsNormDynamicMxQuant"
    cases = [
        (bf16(3, 1024), bf16(1024), None, 1),  # the plan: E4M3, scale rounded up
        (f16(2, 3, 128), f16(128), f16(128), 0),
        (bf16(4, 192), f32(192), f32(192), 1),
    ]
    faults = {k: v for k, v in NORM_FAULTS.items() if k != "rounded to bf16 before"} | MX_FAULTS
    faults |= {"rstd is the rms": dict(rstd=np.reciprocal)}
    check(name, call_norm_mx, norm_mx, NORM, cases, faults, 1e-4)
    unasked = mx_arguments(bf16(2, 64), bf16(64), None, 1, rstd=False)
    launch(name, **{**unasked, "rstd": None})

    def good():
        return mx_arguments(bf16(3, 128), bf16(128), None, 1)

    refuse(name, good, "'gamma'", 561103, gamma=bf16(127))
    refuse(name, good, "'gamma'", gamma=f16(128))
    refuse(name, good, "'beta'", 561103, beta=f32(128))
    refuse(name, good, "'scaleAlg'", 561103, scale_alg=2)
    refuse(name, good, "'roundMode'", 561103, round_mode="floor")
    refuse(name, good, "'dstType'", 561103, dst_type=40)
    refuse(name, good, "'mxscaleOut'", 561103, mxscale=empty(3, 4, 2, dtype=E8M0))
    refuse(name, good, "'rstdOut'", 161001, rstd=None)
    refuse(name, good, "'x'", x=f32(3, 128))


def dynamic_mx(case, steps):
    x, low = case
    return mx_rows(array(x), steps, 1, low)


def call_dynamic_mx(x, low):
    *lead, d = x.shape
    y, scale = empty(*lead, d, dtype=E4M3), empty(*lead, d // 64, 2, dtype=E8M0)
    launch("aclnnDynamicMxQuantV3", x=x, axis=-1, round_mode="rint", dst_type=36, block_size=32,
           scale_alg=1, dst_type_max=0.0, max_low_bound=low, y=y, mxscale=scale)  # fmt: skip
    return shown_mx(y, scale)


def check_floor():
    """The amax floor of the contract, 1e-4: blocks below it keep its scale."""
    steep = torch.logspace(0, 1, 256).bfloat16()  # the blocks of a row differ
    faint = bf16(3, 256) * steep * torch.tensor([1.0, 1e-6, 3e-5]).unsqueeze(-1).bfloat16()
    cases = [(faint, 1e-4), (bf16(2, 256) * steep, 1e-4), (faint * 2, 0.0)]
    faults = MX_FAULTS | {
        "no floor": dict(exponents=lambda peak, _: round_up_exponent(peak / 448) * (peak > 1e-4)),
    }
    faults.pop("exponent of the other algorithm")
    check("aclnnDynamicMxQuantV3, floor", call_dynamic_mx, dynamic_mx, NORM, cases, faults, 1e-4)


ROTATE = Steps(
    rotation=same,
    pieces=lambda x, k: x.reshape(*x.shape[:-1], -1, k),
    rounded=lambda y, dtype: as_bf16(y) if dtype == BF16 else as_f16(y),
    rows=int8_rows,
    clamp=lambda y, alpha: y if alpha is None else clamped(y, array(alpha)[0]),
    exponents=NORM.exponents,
    block=32,
)


def clamped(y, alpha):
    groups = y.reshape(*y.shape[:-1], -1, 32)
    limit = alpha * np.abs(groups).max(-1, keepdims=True)
    return np.clip(groups, -limit, limit).reshape(y.shape)


def rotated(x, rotation, steps):
    pieces = steps.pieces(array(x), rotation.shape[-1])
    turned = pieces[..., None, :] @ steps.rotation(array(rotation))
    return steps.rounded(turned.reshape(x.shape), x.dtype)


def rotate_int8(case, steps):
    x, rotation, packed = case
    return steps.rows(rotated(x, rotation, steps), *([7] if packed else []))


def rotate_arguments(x, rotation, packed=False):
    m, n = x.shape
    y = empty(m, n // 8, dtype=torch.int32) if packed else empty(m, n, dtype=I8)
    return dict(x=x, rotation=rotation, axis=-1, round_mode="rint", scale_alg=0, dst_type_max=0.0,
                trans=False, y=y, scale=empty(m))  # fmt: skip


def call_rotate(x, rotation, packed):
    given = rotate_arguments(x, rotation, packed)
    launch("aclnnRotateQuant", **given)
    y = given["y"]
    if packed:
        codes = y.cpu().view(torch.uint8).int()
        nibbles = torch.stack([codes & 15, codes >> 4], -1).flatten(1)
        y = torch.where(nibbles > 7, nibbles - 16, nibbles)
    return shown_int8(y, given["scale"], 7 if packed else 127)


def hadamard(n):
    signs = [[1 - 2 * (bin(i & j).count("1") % 2) for j in range(n)] for i in range(n)]
    return torch.tensor(signs, dtype=BF16)


def grid(*shape, dtype=BF16):
    """Numbers of 8 bits whose products have exact sums: then all round to 16 bits alike."""
    return (torch.tensor(rng.integers(-128, 129, shape)) / 64).to(dtype)


def check_rotate_int8():
    name = "aclnnRotateQuant"
    cases = [
        (grid(65, 128), hadamard(128), False),  # the plan: index queries and keys in one buffer
        (grid(5, 256, dtype=F16), grid(64, 64, dtype=F16), False),
        (grid(3, 384), grid(128, 128), True),
    ]
    faults = {
        "not rounded before its maximum": dict(rounded=lambda y, dtype: y),
        "rounded to the other dtype": dict(
            rounded=lambda y, dtype: as_f16(y) if dtype == BF16 else as_bf16(y)
        ),
        "rotation transposed": dict(rotation=lambda r: r.T),
        "no rotation": dict(rotation=lambda r: np.eye(len(r))),
        "pieces interleaved": dict(
            pieces=lambda x, k: x.reshape(*x.shape[:-1], k, -1).swapaxes(-1, -2)
        ),
        "scaled by 1/sqrt(k)": dict(rotation=lambda r: r / len(r) ** 0.5),
    }
    check(name, call_rotate, rotate_int8, ROTATE, cases, faults, 1e-4)

    def good():
        return rotate_arguments(bf16(4, 128), hadamard(128))

    refuse(name, good, "'x'", x=bf16(128))
    refuse(name, good, "'x'", x=f32(4, 128))
    refuse(name, lambda: rotate_arguments(bf16(4, 64), hadamard(64)), "'x'")
    refuse(name, lambda: rotate_arguments(bf16(4, 192), hadamard(128)), "'x'")
    refuse(name, good, "'rotation'", rotation=hadamard(128).half())
    refuse(name, good, "'rotation'", rotation=bf16(64, 128))
    refuse(name, good, "'rotation'", rotation=bf16(8, 8))
    refuse(name, good, "'alpha'", alpha=bf16(1))
    refuse(name, good, "'axis'", axis=0)
    refuse(name, good, "'roundMode'", round_mode="trunc")
    refuse(name, good, "'scaleAlg'", scale_alg=1)
    refuse(name, good, "'trans'", trans=True)
    refuse(name, good, "'scaleOut'", scale=empty(4, 1))
    refuse(name, good, "'yOut'", y=empty(4, 64, dtype=I8))
    refuse(name, good, "'yOut'", y=empty(4, 128, dtype=E4M3))  # MX is of A5


def rotate_mx(case, steps):
    x, rotation, alpha, algorithm = case
    return mx_rows(steps.clamp(rotated(x, rotation, steps), alpha), steps, algorithm)


def rotate_mx_arguments(x, rotation, alpha, algorithm):
    *lead, n = x.shape
    return dict(x=x, rotation=rotation, alpha=alpha, axis=-1, round_mode="rint",
                scale_alg=algorithm, dst_type_max=0.0, trans=False,
                y=empty(*lead, n, dtype=E4M3),
                scale=empty(*lead, -(-n // 64), 2, dtype=E8M0))  # fmt: skip


def call_rotate_mx(*case):
    given = rotate_mx_arguments(*case)
    launch("aclnnRotateQuant", **given)
    return shown_mx(given["y"], given["scale"])


def check_rotate_mx():
    name = "aclnnRotateQuant"
    cases = [
        (grid(5, 128), hadamard(128), None, 1),
        (grid(2, 3, 256, dtype=F16), grid(64, 64, dtype=F16), None, 0),
        (grid(3, 128), grid(4, 32, 32), torch.tensor([0.5]).bfloat16(), 1),
        (grid(3, 128), hadamard(64), torch.tensor([1.0]).bfloat16(), 1),
    ]
    faults = {
        "no clamp": dict(clamp=lambda y, alpha: y),
        "clamped though alpha is 1": dict(
            clamp=lambda y, alpha: y if alpha is None else clamped(y, array(alpha)[0] / 2)
        ),
        "rotation transposed": dict(rotation=lambda r: r.swapaxes(-1, -2)),
        "no rotation": dict(rotation=lambda r: np.broadcast_to(np.eye(r.shape[-1]), r.shape)),
    }
    check(name, call_rotate_mx, rotate_mx, ROTATE, cases, faults | MX_FAULTS, 1e-4)

    def good():
        return rotate_mx_arguments(bf16(3, 128), hadamard(64), None, 1)

    refuse(name, good, "'rotation'", rotation=bf16(16, 16))
    refuse(name, good, "'rotation'", rotation=bf16(3, 64, 64))
    refuse(name, good, "'x'", x=bf16(3, 96), y=empty(3, 96, dtype=E4M3))
    refuse(name, good, "'scaleAlg'", scale_alg=2)
    refuse(name, good, "'dstTypeMax'", dst_type_max=6.0)
    refuse(name, good, "'roundMode'", round_mode="floor")
    refuse(name, good, "'alpha'", alpha=f32(1))
    refuse(name, good, "'scaleOut'", scale=empty(3, 4, 2, dtype=E8M0))
    refuse(name, good, "'yOut'", y=empty(3, 128, dtype=I8))


def dynamic_int8(case, steps):
    return steps.rows(array(case[0]))


def call_dynamic_int8(x):
    y, scale = empty(*x.shape, dtype=I8), empty(*x.shape[:-1])
    launch("aclnnDynamicQuant", x=x, y=y, scale=scale)
    return shown_int8(y, scale)


def check_dynamic_int8():
    """The first version, as rows 13 and 20 of the plan call it."""
    faults = {"scale by 128": dict(rows=lambda y: int8_rows(y * 127 / 128)),
              "rows shifted": dict(rows=lambda y: int8_rows(np.roll(y, 1, 0)))}  # fmt: skip
    cases = [(bf16(3, 512),), (f16(2, 5, 96),)]
    check("aclnnDynamicQuant", call_dynamic_int8, dynamic_int8, NORM, cases, faults, 1e-4)


check_dynamic_int8()
if FAMILY and not A5:
    check_norm_int8()
    check_rotate_int8()
else:
    absent("aclnnRmsNormDynamicQuant", lambda: norm_arguments(bf16(3, 96), bf16(96), None, None))
if FAMILY and A5:
    check_norm_mx()
    check_rotate_mx()
    check_floor()
else:
    absent("aclnnRmsNormDynamicMxQuant", lambda: mx_arguments(bf16(3, 128), bf16(128), None, 1))
if not FAMILY:
    absent("aclnnRotateQuant", lambda: rotate_arguments(bf16(4, 128), hadamard(128)))
