"""Rotary position embeddings (see fused_check.py)."""

import numpy as np
import torch
import torch_npu
from fused_check import A5, Steps, array, bf16, check, f32, refused, same


def turn(x, mode):
    if mode == "half":
        a, b = np.split(x, 2, -1)
        return np.concatenate([-b, a], -1)
    if mode == "quarter":
        a, b, c, d = np.split(x, 4, -1)
        return np.concatenate([-b, a, -d, c], -1)
    return np.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)


def regrouped(x):
    return np.concatenate([x[..., ::2], x[..., 1::2]], -1)


STEPS = Steps(
    regrouped=regrouped,
    turned=turn,
    by_matrix=lambda x, matrix, turned: x @ matrix,
    sign=1,
    tables=lambda cos, sin: (cos, sin),
    cos=same,
    sin=same,
)


def rotary(case, steps):
    x, cos, sin = (array(c) for c in case[:3])
    mode, rotate = case[3], case[4] if len(case) > 4 else None
    if mode == "interleave-half":
        x, mode = steps.regrouped(x), "half"
    turned = steps.turned(x, mode)
    if rotate is not None:
        turned = steps.by_matrix(x, array(rotate), turned)
    cos, sin = steps.tables(cos, sin)
    return [x * steps.cos(cos) + steps.sign * turned * steps.sin(sin)]


def first_half(cos, sin):
    front = np.arange(cos.shape[-1]) < cos.shape[-1] // 2
    return np.where(front, cos, 1), np.where(front, sin, 0)


def tables(*shape, make=f32):
    return make(*shape), make(*shape)


def on_npu(*shape, make=f32):
    return [t.npu() for t in tables(*shape, make=make)]


def call_rotary(x, c, s, m="half", rotate=None):
    return [torch_npu.npu_rotary_mul(x, c, s, m, rotate)]


rotary_faults = {
    "the other mode": dict(
        turned=lambda x, mode: turn(x, "interleave" if mode != "interleave" else "half")
    ),
    "not turned": dict(turned=same),
    "inverse": dict(sign=-1),
    "cos and sin swapped": dict(tables=lambda cos, sin: (sin, cos)),
    "positions reversed": dict(
        tables=lambda *both: [np.flip(c, tuple(range(c.ndim - 1))) for c in both]
    ),
    "only half of it": dict(tables=first_half),
    "no cos": dict(cos=np.ones_like),
    "no sin": dict(sin=np.zeros_like),
}
regrouping_faults = {
    "odd ones first": dict(regrouped=lambda x: np.concatenate([x[..., 1::2], x[..., ::2]], -1)),
    "not regrouped": dict(regrouped=same),
}
matrix_faults = {
    "matrix ignored": dict(by_matrix=lambda x, matrix, turned: turned),
    "matrix transposed": dict(by_matrix=lambda x, matrix, turned: x @ matrix.T),
}
everywhere = [
    (f32(2, 5, 3, 16), *tables(1, 5, 1, 16), "half"),  # BSND with 1S1D
    (f32(2, 5, 3, 16), *tables(2, 5, 1, 16), "half"),
    (f32(2, 5, 3, 16), *tables(2, 5, 3, 16), "half"),
    (f32(5, 2, 3, 16), *tables(5, 1, 1, 16), "half"),  # SBND with S11D
    (
        f32(2, 12, 3, 64),
        *tables(1, 1, 3, 64),
        "half",
    ),  # BNSD with 11SD: B * N at its limit of 8 * S
    (f32(1, 3, 2, 84), *tables(1, 1, 2, 84), "half"),  # not in blocks of 32 bytes, but wide
    (f32(1, 4, 2, 6), *tables(1, 4, 1, 6), "interleave"),
    (f32(7, 3, 6), *tables(7, 1, 6), "half"),  # TND
    (f32(7, 3, 6), *tables(7, 3, 6), "half"),
    (f32(4, 64, 64), *tables(4, 1, 64), "interleave"),  # queries of Flash
    (f32(1, 2, 999, 894), *tables(1, 2, 1, 894), "interleave"),
]
newest = [
    (f32(2, 5, 3, 8), *tables(1, 5, 1, 8), "quarter"),
    (f32(2, 5, 3, 6), *tables(1, 5, 1, 6), "interleave-half"),
    (f32(2, 3, 5, 1024), *tables(2, 3, 5, 1024), "interleave"),
    (f32(2, 3, 5, 8), *tables(1, 3, 5, 8), "half"),
]
matrices = [
    (f32(2, 5, 3, 16), *tables(1, 5, 1, 16), "half", f32(16, 16)),
    (f32(1, 4, 2, 6), *tables(1, 4, 1, 6), "interleave", f32(6, 6)),
]
if A5:
    check(
        "rotary_mul",
        call_rotary,
        rotary,
        STEPS,
        everywhere + newest,
        rotary_faults | regrouping_faults,
        1e-5,
    )
    refused(
        "rotary_mul", lambda: call_rotary(f32(1, 2, 1, 1026).npu(), *on_npu(1, 2, 1, 1026)), "'x'"
    )
    refused(
        "rotary_mul",
        lambda: call_rotary(f32(1, 2, 1, 6).npu(), *on_npu(1, 2, 1, 6), "quarter"),
        "'x'",
    )
    refused("rotary_mul", lambda: call_rotary(f32(4, 2, 8).npu(), *on_npu(1, 1, 8)), "'cos'")
    refused("rotary_mul", lambda: call_rotary(f32(2, 4, 2, 8).npu(), *on_npu(1, 3, 1, 8)), "'cos'")
else:
    check(
        "rotary_mul",
        call_rotary,
        rotary,
        STEPS,
        everywhere + matrices,
        rotary_faults | matrix_faults,
        1e-5,
    )
    refused(
        "rotary_mul", lambda: call_rotary(f32(1, 2, 1, 898).npu(), *on_npu(1, 2, 1, 898)), "'x'"
    )
    refused(
        "rotary_mul",
        lambda: call_rotary(f32(1, 2, 1, 8).npu(), *on_npu(1, 2, 1, 8), "quarter"),
        "rotary_mode",
    )
    for x, table, mode in [
        ((2, 5, 3, 8), (1, 5, 3, 8), "half"),  # 1SND is no layout
        ((2, 64, 3, 64), (1, 1, 3, 64), "half"),  # BNSD: B * N beyond 8 * S
        ((1, 3, 5, 6), (1, 1, 5, 6), "half"),  # BNSD: not in blocks of 32 bytes, narrow
        ((1000, 2, 3, 8), (1, 2, 1, 8), "half"),  # B beyond 999
        ((2, 5, 3, 8), (2, 5, 1, 8), "interleave"),  # BS1D is for half
        ((2, 5, 500, 8), (1, 5, 1, 8), "interleave"),  # B * N beyond 999
        ((4, 3, 8), (4, 3, 8), "interleave"),  # TND is for half
        ((4, 1000, 8), (4, 1, 8), "half"),  # N beyond 999
    ]:
        refused(
            "rotary_mul",
            lambda x=x, t=table, m=mode: call_rotary(f32(*x).npu(), *on_npu(*t), m),
            "'cos'",
        )
    for matrix in (f32(8, 6), f32(8, 8).half()):
        refused(
            "rotary_mul",
            lambda m=matrix: call_rotary(
                f32(1, 4, 2, 8).npu(), *on_npu(1, 4, 1, 8), "half", m.npu()
            ),
            "'rotate'",
        )
half_cases = [
    (bf16(1, 6, 128, 64), *tables(1, 6, 1, 64, make=bf16), "interleave"),  # queries of Pro
    (bf16(6, 1, 64), *tables(6, 1, 64, make=bf16), "interleave"),
    (bf16(1, 4, 3, 32), *tables(1, 4, 1, 32, make=bf16), "half"),
]
check("rotary_mul in 16 bits", call_rotary, rotary, STEPS, half_cases, rotary_faults, 1e-2)
refused("rotary_mul", lambda: call_rotary(f32(1, 2, 1, 7).npu(), *on_npu(1, 2, 1, 7)), "'x'")
refused("rotary_mul", lambda: call_rotary(f32(2, 8).npu(), *on_npu(2, 8)), "'x'")
refused("rotary_mul", lambda: call_rotary(f32(1, 2, 1, 8).npu(), *on_npu(1, 2, 1, 6)), "'cos'")
refused("rotary_mul", lambda: call_rotary(f32(1, 2, 1, 8).npu(), *on_npu(2, 1, 8)), "'cos'")
refused(
    "rotary_mul",
    lambda: call_rotary(f32(1, 2, 1, 8).npu(), f32(1, 2, 1, 8).npu(), f32(1, 1, 1, 8).npu()),
    "'sin'",
)


def interleave_rope(case, steps):
    return rotary((*case, "interleave-half"), steps)


def call_interleave(x, c, s):
    return [torch_npu.npu_interleave_rope(x, c, s)]


rope_cases = [
    (bf16(2, 3, 5, 64), *tables(2, 1, 5, 64, make=bf16)),
    (bf16(2, 3, 5, 64), *tables(2, 1, 1, 64, make=bf16)),
    (f32(4, 64, 1, 64).half(), *(t.half() for t in tables(4, 1, 1, 64))),
]
if A5:
    rope_cases += [(f32(2, 3, 5, 64), *tables(1, 1, 5, 64))]
check(
    "interleave_rope",
    call_interleave,
    interleave_rope,
    STEPS,
    rope_cases,
    regrouping_faults | rotary_faults,
    1e-2,
)


def refuse_rope(x, c, argument, make=bf16):
    refused(
        "interleave_rope", lambda: call_interleave(make(*x).npu(), *on_npu(*c, make=make)), argument
    )


refuse_rope((1, 1, 1, 32), (1, 1, 1, 32), "'x'")
refuse_rope((1, 1, 64), (1, 1, 64), "'x'")
refuse_rope((2, 3, 5, 64), (2, 3, 5, 64), "'cos'")
refuse_rope((2, 3, 5, 64), (2, 1, 4, 64), "'cos'")
refused(
    "interleave_rope",
    lambda: call_interleave(*(bf16(1, 1, s, 64).npu() for s in (2, 2, 1))),
    "'sin'",
)
whole = torch.zeros(1, 1, 2, 64, dtype=torch.int32).npu()  # what is not confirmed says so
refused("interleave_rope", lambda: call_interleave(whole, whole, whole), "our reading")
refused(
    "interleave_rope",
    lambda: call_interleave(bf16(1, 1, 2, 64).npu(), *on_npu(1, 1, 2, 64)),
    "'cos'",
)
if not A5:
    refuse_rope((1, 1, 1, 64), (1, 1, 1, 64), "'x'", make=f32)
    refuse_rope((2, 3, 5, 64), (1, 1, 5, 64), "'cos'")
