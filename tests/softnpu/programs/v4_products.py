"""Products as the launch plan uses them: fp32 sums of 16-bit matrices, several in one call, and
batches between transpositions (see fused_check.py).
"""

import numpy as np
import torch
from dense_check import (
    FAMILY,
    absent,
    as_bf16,
    as_e4m3,
    as_f16,
    empty,
    hf32,
    launch,
    refuse,
    rounded_hf32,
)
from fused_check import A5, Steps, array, bf16, check, f32, rng, same

BF16, F32 = torch.bfloat16, torch.float32


def f16(*shape):
    return f32(*shape).half()


def call_matmul(a, b, out, cube=0, symbol="aclnnMatmul"):
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    y = empty(*batch, a.shape[-2], b.shape[-1], dtype=out)
    launch(symbol, self=a, mat2=b, out=y, cube_math_type=cube)
    return [y]


READS = {0: same, 1: hf32, 2: as_f16, 3: hf32, 4: same}
MATMUL = Steps(
    reads=lambda x, dtype, cube: READS[cube](x) if dtype == F32 else x,
    summed=same,
    other=lambda b: b,
)


def matmul(case, steps):
    a, b, _, cube = case[:4]
    wide = F32 if F32 in (a.dtype, b.dtype) else a.dtype
    read = [steps.reads(array(x), wide, cube) for x in (a, b)]
    return [steps.summed(read[0] @ steps.other(read[1]))]


def check_matmul():
    sums = [
        (bf16(7, 4096), bf16(64, 4096).t(), F32, 0),  # logits: a transposed view
        (bf16(3, 200), bf16(200, 33), F32, 1),
        (f16(2, 5, 96), f16(96, 40), F32, 0),
        (f32(4, 300), f32(300, 20), F32, 0),
        (bf16(64, 128), bf16(128, 8), F32, 0, "aclnnMm"),
        (bf16(3, 5, 300), bf16(3, 300, 8), F32, 0, "aclnnBatchMatMul"),
    ]
    faults = {
        "sum rounded to bf16": dict(summed=as_bf16),
        "fp16 through bf16": dict(reads=lambda x, *_: as_bf16(x)),
        "another column": dict(other=lambda b: np.roll(b, 1, -1)),
        "K reversed": dict(other=lambda b: b[..., ::-1, :]),
    }
    check("aclnnMatmul, fp32 out", call_matmul, matmul, MATMUL, sums, faults, 1e-4)
    reads = [
        (f32(4, 300), f32(300, 20), F32, 1),
        (f32(2, 70), f32(70, 5), F32, 2),
        (f32(4, 300), f32(300, 20), F32, 3),
        (f16(3, 64), f32(64, 9), F32, 0),
        (f16(3, 64), f32(64, 9), F32, 3),
    ]
    if A5:
        reads += [(bf16(3, 64), f32(64, 9), F32, 0), (bf16(3, 64), f16(64, 9), F32, 0)]
    faults = {
        "in full fp32": dict(reads=lambda x, *_: x),
        "HF32 always": dict(reads=lambda x, *_: hf32(x)),
        "HF32 rounded": dict(
            reads=lambda x, dtype, cube: (
                rounded_hf32(x) if dtype == F32 and cube in (1, 3) else MATMUL.reads(x, dtype, cube)
            )
        ),
    }
    check("aclnnMatmul of fp32", call_matmul, matmul, MATMUL, reads, faults, 2e-5)

    def good():
        return dict(self=bf16(3, 8), mat2=bf16(8, 5), out=empty(3, 5), cube_math_type=0)

    refuse("aclnnMatmul", good, "'cubeMathType'", cube_math_type=2)
    refuse("aclnnMatmul", good, "'cubeMathType'", cube_math_type=3)
    refuse("aclnnMatmul", good, "'cubeMathType'", cube_math_type=5)
    refuse("aclnnMm", good, "'mat2'", 161001, mat2=None)
    if not A5:
        for other in (f32(8, 5), f16(8, 5)):
            refuse("aclnnMatmul", good, "'mat2'", mat2=other)


APART = Steps(turned=lambda w: w.t(), x=same, order=same)


def apart(case, steps):
    xs, weights = case
    return steps.order([steps.x(array(x)) @ array(steps.turned(w)) for x, w in
                        zip(xs, weights, strict=True)])  # fmt: skip


def call_apart(xs, weights):
    views = [w.npu().t() for w in weights]
    first = xs[0].npu()
    rows = [first if x is xs[0] else x.npu() for x in xs]
    out = [empty(x.shape[0], w.shape[1], dtype=x.dtype) for x, w in zip(rows, views, strict=True)]
    launch("aclnnGroupedMatmulV5", x=rows, weight=views, split=0, type=-1, list_type=0, act=0,
           out=out)  # fmt: skip
    return out


def check_apart():
    def twice(rows, width, *columns, make=bf16):
        x = make(rows, width)
        return [x] * len(columns), [make(n, width) for n in columns]

    cases = [
        twice(3, 256, 96, 32),
        twice(1, 128, 64, 16),  # a decode step of one token
        twice(5, 64, 16, 48, 32, make=f16),
        ([bf16(4, 64), bf16(2, 96)], [bf16(16, 64), bf16(24, 96)]),
    ]
    faults = {
        "results exchanged": dict(order=lambda ys: ys[::-1]),
        "rows of x shifted": dict(x=lambda x: np.roll(x, 1, -1)),
        "another channel": dict(turned=lambda w: w.roll(1, 0).t()),
    }
    check("aclnnGroupedMatmulV5 apart", call_apart, apart, APART, cases, faults, 1.5e-2)

    def good():
        x = bf16(3, 64).npu()
        weights = [bf16(16, 64).npu().t(), bf16(8, 64).npu().t()]
        return dict(x=[x, x], weight=weights, split=0, type=-1, list_type=0, act=0,
                    out=[empty(3, 16, dtype=BF16), empty(3, 8, dtype=BF16)])  # fmt: skip

    name = "aclnnGroupedMatmulV5"
    refuse(name, good, "'split_item'", split=3)
    refuse(name, good, "'group_list'", list=torch.tensor([3, 6]))
    refuse(name, good, "'weight'", weight=[bf16(16, 32).npu().t(), bf16(8, 64).npu().t()])
    refuse(name, good, "'weight'", weight=[bf16(16, 64).npu().t(), bf16(64, 8).npu()])
    refuse(name, good, "'out'", out=[empty(3, 16, dtype=BF16), empty(3, 9, dtype=BF16)])


TURNED = Steps(
    a=lambda x, perm: x.transpose(perm),
    b=lambda x, perm: x.transpose(perm),
    reads=lambda x, dtype, cube: READS[cube](x) if dtype == F32 else x,
    y=lambda y: y.transpose(1, 0, 2),
    split=lambda y, parts: y if parts == 1 else y.reshape(y.shape[0], parts, -1).transpose(1, 0, 2),
)


def turned(case, steps):
    x1, x2, perm1, perm2, cube, parts = case
    a = steps.reads(steps.a(array(x1), perm1), x1.dtype, cube)
    b = steps.reads(steps.b(array(x2), perm2), x1.dtype, cube)
    return [steps.split(steps.y(a @ b), parts)]


def turned_arguments(x1, x2, perm1, perm2, cube, parts):
    batch, m = (x1.shape[i] for i in perm1[:2])
    n = x2.shape[perm2[2]]
    shape = (m, batch, n) if parts == 1 else (parts, m, batch * n // parts)
    return dict(x1=x1, x2=x2, perm_x1=perm1, perm_x2=perm2, perm_y=[1, 0, 2],
                cube_math_type=cube, batch_split_factor=parts,
                out=empty(*shape, dtype=x1.dtype))  # fmt: skip


def call_turned(*case):
    given = turned_arguments(*case)
    launch("aclnnTransposeBatchMatMul", **given)
    return [given["out"]]


def check_turned():
    name = "aclnnTransposeBatchMatMul"
    rows, stored = [1, 0, 2], [0, 2, 1]
    plan = (bf16(3, 4, 256), bf16(4, 24, 256), rows, stored, 0, 1)  # the projection of the plan
    cases = [
        plan,
        (bf16(5, 8, 4096), bf16(8, 16, 4096), rows, stored, 0, 1),
        (f16(4, 3, 64), f16(4, 64, 16), [0, 1, 2], [0, 1, 2], 0, 2),
        (bf16(3, 4, 64), bf16(4, 64, 16), rows, [0, 1, 2], 1, 4),
    ]
    faults = {
        "x1 untransposed": dict(a=lambda x, perm: x.reshape([x.shape[i] for i in perm])),
        "x2 as it lies": dict(b=lambda x, perm: x.reshape([x.shape[i] for i in perm])),
        "another group": dict(b=lambda x, perm: np.roll(x.transpose(perm), 1, 0)),
        "y as it comes": dict(y=lambda y: y.reshape(y.shape[1], y.shape[0], -1)),
        "parts behind rows": dict(
            split=lambda y, parts: y if parts == 1 else y.reshape(parts, y.shape[0], -1)
        ),
    }
    check(name, call_turned, turned, TURNED, cases, faults, 1.5e-2)
    singles = [(f32(3, 4, 200), f32(4, 200, 24), rows, [0, 1, 2], cube, 1) for cube in (0, 1, 3)]
    singles += [(f32(3, 2, 90), f32(2, 90, 8), rows, [0, 1, 2], 2, 1)]
    reads = {
        "in full fp32": dict(reads=lambda x, *_: x),
        "HF32 always": dict(reads=lambda x, *_: hf32(x)),
    }
    check(f"{name} of fp32", call_turned, turned, TURNED, singles, reads, 2e-5)

    def good():
        return turned_arguments(*plan)

    refuse(name, good, "'x2'", x2=bf16(4, 24, 128))
    refuse(name, good, "'x2'", x2=f16(4, 24, 256))
    refuse(name, good, "'x1'", x1=bf16(3, 1024))
    refuse(name, good, "'x1'", 161001, x1=None)
    refuse(name, good, "'permX1'", perm_x1=[2, 1, 0])
    refuse(name, good, "'permX2'", perm_x2=[1, 0, 2])
    refuse(name, good, "'permY'", perm_y=[0, 1, 2])
    refuse(name, good, "'permY'", perm_y=None)
    refuse(name, good, "'cubeMathType'", cube_math_type=2)
    refuse(name, good, "'out'", out=empty(3, 4, 24))
    refuse(name, good, "'out'", out=empty(4, 3, 24, dtype=BF16))
    refuse(name, good, "'batchSplitFactor'", batch_split_factor=3)
    refuse(name, good, "'bias'", bias=bf16(24))
    refuse(name, good, "'scale'", scale=torch.ones(96, dtype=torch.int64))
    if not A5:
        out = empty(2, 3, 48, dtype=BF16)
        refuse(name, good, "'permX2'", batch_split_factor=2, out=out)


def exponents(*shape):
    return torch.tensor(rng.integers(122, 131, shape), dtype=torch.uint8)


def as_scale(codes):
    return np.exp2(codes.numpy().astype(float) - 127)


MX = Steps(
    rows=lambda s: s.reshape(*s.shape[:-2], -1),
    columns=lambda s, stored: (
        s.reshape(*s.shape[:2], -1).transpose(0, 2, 1)
        if stored
        else s.transpose(0, 1, 3, 2).reshape(s.shape[0], -1, s.shape[2])
    ),
    block=32,
)


def quant_turned(case, steps):
    x1, x2, s1, s2, perm2, _ = case
    a, b = array(x1.float()).transpose(1, 0, 2), array(x2.float()).transpose(perm2)
    if s1.dtype == F32:
        return [(a @ b * array(s1)[:, None] * array(s2)).transpose(1, 0, 2)]
    rows = steps.rows(as_scale(s1)).transpose(1, 0, 2).repeat(steps.block, -1)
    columns = steps.columns(as_scale(s2), perm2[1] == 2).repeat(steps.block, -2)
    k = a.shape[-1]
    return [((a * rows[..., :k]) @ (b * columns[:, :k])).transpose(1, 0, 2)]


def quant_arguments(x1, x2, s1, s2, perm2, group):
    m, batch, _ = x1.shape
    e8m0 = s1.dtype == torch.uint8
    scales = [s.view(torch.float8_e8m0fnu) if e8m0 else s for s in (s1, s2)]
    return dict(x1=x1, x2=x2, x1_scale=scales[0], x2_scale=scales[1], dtype=27, group_size=group,
                perm_x1=[1, 0, 2], perm_x2=perm2, perm_y=[1, 0, 2], batch_split_factor=1,
                out=empty(m, batch, x2.shape[perm2[2]], dtype=BF16))  # fmt: skip


def call_quant_turned(*case):
    given = quant_arguments(*case)
    launch("aclnnTransposeQuantBatchMatMul", **given)
    return [given["out"]]


def e4m3(*shape):
    return torch.tensor(as_e4m3(rng.standard_normal(shape))).to(torch.float8_e4m3fn)


def mx_case(m, batch, k, n, stored, group):
    pairs = k // 64
    weight = (batch, n, k) if stored else (batch, k, n)
    scale = (batch, n, pairs, 2) if stored else (batch, pairs, n, 2)
    perm = [0, 2, 1] if stored else [0, 1, 2]
    return (e4m3(m, batch, k), e4m3(*weight), exponents(m, batch, pairs, 2), exponents(*scale),
            perm, group)  # fmt: skip


def check_quant_turned():
    name = "aclnnTransposeQuantBatchMatMul"
    plan = mx_case(3, 4, 256, 24, True, 32)
    columns = (e4m3(3, 2, 512), e4m3(2, 512, 128), f32(3).abs(), f32(128).abs(), [0, 1, 2], 0)
    cases = [plan, mx_case(2, 3, 128, 16, False, (1 << 32) + (1 << 16) + 32), columns]
    faults = {
        "blocks of 64": dict(block=64),
        "pairs exchanged": dict(rows=lambda s: s[..., ::-1].reshape(*s.shape[:-2], -1)),
        "scales of another row": dict(rows=lambda s: np.roll(s, 1, 0).reshape(*s.shape[:-2], -1)),
        "scales of another group": dict(
            columns=lambda s, stored: np.roll(MX.columns(s, stored), 1, 0)
        ),
    }
    check(name, call_quant_turned, quant_turned, MX, cases, faults, 1.5e-2)

    def good():
        return quant_arguments(*plan)

    refuse(name, good, "'x2'", x2=e4m3(4, 24, 128))
    refuse(name, good, "'x1Scale'", x1_scale=exponents(3, 4, 8).view(torch.float8_e8m0fnu))
    refuse(name, good, "'x2Scale'", x2_scale=f32(24))
    refuse(name, good, "'x2Scale'", x2_scale=exponents(4, 4, 24, 2).view(torch.float8_e8m0fnu))
    refuse(name, good, "'dtype'", dtype=1)
    refuse(name, good, "'groupSize'", group_size=128)
    refuse(name, good, "'permX1'", perm_x1=[0, 1, 2])
    refuse(name, good, "'batchSplitFactor'", batch_split_factor=2)
    refuse(name, good, "'out'", out=empty(4, 3, 24, dtype=BF16))
    refuse(name, good, "'x1'", 161001, x1=None)
    refuse(name, lambda: quant_arguments(*columns), "'x2'", x2=e4m3(2, 512, 64),
           x2_scale=f32(64), out=empty(3, 2, 64, dtype=BF16))  # fmt: skip


check_matmul()
check_apart()
PLAN = (bf16(3, 4, 64), bf16(4, 24, 64), [1, 0, 2], [0, 2, 1], 0, 1)
if FAMILY:
    check_turned()
else:
    absent("aclnnTransposeBatchMatMul", lambda: turned_arguments(*PLAN))
if FAMILY and A5:
    check_quant_turned()
else:
    absent(
        "aclnnTransposeQuantBatchMatMul",
        lambda: quant_arguments(*mx_case(2, 2, 64, 8, True, 32)),
    )
