"""aclnnInplacePartialRotaryMul (docs/spec/ascend-operators.md 4.5; see fused_check.py)."""

import numpy as np
import torch
from aclnn import call
from fused_check import A5, Steps, array, bf16, check, f32, refused, same

NAME = "aclnnInplacePartialRotaryMul"

STEPS = Steps(
    part=same,
    angles=lambda cos, sin: (cos, sin),
    turned=lambda even, odd: (-odd, even),
    pairs=lambda part: (part[..., 0::2], part[..., 1::2]),
    joined=lambda a, b: np.stack([a, b], -1).reshape(*a.shape[:-1], -1),
)


def rotated(case, steps):
    x, cos, sin, (start, end) = (array(c) if isinstance(c, torch.Tensor) else c for c in case)
    start, end = steps.part([start, end])
    cos, sin = steps.angles(cos, sin)
    part = x[..., start:end]
    other = steps.joined(*steps.turned(*steps.pairs(part)))
    result = x.copy()
    result[..., start:end] = part * cos + other * sin
    return [result]


def run(x, cos, sin, part):
    call(NAME, x=x, cos=cos, sin=sin, mode=1, partial_slice=part)
    return [x]


def tables(*shape, dtype=torch.float32):
    """Not repeated pairwise, so that each channel's own value is seen to be used."""
    return f32(*shape).to(dtype), f32(*shape).to(dtype)


CASES = [
    (bf16(5, 1, 8, 512), *tables(5, 1, 1, 64), [448, 512]),  # heads of V4
    (bf16(11, 1, 1, 512), *tables(11, 1, 1, 64), [448, 512]),  # a joint buffer
    (f32(2, 3, 1, 16), *tables(2, 1, 1, 6), [2, 8]),
    (f32(2, 1, 2, 8).half(), *tables(2, 1, 1, 8), [0, 8]),
    (f32(1, 1, 3, 8).half(), *tables(1, 1, 1, 4, dtype=torch.float16), [4, 8]),
    (f32(2, 1, 2, 8), *tables(2, 1, 1, 0), [4, 4]),
]
CASES += (
    [
        (f32(2, 3, 4, 8), *tables(2, 3, 4, 4), [4, 8]),
        (f32(2, 3, 4, 8), *tables(2, 1, 4, 4), [4, 8]),
        (f32(2, 3, 4, 8), *tables(1, 1, 1, 4), [4, 8]),
    ]
    if A5
    else [(f32(2, 3, 4, 8), *tables(2, 3, 1, 4), [4, 8])]
)
FAULTS = {
    "the first channels": dict(part=lambda part: [0, part[1] - part[0]]),
    "inverse": dict(angles=lambda cos, sin: (cos, -sin)),
    "cos and sin exchanged": dict(angles=lambda cos, sin: (sin, cos)),
    "first angle of each pair": dict(
        angles=lambda cos, sin: (cos[..., ::2].repeat(2, -1), sin[..., ::2].repeat(2, -1))
    ),
    "no minus": dict(turned=lambda even, odd: (odd, even)),
    "not turned": dict(turned=lambda even, odd: (-even, odd)),
    "halves": dict(pairs=lambda part: np.split(part, 2, -1)),
    "halves out": dict(joined=lambda a, b: np.concatenate([a, b], -1)),
}


check("inplace_partial_rotary_mul", run, rotated, STEPS, CASES, FAULTS, 1e-2)
exact = [c for c in CASES if c[0].dtype == torch.float32]
check("inplace_partial_rotary_mul, fp32", run, rotated, STEPS, exact, {}, 1e-6)


def bad(argument, mode=1, **changed):
    x, cos, sin, part = CASES[0]
    named = dict(x=x, cos=cos, sin=sin, partial_slice=part) | changed
    named = {k: v.npu() if isinstance(v, torch.Tensor) else v for k, v in named.items()}
    refused(NAME, lambda: call(NAME, mode=mode, **named), f"'{argument}'")


bad("x", x=f32(5, 1, 8, 512).double())
bad("x", x=bf16(5, 8, 512))
bad("x", x=bf16(5, 1, 8, 1026), partial_slice=[0, 64])
bad("x", x=bf16(5, 1, 8, 513), partial_slice=[0, 64])
bad("x", x=bf16(5, 1, 512, 8).transpose(2, 3))
bad("cos", cos=None)
bad("cos", cos=f32(5, 1, 1, 64).half(), sin=f32(5, 1, 1, 64).half())
bad("cos", cos=f32(5, 1, 1, 32), sin=f32(5, 1, 1, 32))
bad("cos", cos=f32(4, 1, 1, 64), sin=f32(4, 1, 1, 64))
bad("sin", sin=bf16(5, 1, 1, 64))
bad("sin", sin=f32(1, 1, 1, 64))
bad("partial_slice", partial_slice=None)
bad("partial_slice", partial_slice=[448])
bad("partial_slice", partial_slice=[449, 514])
bad("partial_slice", partial_slice=[512, 448])
bad("partial_slice", partial_slice=[449, 512])
for mode in (0, 2, 3):
    bad("mode", mode=mode)
if A5:
    bad("cos", x=bf16(2, 3, 4, 64), cos=f32(2, 3, 1, 64), sin=f32(2, 3, 1, 64),
        partial_slice=[0, 64])  # fmt: skip
else:
    bad("cos", cos=f32(5, 1, 8, 64), sin=f32(5, 1, 8, 64))
    bad("cos", cos=f32(1, 1, 1, 64), sin=f32(1, 1, 1, 64))
