"""npu_quant_matmul (see fused_check.py)."""

import numpy as np
import torch
import torch_npu
from fused_check import A5, Steps, array, bf16, check, f32, reseed, rng, same
from fused_formats import decode, scale_of, signed, unpack

reseed(__name__)
E8M0, FP4, INT4 = torch_npu.float8_e8m0fnu, torch_npu.float4_e2m1fn_x2, torch_npu.int4
FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def raw(x):
    return x.view(torch.uint8).numpy()


def swapped(nibbles):
    return nibbles.reshape(*nibbles.shape[:-1], -1, 2)[..., ::-1].reshape(nibbles.shape)


def by_row(y, scale):
    return y * scale[:, None]


def by_column(y, scale):
    return y * scale[: y.shape[-1]] if len(scale) >= y.shape[-1] else by_row(y, scale)


def cut_to_19_bits(scale):
    return (scale.view(np.uint32) & 0xFFFFE000).view(np.float32)


STEPS = Steps(
    nibbles=same,
    int4=signed,
    float8=same,
    turned=lambda x: np.swapaxes(x, -1, -2),
    batches=same,
    bias=same,
    early_bias=lambda integer_or_static: integer_or_static,
    cut=cut_to_19_bits,
    scale=same,
    pertoken=by_row,
    offset=np.add,
    whole=np.rint,
    int8=lambda y: np.clip(y, -128, 127),
    # products of groups
    exponents=same,
    pairs=same,
    length=same,
    zero=lambda x, offset: x - offset,
    group=lambda j, last: min(j, last),
    pertoken_group=same,
)


def matrix(x, kind, steps):
    """Values of a matrix stored row by row."""
    if kind == "int8":
        return x.numpy().astype(float)
    if kind == "int4":
        return steps.int4(steps.nibbles(unpack(raw(x.contiguous())))).astype(float)
    if kind == "e2m1":
        return decode(steps.nibbles(unpack(raw(x))), kind)
    return np.nan_to_num(decode(raw(x), steps.float8(kind)))


def grown(scale, count, axis, size):
    return np.repeat(scale, count, axis).take(range(size), axis)


def grouped(a, b, case, steps):
    scale, offset, pertoken, mode = case[2], case[3], case[4], case[8]
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    if mode == "mx":
        s1, s2 = steps.exponents(scale_of(raw(pertoken))), scale_of(raw(scale))
        s1, s2 = (s.reshape(*s.shape[:-2], -1) for s in (steps.pairs(s1), steps.pairs(s2)))
        s2 = np.swapaxes(s2, -1, -2)  # stored [n, pairs, 2]
        size, size_m, size_n = steps.length(32), 1, 1
    else:
        s1, s2 = array(pertoken), array(scale)
        size, size_n = (256, 1) if mode == "group" else (steps.length(128), 128)
        s2 = np.swapaxes(s2, -1, -2) if mode != "group" and case[-1] else s2
        size_m = 1 if s1.shape[-2] == m else 128
    out = 0
    for j, start in enumerate(range(0, k, size)):
        part = slice(start, start + size)
        left, right = a[..., part], b[..., part, :]
        if offset is not None:
            right = steps.zero(right, array(offset)[j])
        j = steps.group(j, s2.shape[-2] - 1)
        row = steps.pertoken_group(s1[..., 0 if mode == "group" else j][..., None])
        out = out + left @ right * grown(row, size_m, -2, m) * grown(
            s2[..., j : j + 1, :], size_n, -1, n
        )
    return out


def multiply(case, steps):
    x1, x2, scale, offset, pertoken, bias, out, kinds, mode, transposed = case
    a, b = matrix(x1, kinds[0], steps), matrix(x2, kinds[1], steps)
    b = steps.turned(b) if transposed else b
    if b.shape[-2] != a.shape[-1]:
        return [np.zeros((1,))]
    a, b = steps.batches(a), steps.batches(b)
    bias = 0 if bias is None else steps.bias(array(bias))
    if mode != "vector":
        return [grouped(a, b, case, steps) + bias]
    acc = a @ b
    static = (pertoken is None and out not in (torch.int32, torch.bfloat16)) or (
        kinds[0] in FP8 and pertoken is None
    )
    early = steps.early_bias(case[5] is not None and (case[5].dtype == torch.int32 or static))
    acc = acc + bias if early else acc
    if out == torch.int32:
        return [acc]
    s2 = array(scale).astype(np.float32)
    y = np.float32(acc) * steps.scale(steps.cut(s2) if static else s2)
    if pertoken is not None:
        y = steps.pertoken(y, array(pertoken))
    y = y if early else y + bias
    if offset is not None:
        y = steps.offset(y, array(offset).astype(np.float32))
    if out in (None, torch.int8):
        y = steps.int8(steps.whole(y))
    return [y.astype(float)]


def call(x1, x2, scale, offset, pertoken, bias, out, kinds, mode, transposed, group=None):
    given = {}
    for name, kind, x in (("x1_dtype", kinds[0], x1), ("x2_dtype", kinds[1], x2)):
        if x.dtype == torch.uint8:
            given[name] = INT4 if kind == "int4" else FP4
    if mode == "mx":
        given.update(scale_dtype=E8M0, pertoken_scale_dtype=E8M0)
    sizes = {"vector": None, "mx": [1, 1, 32], "group": [0, 0, 256], "block": [0, 128, 128]}[mode]
    sizes = group or sizes
    if transposed:
        x2 = x2.transpose(-1, -2)
        scale = scale.transpose(-1, -2) if mode == "block" else scale
    if mode == "mx":
        scale = scale.transpose(-2, -3) if transposed else scale.transpose(-2, -3).contiguous()
    if mode == "group":  # torch_npu wants the layout of x2
        scale = scale.t().contiguous().t()
    return [
        torch_npu.npu_quant_matmul(
            x1,
            x2,
            scale,
            offset=offset,
            pertoken_scale=pertoken,
            bias=bias,
            output_dtype=out,
            group_sizes=sizes,
            **given,
        )
    ]


def integers(*shape, low=-128, high=128, dtype=torch.int8):
    return torch.tensor(rng.integers(low, high, shape), dtype=dtype)


def codes(*shape):
    return integers(*shape, low=0, high=256, dtype=torch.uint8)


def packed(*shape):
    return integers(*shape, low=-(2**31), high=2**31, dtype=torch.int32)


def fp8(kind, *shape):
    return f32(*shape).to(FP8[kind])


def exponents(*shape):
    return integers(*shape, low=120, high=134, dtype=torch.uint8)


def positive(*shape):
    return f32(*shape).abs() / 100 + 1e-4


I8, I4, HALF, BRAIN = ("int8", "int8"), ("int4", "int4"), torch.float16, torch.bfloat16
rows = integers(3, 70)
loose = [
    (rows, integers(70, 5), positive(5), None, positive(3), None, BRAIN, I8, "vector", False),
    (rows, integers(5, 70), positive(1), None, positive(3), integers(5, dtype=torch.int32) * 100,
     BRAIN, I8, "vector", True),
    (rows, integers(70, 5), positive(5) / 100, None, positive(3), f32(5), HALF, I8, "vector",
     False),
    (rows, integers(70, 5), positive(5).bfloat16(), None, positive(3), bf16(5), BRAIN, I8, "vector",
     False),
    (rows, integers(70, 5), positive(5), None, None, bf16(5), BRAIN, I8, "vector", False),
    (integers(7, 20), integers(20, 5), positive(5) / 100, None, positive(7), None, HALF, I8,
     "vector", False),
    (integers(2, 3, 8), integers(2, 8, 5), positive(5), None, None,
     integers(2, 1, 5, dtype=torch.int32), HALF, I8, "vector", False),
    (integers(4, 7168), integers(256, 7168), positive(256) / 100, None, positive(4), None, BRAIN,
     I8, "vector", True),
    (packed(6, 3), packed(24, 1), positive(8), None, None, integers(8, dtype=torch.int32), HALF, I4,
     "vector", False),
    (packed(6, 3), packed(8, 3), positive(8), None, None, None, HALF, I4, "vector", True),
    (codes(6, 6), codes(8, 6), positive(8), None, positive(6), f32(8), HALF, I4, "vector", True),
    (codes(3, 512), codes(256, 512), positive(4, 256), f32(4, 256).half(), positive(3, 1), None,
     BRAIN, I4, "group", True),
    (integers(3, 512), integers(256, 512), positive(2, 4), None, positive(3, 4), f32(256), BRAIN,
     I8, "block", True),
]  # fmt: skip
exact = [
    # A scale just above one half, cut to one half: the results are 0, not 1.
    (torch.eye(2, 8, dtype=torch.int8), torch.ones(8, 5, dtype=torch.int8),
     torch.full((5,), 0.5 + 2**-12), None, None, None, torch.int8, I8, "vector", False),
    (rows, integers(70, 5), f32(5) / 100, f32(5) * 10, None, integers(5, dtype=torch.int32) * 100,
     None, I8, "vector", False),
    (rows, integers(70, 5), positive(1), None, None, None, torch.int8, I8, "vector", False),
    (rows, integers(70, 5), positive(5), None, None, integers(5, dtype=torch.int32), torch.int32,
     I8, "vector", False),
    (integers(2, 3, 8), integers(8, 5), positive(5), None, None, None, torch.int32, I8, "vector",
     False),
    (integers(2, 2, 3, 8), integers(2, 5, 8), positive(5), None, None, None, torch.int32, I8,
     "vector", True),
]  # fmt: skip
WIDE = torch.float32
if A5:
    for kind in FP8:
        two = (kind, "e4m3")
        exact += [
            (fp8(kind, 3, 70), fp8("e4m3", 5, 70), positive(5), None, None, f32(5), WIDE, two,
             "vector", True),
            (fp8(kind, 3, 70), fp8("e4m3", 5, 70), positive(5), None, positive(3), f32(1, 5), WIDE,
             two, "vector", True),
            (fp8(kind, 3, 70), fp8("e4m3", 70, 5), positive(1), None, positive(1), None, WIDE, two,
             "vector", False),
            (fp8(kind, 3, 200), fp8("e4m3", 130, 200), positive(2, 2), None, positive(3, 2), None,
             WIDE, two, "block", True),
            (fp8(kind, 256, 256), fp8("e4m3", 128, 256), positive(1, 2), None, positive(2, 2), None,
             WIDE, two, "block", True),
            (fp8(kind, 3, 150), fp8("e4m3", 5, 150), exponents(5, 3, 2), None, exponents(3, 3, 2),
             f32(5), WIDE, two, "mx", True),
            (fp8(kind, 2, 3, 128), fp8("e4m3", 2, 5, 128), exponents(2, 5, 2, 2), None,
             exponents(2, 3, 2, 2), None, WIDE, two, "mx", True),
        ]  # fmt: skip
    fp4 = ("e2m1", "e2m1")
    exact += [
        (codes(3, 48), codes(6, 48), exponents(6, 2, 2), None, exponents(3, 2, 2), f32(6), WIDE,
         fp4, "mx", True),
        (codes(3, 64), codes(128, 4), exponents(8, 2, 2), None, exponents(3, 2, 2), None, WIDE, fp4,
         "mx", False),
    ]  # fmt: skip
    loose += [
        (fp8("e4m3", 3, 72), codes(6, 36), exponents(6, 2, 2), None, exponents(3, 2, 2), bf16(1, 6),
         BRAIN, ("e4m3", "e2m1"), "mx", True),
        (fp8("e4m3", 2, 7168), codes(128, 3584), exponents(128, 112, 2), None, exponents(2, 112, 2),
         None, BRAIN, ("e4m3", "e2m1"), "mx", True),
    ]  # fmt: skip


def first_batch(x):
    return np.broadcast_to(x[:1], x.shape) if x.ndim > 2 else x


vector_faults = {
    "x2 not transposed": dict(turned=same),
    "no bias": dict(bias=lambda bias: 0),
    "scale of the next column": dict(scale=lambda scale: np.roll(scale, 1)),
    "bias after the scale": dict(early_bias=lambda right: False),
}
group_faults = {
    "no pertoken scale": dict(pertoken=same, pertoken_group=lambda row: row * 0 + 1),
    "pairs exchanged": dict(pairs=lambda s: s[..., ::-1]),
    "groups of 64": dict(length=lambda length: 64),
    "nibbles swapped": dict(nibbles=swapped),
}
loose_faults = vector_faults | {
    "no pertoken scale": group_faults["no pertoken scale"],
    "nibbles swapped": group_faults["nibbles swapped"],
    "INT4 without sign": dict(int4=same),
    "scales of the first group": dict(group=lambda j, last: 0),
    "offset added": dict(zero=np.add),
    "pertoken scale by column": dict(pertoken=by_column),
    "bias before the scale": dict(early_bias=lambda right: True),
}
exact_faults = vector_faults | {
    "no offset": dict(offset=same, zero=same),
    "truncated": dict(whole=np.trunc),
    "INT8 wraps": dict(int8=lambda y: y.astype(np.int64).astype(np.int8)),
    "scale not cut to 19 bits": dict(cut=same),
    "first batch only": dict(batches=first_batch),
}
if A5:
    loose_faults |= {"exponents off by one": dict(exponents=lambda s: s * 2)} | group_faults
    exact_faults |= {
        "the other FLOAT8": dict(float8={"e4m3": "e5m2", "e5m2": "e4m3"}.get)
    } | group_faults
check("quant_matmul", call, multiply, STEPS, loose, loose_faults, 6e-3)
check("quant_matmul, exact results", call, multiply, STEPS, exact, exact_faults, 3e-6)
