"""grouped_matmul: the FP8, MX and NZ forms of A5 (imported by fused_grouped_quant.py there)."""

import numpy as np
import torch
import torch_npu
from fused_check import Steps, array, bf16, check, f32, refused, reseed, same
from fused_grouped_quant import (
    BIAS_FAULTS,
    E2M1,
    E8M0,
    MIXED_FAULTS,
    ROW_FAULTS,
    antiquant_case,
    brain,
    family,
    gmm,
    half,
    send,
    values,
)
from grouped_data import FP4, codes4, e8m0, exponent, fp8, i4, i8, low64, nz, pack4, positive

reseed(__name__)
E4M3 = torch.float8_e4m3fn


def up(size, block):
    return -(-size // block)


def fp8_case(m, k, n, counts, scale, rows, dtype=E4M3, out=brain):
    """`scale`: column, weight or block; `rows`: row, weight, block or None."""
    e = len(counts)
    x, w = fp8(m, k, dtype=dtype), fp8(e, k, n, dtype=dtype)
    shapes = {
        "column": (e, n),
        "weight": (e,),
        "wide": (e, 1),
        "block": (e, up(k, 128), up(n, 128)),
    }
    s = positive(*shapes[scale])
    r = positive(*{"row": (m,), "weight": (e, 1), "block": (m, up(k, 128))}[rows]) if rows else None
    wide = array(s).reshape(e, 1, -1) if scale != "block" else np.repeat(array(s), 128, 2)[:, :, :n]
    wide = (
        np.broadcast_to(wide, (e, wide.shape[1], n))
        if scale != "block"
        else np.repeat(wide, 128, 1)[:, :k]
    )
    each = None if r is None else array(r)
    if rows == "weight":
        each = np.concatenate([np.repeat(each[i : i + 1, 0], c) for i, c in enumerate(counts)])
    if rows == "block":
        each = np.repeat(each, 128, 1)[:, :k]
    call = {"x": x, "weight": w, "scale": s, "per_token_scale": r, "output_dtype": out}
    return {"counts": counts, "call": call, "values": values(array(x), array(w), wide, rows=each)}


def static_case(m, k, n, counts):
    case = fp8_case(m, k, n, counts, "column", None)
    # 19 bits are read.
    cut = (case["call"]["scale"].view(torch.int32) & ~0x1FFF).view(torch.float32)
    case["call"]["scale"] = low64(cut)
    case["values"][2] = array(cut)[:, None]
    return case


def mx_scales(e, m, k, n, transposed):
    s, r = e8m0(e, up(k, 64), n, 2), e8m0(m, up(k, 64), 2)
    sent = s.transpose(1, 2).contiguous().npu().transpose(1, 2) if transposed else s.npu()
    wide = exponent(s.permute(0, 1, 3, 2).reshape(e, -1, n))
    return (
        sent,
        r,
        np.repeat(wide, 32, 1)[:, :k],
        np.repeat(exponent(r.reshape(m, -1)), 32, 1)[:, :k],
    )


def mx_case(m, k, n, counts, transposed=False, dtype=E4M3, out=brain):
    e = len(counts)
    x, w = fp8(m, k, dtype=dtype), fp8(e, k, n, dtype=dtype)
    s, r, wide, each = mx_scales(e, m, k, n, transposed)
    sent = w.transpose(1, 2).contiguous().npu().transpose(1, 2) if transposed else w.npu()
    call = {"x": x, "weight": [sent], "scale": [s], "per_token_scale": r, "output_dtype": out}
    call |= {"scale_dtype": E8M0, "per_token_scale_dtype": E8M0}
    return {"counts": counts, "call": call, "values": values(array(x), array(w), wide, rows=each)}


def fp4_case(m, k, n, counts, transposed):
    e = len(counts)
    x, w, bias = codes4(m, k), codes4(e, k, n), f32(e, n)
    s, r, wide, each = mx_scales(e, m, k, n, transposed)
    sent = (
        pack4(w.transpose(1, 2).contiguous()).npu().transpose(1, 2)
        if transposed
        else pack4(w).npu()
    )
    call = {
        "x": pack4(x),
        "weight": [sent],
        "scale": [s],
        "per_token_scale": r,
        "bias": bias,
        "output_dtype": half,
    }
    call |= {
        "scale_dtype": E8M0,
        "per_token_scale_dtype": E8M0,
        "x_dtype": E2M1,
        "weight_dtype": E2M1,
    }
    call["output_dtype"] = torch.float32
    return {
        "counts": counts,
        "call": call,
        "values": values(FP4[x], FP4[w], wide, rows=each, bias=array(bias)),
    }


def nz_fp4(codes):
    """Packed FP4 in the NZ format with tiles of 32 values."""
    return torch_npu.npu_format_cast(pack4(codes).npu(), 29, customize_dtype=E4M3, input_dtype=E2M1)


def w4_case(m, k, n, counts, out):
    e = len(counts)
    x, w, bias = fp8(m, k), codes4(e, k, n), f32(e, n).to(out)
    s, r, wide, each = mx_scales(e, m, k, n, True)
    call = {
        "x": x,
        "weight": [nz_fp4(w.transpose(1, 2).contiguous()).transpose(1, 2)],
        "antiquant_scale": [s],
    }
    call |= {
        "per_token_scale": r,
        "bias": bias,
        "output_dtype": out,
        "weight_dtype": E2M1,
        "per_token_scale_dtype": E8M0,
    }
    return {
        "counts": counts,
        "call": call,
        "values": values(array(x), FP4[w], wide, rows=each, bias=array(bias)),
    }


def several_mx_case(m, k, n, counts):
    """One FP8 weight in the NZ format for each group."""
    case = mx_case(m, k, n, counts)
    case["call"]["weight"] = [nz(w.contiguous()) for w in case["call"]["weight"][0].cpu()]
    case["call"]["scale"] = [s.contiguous() for s in case["call"]["scale"][0]]
    return case


def half_fp4_case(m, k, n, counts):
    e = len(counts)
    x, w, s, bias = bf16(m, k), codes4(e, k, n), e8m0(e, k // 32, n), f32(e, n)
    tiled = torch_npu.npu_format_cast(torch.tensor(FP4[w]).float().npu(), 29, customize_dtype=half)
    call = {
        "x": x,
        "weight": [torch_npu.npu_convert_weight_to_int4pack(tiled)],
        "antiquant_scale": s,
        "bias": bias,
    }
    call["output_dtype"] = brain
    return {
        "counts": counts,
        "call": call,
        "values": values(array(x), FP4[w], exponent(s), bias=array(bias)),
    }


def kcg_case(m, k, n, counts, length):
    """int8 by int4 in the NZ format, with scales of the columns and of groups along K."""
    e = len(counts)
    x, w, bias = i8(m, k), i4(e, k, n), f32(e, n)
    groups, columns, r = positive(e, k // length, n, dtype=half), positive(e, n), positive(m)
    tiled = torch_npu.npu_format_cast(w.int().npu(), 29, customize_dtype=half)
    call = {
        "x": x,
        "weight": [torch_npu.npu_convert_weight_to_int4pack(tiled)],
        "antiquant_scale": groups,
    }
    call |= {"scale": columns, "per_token_scale": r, "bias": bias, "output_dtype": half}
    wide = array(groups) * array(columns)[:, None]
    return {
        "counts": counts,
        "call": call,
        "values": values(array(x), array(w), wide, rows=array(r), bias=array(bias)),
    }


def fp8_weight_case(m, k, n, counts):
    case = antiquant_case(m, k, n, counts, 1, brain, False, False, True)
    w = fp8(len(counts), k, n)
    case["call"]["weight"] = [w.transpose(1, 2).contiguous().npu().transpose(1, 2)]
    case["values"][1] = array(w)
    return case


family(
    "grouped_matmul FP8",
    [
        fp8_case(9, 20, 5, (3, 0, 6), "column", "row"),
        fp8_case(
            9, 20, 5, (3, 2, 4), "weight", "weight", dtype=torch.float8_e5m2, out=torch.float32
        ),
        fp8_case(9, 20, 5, (3, 2, 4), "wide", None, out=half),
        fp8_case(5, 300, 200, (2, 3), "block", "block"),
        fp8_case(40, 1024, 256, (8, 2, 30), "block", "block"),
        static_case(9, 33, 6, (4, 5)),
    ],
    MIXED_FAULTS | ROW_FAULTS,
    send,
)
family(
    "grouped_matmul MX",
    [
        mx_case(9, 64, 6, (3, 0, 6)),
        mx_case(9, 100, 5, (4, 5), transposed=True, out=torch.float32),
        mx_case(33, 512, 64, (3, 20, 10), transposed=True, out=half),
        several_mx_case(9, 128, 64, (3, 0, 6)),
        fp4_case(9, 70, 8, (3, 0, 6), False),
        fp4_case(12, 256, 64, (5, 7), True),
    ],
    MIXED_FAULTS | ROW_FAULTS | BIAS_FAULTS,
    send,
)
family(
    "grouped_matmul FP8 by FP4, float by FP8 and FP4, int8 by int4",
    [
        w4_case(9, 64, 32, (3, 0, 6), brain),
        w4_case(21, 256, 96, (5, 16), half),
        fp8_weight_case(9, 20, 5, (4, 5)),
        half_fp4_case(9, 64, 32, (3, 6)),
        kcg_case(9, 256, 64, (3, 6), 128),
    ],
    MIXED_FAULTS | ROW_FAULTS | BIAS_FAULTS,
    send,
)


def along_depth(kind):
    """x and weight grouped along K, where a group's scales start at K / block + group."""
    ends, k, m, n = (128, 384, 640), 640, 6, 10
    x, w, g = fp8(m, k), fp8(k, n), 3
    if kind == "mx":
        s, r = e8m0(k // 64 + g, n, 2), e8m0(m, k // 64 + g, 2)
        factors, block, scales, rows = (
            {"scale_dtype": E8M0, "per_token_scale_dtype": E8M0},
            64,
            exponent(s),
            exponent(r),
        )
        r = r.transpose(0, 1).contiguous().npu().transpose(0, 1)
    else:
        s, r = positive(k // 128 + g, 1), positive(m, k // 128 + g)
        factors, block, scales, rows = {}, 128, array(s), array(r)
        r = r.t().contiguous().npu().t()

    def call(_):
        return gmm(
            [x.t().contiguous().npu().t()],
            [w.npu()],
            scale=[s.npu()],
            per_token_scale=[r],
            group_list=torch.tensor(ends).npu(),
            split_item=2,
            group_type=2,
            output_dtype=torch.float32,
            **factors,
        )

    def formula(_, steps):
        result, start, size = [], 0, 128 if kind == "block" else 32
        for i, end in enumerate(ends):
            y = np.zeros((m, n))
            for j in range(start, end, size):
                at = j // block + steps.gap(i)
                pair = () if kind == "block" else (steps.of_pair(j // 32 % 2),)
                a, b = (
                    steps.of_x(rows[(slice(None), at, *pair)]),
                    steps.of_weight(scales[(at, ..., *pair)]),
                )
                part = slice(j, j + size)
                y = (
                    steps.summed(y)
                    + (array(x)[:, part] @ array(w)[part]) * np.outer(a, np.ones(n)) * b
                )
            result.append(y)
            start = steps.next(end)
        return [np.stack(steps.results(result))]

    return call, formula


DEPTH = Steps(
    gap=same, of_pair=same, of_x=same, of_weight=same, summed=same, next=same, results=same
)
depth_faults = {
    "no gap": dict(gap=lambda i: 0),
    "no scale of x": dict(of_x=np.ones_like),
    "no scale of weight": dict(of_weight=np.ones_like),
    "last block only": dict(summed=lambda y: y * 0),
    "from the start": dict(next=lambda end: 0),
    "groups reversed": dict(results=lambda results: results[::-1]),
    "summed": dict(results=lambda results: [sum(results)] * len(results)),
}
for which, more in (("block", {}), ("mx", {"first of the pair": dict(of_pair=lambda place: 0)})):
    run, formula = along_depth(which)
    check(f"grouped_matmul depth {which}", run, formula, DEPTH, [(0,)], depth_faults | more, 1e-4)


def with_(case, **changes):
    case["call"].update(changes)
    return lambda: send(case)


def small():
    return fp8_case(9, 20, 5, (3, 0, 6), "column", "row")


for argument, call in [
    ("scale", with_(small(), scale=positive(3, 4))),
    ("scale", with_(small(), scale=bf16(3, 5))),
    ("per_token_scale", with_(small(), per_token_scale=positive(8))),
    ("bias", with_(small(), bias=f32(3, 5))),
    ("out", with_(small(), output_dtype=torch.int8)),
    ("act_type", with_(small(), act_type=1)),
    (
        "tuning_config",
        with_(antiquant_case(4, 8, 4, (1, 3), 1, half, False, False, False), tuning_config=[1]),
    ),
    ("scale", with_(mx_case(9, 64, 6, (4, 5)), scale=e8m0(2, 2, 6, 2))),
    ("scale", with_(mx_case(9, 128, 6, (4, 5), transposed=True), scale=e8m0(2, 2, 6, 2))),
    ("per_token_scale", with_(mx_case(9, 64, 6, (4, 5)), per_token_scale=e8m0(9, 2, 2))),
    (
        "antiquant_scale",
        with_(w4_case(9, 64, 32, (4, 5), brain), antiquant_scale=e8m0(2, 32, 2, 2)),
    ),
    (
        "weight",
        with_(antiquant_case(9, 20, 5, (4, 5), 1, brain, False, False, True), weight=fp8(2, 20, 5)),
    ),
    ("x", with_(small(), x=i8(9, 20).to(torch.int16))),
    ("weight", with_(small(), weight=i4(3, 20, 5))),
]:
    refused("grouped_matmul A5", call, argument)
