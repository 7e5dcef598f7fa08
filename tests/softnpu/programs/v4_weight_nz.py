"""int8 products with weights in the NZ format: aclnnQuantMatmulWeightNz, and
aclnnGroupedMatmulWeightNz with an int32 result (see fused_check.py).
"""

import numpy as np
import torch
import torch_npu
from dense_check import STEP, empty, launch, randint8, refuse, tiled
from fused_check import A5, Steps, array, bf16, check, f32, problems, rng

BF16, F16, I32 = torch.bfloat16, torch.float16, torch.int32
NAME = "aclnnQuantMatmulWeightNz"
STEPS = Steps(
    weight=lambda w: w,
    columns=lambda y, scale: y * scale,
    rows=lambda y, scale: y * scale[:, None],
    whole=lambda y, scale: y,
)


def formula(case, steps):
    x, w, scale, row_scale, bias, out, *_ = case
    y = array(x).astype(float) @ steps.weight(array(w)).astype(float)
    if bias is not None and bias.dtype == I32:
        y = y + array(bias)
    if out == I32:
        return [steps.whole(y, array(scale)) * STEP]
    y = steps.columns(y, array(scale))
    if row_scale is not None:
        y = steps.rows(y, array(row_scale))
    return [y if bias is None or bias.dtype == I32 else y + array(bias)]


def arguments(x, w, scale, row_scale, bias, out, turned=False):
    weight = tiled(w.t() if turned else w)
    return dict(x1=x, x2=weight, x1_scale=row_scale, x2_scale=scale, bias=bias, transpose1=False,
                transpose2=turned, group=0,
                out=empty(x.shape[0], w.shape[1], dtype=out))  # fmt: skip


def call_nz(x, w, *rest):
    given = arguments(x, w.cpu(), *rest)
    launch(NAME, **given)
    return [given["out"] * STEP if given["out"].dtype == I32 else given["out"]]


def call_torch_npu(x, w, scale, row_scale, bias, out):
    torch.npu.config.allow_internal_format = True
    weight = torch_npu.npu_format_cast(w, 29)
    return [torch_npu.npu_quant_matmul(x, weight, scale, pertoken_scale=row_scale, bias=bias,
                                       output_dtype=out)]  # fmt: skip


def operands(m, k, n):
    return randint8(rng, m, k), randint8(rng, k, n)


def scales(n, dtype=torch.float32):
    return (f32(n).abs() * 1e-4 + 1e-5).to(dtype)


def case(m, k, n, rows=True, out=BF16, bias=None, dtype=torch.float32, turned=False):
    return (*operands(m, k, n), scales(n, dtype), f32(m).abs() if rows else None, bias, out, turned)


def check_all():
    cases = [
        case(3, 256, 96),
        case(1, 128, 64),
        case(5, 70, 50, dtype=BF16, bias=bf16(50)),  # neither K nor N fill their tiles
        case(4, 64, 96, turned=True, bias=f32(96)),
        case(4, 64, 96, rows=False, bias=torch.tensor(rng.integers(-999, 999, 96)).int()),
        case(2, 96, 64, out=F16),
    ]
    faults = {
        "tiles of 16": dict(weight=lambda w: np.roll(w, 16, 1)),
        "rows of another tile": dict(weight=lambda w: np.roll(w, 16, 0)),
        "no row scale": dict(rows=lambda y, scale: y),
        "row scale of another": dict(rows=lambda y, scale: y * np.roll(scale, 1)[:, None]),
        "column scale of another": dict(columns=lambda y, scale: y * np.roll(scale, 1)),
    }
    check(NAME, call_nz, formula, STEPS, cases, faults, 1e-2)
    sums = [
        case(3, 256, 64, rows=False, out=I32),
        case(1, 7168, 64, rows=False, out=I32, dtype=BF16),  # exact beyond 2**24
    ]
    whole = {
        "dequantised": dict(whole=lambda y, scale: y * scale),
        "weight reversed": dict(weight=lambda w: w[::-1]),
    }
    check(f"{NAME}, int32 out", call_nz, formula, STEPS, sums, whole, 1e-6)
    plain = [case(3, 256, 96)[:6], case(5, 70, 50)[:6]]
    check("npu_quant_matmul NZ", call_torch_npu, formula, STEPS, plain, faults, 1e-2)
    wide = case(2, 32, 65568)  # Pro's wq_b: beyond 65535, with scales of columns and of tokens
    check(f"{NAME}, wide", call_nz, formula, STEPS, [wide],
          {"no row scale": faults["no row scale"]}, 1e-2)  # fmt: skip


def refuse_all():
    x, w, scale, row_scale, _, _, _ = case(3, 64, 96)

    def good():
        return arguments(x, w, scale, row_scale, None, BF16)

    refuse(NAME, good, "'x2'", x2=w)  # rows and columns
    refuse(NAME, good, "'x2'", 161001, x2=None)
    refuse(NAME, good, "'x2_scale (scale)'", 161001, x2_scale=None)
    refuse(NAME, good, "'x2'", x2=tiled(randint8(rng, 32, 96)))
    refuse(NAME, good, "'x2'", x2=tiled(randint8(rng, 64, 1)), out=empty(3, 1, dtype=BF16),
           x2_scale=scales(1))  # fmt: skip
    refuse(NAME, good, "'x1'", x1=x.int())
    refuse(NAME, good, "'x2_scale (scale)'", x2_scale=scales(95))
    refuse(NAME, good, "'x1_scale (pertoken_scale)'", x1_scale=f32(4))
    refuse(NAME, good, "'x1_scale (pertoken_scale)'", out=empty(3, 96, dtype=I32))  # must be null
    refuse(NAME, good, "'group_sizes'" if A5 else "'groupSize'", group=128)
    refuse(NAME, good, "'out'", out=empty(3, 95, dtype=BF16))
    refuse(NAME, good, "'y_scale'", y_scale=torch.ones(1, 96, dtype=torch.int64))
    refuse(NAME, good, "'transposeX1'", transpose1=True)
    if not A5:
        packed = torch.ones(65568, dtype=torch.int64)
        refuse(NAME, lambda: arguments(*case(1, 32, 65568)), "'x2'", x2_scale=packed,
               x1_scale=None, out=empty(1, 65568, dtype=F16))  # fmt: skip
        view = tiled(w.t().contiguous())
        view.tensor = view.tensor.t()
        refuse(NAME, good, "'x2'", x2=view)
    int32 = arguments(x, w, scale, None, None, I32)
    refuse(NAME, lambda: int32, "'x2_scale (scale)'", 161001, x2_scale=None)


GROUPED = Steps(weight=lambda w, e: w[e], counts=lambda c: c, dequantised=lambda y, s, e: y * s[e])


def grouped(case, steps):
    x, w, counts, scale, row_scale = case
    rows, start = [], 0
    for e, count in enumerate(steps.counts(array(counts))):
        part = array(x)[start : start + count].astype(float)
        y = part @ steps.weight(array(w), e).astype(float)
        if scale is not None:
            y = (
                steps.dequantised(y, array(scale), e)
                * array(row_scale)[start : start + count, None]
            )
        rows.append(y)
        start += count
    y = np.concatenate(rows)
    return [y * STEP if scale is None else y]


def call_grouped(x, w, counts, scale, row_scale):
    out = empty(x.shape[0], w.shape[2], dtype=I32 if scale is None else BF16)
    per_token = None if scale is None else [row_scale]
    launch("aclnnGroupedMatmulWeightNz", x=[x], weight=[tiled(w.cpu())], list=counts,
           scale=None if scale is None else [scale], per_token=per_token, split=3, type=0,
           list_type=1, act=0, quant_group=0, out=[out])  # fmt: skip
    written = out[: int(counts.sum().item())]
    return [written * STEP if scale is None else written]


def check_grouped():
    def experts(k, n, *counts):
        m = sum(counts)
        return randint8(rng, m, k), randint8(rng, len(counts), k, n), torch.tensor(counts)

    whole = [(*experts(64, 96, 3, 0, 5), None, None), (*experts(256, 64, 1, 1, 4), None, None)]
    faults = {
        "the next expert": dict(weight=lambda w, e: w[(e + 1) % len(w)]),
        "tiles of 16": dict(weight=lambda w, e: np.roll(w[e], 16, 1)),
        "counts backwards": dict(counts=lambda c: c[::-1]),
    }
    check("aclnnGroupedMatmulWeightNz, int32", call_grouped, grouped, GROUPED, whole, faults, 1e-6)
    scaled = [(*experts(64, 96, 3, 0, 5), scales(288, BF16).view(3, 96), f32(8).abs())]
    faults |= {"scale of the next": dict(dequantised=lambda y, s, e: y * s[(e + 1) % len(s)])}
    check("aclnnGroupedMatmulWeightNz, bf16", call_grouped, grouped, GROUPED, scaled, faults, 1e-2)


def check_formats():
    """aclnnNpuFormatCast's page: A2 and A3 answer NZ for every dtype, A5 has a name for tiles of 4
    bytes that are as wide as those of 2. The values come back.
    """
    torch.npu.config.allow_internal_format = True
    for dtype in (torch.int8, F16, BF16, torch.float32, I32):
        x = f32(2, 40, 70, scale=20).to(dtype)
        tiles = torch_npu.npu_format_cast(x.npu(), 29)
        name = torch_npu.get_npu_format(tiles).name
        four = A5 and dtype in (torch.float32, I32)
        if name != ("FRACTAL_NZ_C0_16" if four else "FRACTAL_NZ"):
            problems.append(f"npu_format_cast of {dtype}: {name}")
        if not torch.equal(torch_npu.npu_format_cast(tiles, 2).cpu(), x):
            problems.append(f"npu_format_cast of {dtype}: the values change")


check_all()
refuse_all()
check_grouped()
check_formats()
