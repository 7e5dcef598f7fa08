"""npu_quant_matmul (see fused_check.py)."""

import numpy as np
import torch
import torch_npu
from fused_check import A5, array, bf16, check, f32, rng
from fused_formats import decode, reseed, scale_of, signed, unpack

reseed()
E8M0, FP4, INT4 = torch_npu.float8_e8m0fnu, torch_npu.float4_e2m1fn_x2, torch_npu.int4
FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def raw(x):
    return x.view(torch.uint8).numpy()


def matrix(x, kind, fault):
    """Values of a matrix stored row by row."""
    if kind == "int8":
        return x.numpy().astype(float)
    if kind == "int4":
        nibbles = unpack(raw(x.contiguous()))
        if fault == "nibbles swapped":
            nibbles = nibbles.reshape(*nibbles.shape[:-1], -1, 2)[..., ::-1].reshape(nibbles.shape)
        return (nibbles if fault == "INT4 without sign" else signed(nibbles)).astype(float)
    if kind == "e2m1":
        nibbles = unpack(raw(x))
        if fault == "nibbles swapped":
            nibbles = nibbles.reshape(*nibbles.shape[:-1], -1, 2)[..., ::-1].reshape(nibbles.shape)
        return decode(nibbles, kind)
    other = {"e4m3": "e5m2", "e5m2": "e4m3"}[kind]
    return np.nan_to_num(decode(raw(x), other if fault == "the other FLOAT8" else kind))


def turned(x, case, fault):
    transposed = case[-1]
    return np.swapaxes(x, -1, -2) if transposed and fault != "x2 not transposed" else x


def grown(scale, count, axis, size):
    return np.repeat(scale, count, axis).take(range(size), axis)


def grouped(a, b, case, fault):
    scale, offset, pertoken, mode = case[2], case[3], case[4], case[8]
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    if mode == "mx":
        s1, s2 = scale_of(raw(pertoken)), scale_of(raw(scale))
        if fault == "exponents off by one":
            s1 = s1 * 2
        if fault == "pairs exchanged":
            s1, s2 = s1[..., ::-1], s2[..., ::-1]
        size = 64 if fault == "groups of 64" else 32
        s1, s2 = (s.reshape(*s.shape[:-2], -1) for s in (s1, s2))
        s2 = np.swapaxes(s2, -1, -2)  # stored [n, pairs, 2]
        size_m = size_n = 1
    else:
        s1, s2 = array(pertoken), array(scale)
        size, size_n = (256, 1) if mode == "group" else (64 if fault == "groups of 64" else 128, 128)
        s2 = s2 if mode == "group" else turned(s2, case, None)
        size_m = 1 if s1.shape[-2] == m else 128
    out = 0
    for j, start in enumerate(range(0, k, size)):
        part = slice(start, start + size)
        left, right = a[..., part], b[..., part, :]
        if offset is not None and fault != "no offset":
            right = right - array(offset)[j] * (-1 if fault == "offset added" else 1)
        j = 0 if fault == "scales of the first group" else min(j, s2.shape[-2] - 1)
        row = s1[..., 0 if mode == "group" else j][..., None]
        row = row if fault != "no pertoken scale" else row * 0 + 1
        out = out + left @ right * grown(row, size_m, -2, m) * grown(s2[..., j : j + 1, :], size_n, -1, n)
    return out


def multiply(case, fault):
    x1, x2, scale, offset, pertoken, bias, out, kinds, mode, _ = case
    a, b = matrix(x1, kinds[0], fault), turned(matrix(x2, kinds[1], fault), case, fault)
    if b.shape[-2] != a.shape[-1]:
        return [np.zeros((1,))]
    if fault == "first batch only":
        a, b = (
            np.broadcast_to(a[:1], a.shape) if a.ndim > 2 else a,
            np.broadcast_to(b[:1], b.shape) if b.ndim > 2 else b,
        )
    bias = array(bias) if bias is not None and fault != "no bias" else 0
    if mode != "vector":
        return [grouped(a, b, case, fault) + bias]
    acc = a @ b
    static = (pertoken is None and out not in (torch.int32, torch.bfloat16)) or (kinds[0] in FP8 and pertoken is None)
    early = case[5] is not None and (case[5].dtype == torch.int32 or static)
    if fault == "bias after the scale":
        early = False
    if fault == "bias before the scale":
        early = True
    acc = acc + bias if early else acc
    if out == torch.int32:
        return [acc]
    s2 = array(scale).astype(np.float32)
    if static and fault != "scale not cut to 19 bits":
        s2 = (s2.view(np.uint32) & 0xFFFFE000).view(np.float32)
    if fault == "scale of the next column":
        s2 = np.roll(s2, 1)
    y = np.float32(acc) * s2
    if pertoken is not None and fault != "no pertoken scale":
        s1 = array(pertoken)
        y = y * (s1[: y.shape[-1]] if fault == "pertoken scale by column" and len(s1) >= y.shape[-1] else s1[:, None])
    y = y if early else y + bias
    if offset is not None and fault != "no offset":
        y = y + array(offset).astype(np.float32)
    if out in (None, torch.int8):
        y = np.trunc(y) if fault == "truncated" else np.rint(y)
        y = y.astype(np.int64).astype(np.int8) if fault == "INT8 wraps" else np.clip(y, -128, 127)
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
    (
        rows,
        integers(5, 70),
        positive(1),
        None,
        positive(3),
        integers(5, dtype=torch.int32) * 100,
        BRAIN,
        I8,
        "vector",
        True,
    ),
    (rows, integers(70, 5), positive(5) / 100, None, positive(3), f32(5), HALF, I8, "vector", False),
    (rows, integers(70, 5), positive(5).bfloat16(), None, positive(3), bf16(5), BRAIN, I8, "vector", False),
    (rows, integers(70, 5), positive(5), None, None, bf16(5), BRAIN, I8, "vector", False),
    (
        integers(2, 3, 8),
        integers(2, 8, 5),
        positive(5),
        None,
        None,
        integers(2, 1, 5, dtype=torch.int32),
        HALF,
        I8,
        "vector",
        False,
    ),
    (integers(4, 7168), integers(256, 7168), positive(256) / 100, None, positive(4), None, BRAIN, I8, "vector", True),
    (packed(6, 3), packed(24, 1), positive(8), None, None, integers(8, dtype=torch.int32), HALF, I4, "vector", False),
    (packed(6, 3), packed(8, 3), positive(8), None, None, None, HALF, I4, "vector", True),
    (codes(6, 6), codes(8, 6), positive(8), None, positive(6), f32(8), HALF, I4, "vector", True),
    (
        codes(3, 512),
        codes(256, 512),
        positive(4, 256),
        f32(4, 256).half(),
        positive(3, 1),
        None,
        BRAIN,
        I4,
        "group",
        True,
    ),
    (integers(3, 512), integers(256, 512), positive(2, 4), None, positive(3, 4), f32(256), BRAIN, I8, "block", True),
]
exact = [
    # A scale just above one half, cut to one half: the results are 0, not 1.
    (
        torch.eye(2, 8, dtype=torch.int8),
        torch.ones(8, 5, dtype=torch.int8),
        torch.full((5,), 0.5 + 2**-12),
        None,
        None,
        None,
        torch.int8,
        I8,
        "vector",
        False,
    ),
    (
        rows,
        integers(70, 5),
        f32(5) / 100,
        f32(5) * 10,
        None,
        integers(5, dtype=torch.int32) * 100,
        None,
        I8,
        "vector",
        False,
    ),
    (rows, integers(70, 5), positive(1), None, None, None, torch.int8, I8, "vector", False),
    (rows, integers(70, 5), positive(5), None, None, integers(5, dtype=torch.int32), torch.int32, I8, "vector", False),
    (integers(2, 3, 8), integers(8, 5), positive(5), None, None, None, torch.int32, I8, "vector", False),
    (integers(2, 2, 3, 8), integers(2, 5, 8), positive(5), None, None, None, torch.int32, I8, "vector", True),
]
WIDE = torch.float32
if A5:
    for kind in FP8:
        two = (kind, "e4m3")
        exact += [
            (fp8(kind, 3, 70), fp8("e4m3", 5, 70), positive(5), None, None, f32(5), WIDE, two, "vector", True),
            (
                fp8(kind, 3, 70),
                fp8("e4m3", 5, 70),
                positive(5),
                None,
                positive(3),
                f32(1, 5),
                WIDE,
                two,
                "vector",
                True,
            ),
            (fp8(kind, 3, 70), fp8("e4m3", 70, 5), positive(1), None, positive(1), None, WIDE, two, "vector", False),
            (
                fp8(kind, 3, 200),
                fp8("e4m3", 130, 200),
                positive(2, 2),
                None,
                positive(3, 2),
                None,
                WIDE,
                two,
                "block",
                True,
            ),
            (
                fp8(kind, 256, 256),
                fp8("e4m3", 128, 256),
                positive(1, 2),
                None,
                positive(2, 2),
                None,
                WIDE,
                two,
                "block",
                True,
            ),
            (
                fp8(kind, 3, 150),
                fp8("e4m3", 5, 150),
                exponents(5, 3, 2),
                None,
                exponents(3, 3, 2),
                f32(5),
                WIDE,
                two,
                "mx",
                True,
            ),
            (
                fp8(kind, 2, 3, 128),
                fp8("e4m3", 2, 5, 128),
                exponents(2, 5, 2, 2),
                None,
                exponents(2, 3, 2, 2),
                None,
                WIDE,
                two,
                "mx",
                True,
            ),
        ]
    fp4 = ("e2m1", "e2m1")
    exact += [
        (codes(3, 48), codes(6, 48), exponents(6, 2, 2), None, exponents(3, 2, 2), f32(6), WIDE, fp4, "mx", True),
        (codes(3, 64), codes(128, 4), exponents(8, 2, 2), None, exponents(3, 2, 2), None, WIDE, fp4, "mx", False),
    ]
    loose += [
        (
            fp8("e4m3", 3, 72),
            codes(6, 36),
            exponents(6, 2, 2),
            None,
            exponents(3, 2, 2),
            bf16(1, 6),
            BRAIN,
            ("e4m3", "e2m1"),
            "mx",
            True,
        ),
        (
            fp8("e4m3", 2, 7168),
            codes(128, 3584),
            exponents(128, 112, 2),
            None,
            exponents(2, 112, 2),
            None,
            BRAIN,
            ("e4m3", "e2m1"),
            "mx",
            True,
        ),
    ]
vector_faults = ["x2 not transposed", "no bias", "scale of the next column", "bias after the scale"]
check(
    "quant_matmul",
    call,
    multiply,
    loose,
    [
        *vector_faults,
        "no pertoken scale",
        "nibbles swapped",
        "INT4 without sign",
        "scales of the first group",
        "offset added",
        "bias before the scale",
        *(["exponents off by one", "pairs exchanged", "groups of 64"] if A5 else []),
    ],
    6e-3,
)
check(
    "quant_matmul, exact results",
    call,
    multiply,
    exact,
    [
        *vector_faults,
        "no offset",
        "truncated",
        "INT8 wraps",
        "scale not cut to 19 bits",
        "first batch only",
        *(
            ["the other FLOAT8", "no pertoken scale", "pairs exchanged", "groups of 64", "nibbles swapped"]
            if A5
            else []
        ),
    ],
    3e-6,
)
