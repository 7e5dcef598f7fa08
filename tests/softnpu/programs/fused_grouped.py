"""grouped_matmul: not quantised, and int8 by int8 (see fused_check.py)."""

import numpy as np
import torch
import torch_npu
from fused_check import (
    A5,
    Steps,
    array,
    bf16,
    check,
    f32,
    problems,
    reseed,
    rng,
    same,
    sigmoid,
)
from grouped_data import COUNT_FAULTS, GROUP_FAULTS, i8, low64, nz, positive, spans

reseed(__name__)
gmm = torch_npu.npu_grouped_matmul
half, brain = torch.float16, torch.bfloat16


for dtype in (torch.int8, half, brain, torch.int32):
    whole_numbers = torch.tensor(rng.integers(-100, 100, (2, 33, 70))).to(dtype)
    if not torch.equal(nz(whole_numbers).cpu(), whole_numbers):
        problems.append(f"npu_format_cast: {dtype} changes on its way to the NZ format and back")


def longs(*values):
    return torch.tensor(values)


PLAIN = Steps(
    spans=spans,
    expert=lambda place, expert: expert,
    weight=same,
    rows=lambda x, start, stop: x[start:stop],
    biased=lambda y, bias, expert: y + bias[expert],
    result=same,
)
PLAIN_FAULTS = GROUP_FAULTS | {
    "weight transposed": dict(weight=np.transpose),
    "rows from the start": dict(rows=lambda x, start, stop: x[: stop - start]),
}


def plain(case, steps):
    x, w, bias, groups, kind, _ = case
    x, w = array(x), array(w)
    y = np.zeros((spans(groups, kind)[-1][2], w.shape[2]))
    for place, (expert, start, stop) in enumerate(steps.spans(groups, kind)):
        if not 0 <= start <= stop:
            continue
        value = steps.rows(x, start, stop) @ steps.weight(w[steps.expert(place, expert)])
        value = value if bias is None else steps.biased(value, array(bias), expert)
        y[start:stop] = value[: len(y[start:stop])]
    return [steps.result(y)]


def call_plain(x, w, bias, groups, kind, form):
    w = (
        nz(w)
        if form == "nz"
        else w.transpose(1, 2).contiguous().transpose(1, 2)
        if form == "transposed"
        else w
    )
    bias = None if bias is None else [bias]
    y = gmm(
        [x], [w], bias=bias, group_list=groups, split_item=3, group_type=0, group_list_type=kind
    )[0]
    return [y[: spans(groups, kind)[-1][2]]]


pairs = torch.tensor([[2, 4], [0, 3], [1, 0]])
check(
    "grouped_matmul rows",
    call_plain,
    plain,
    PLAIN,
    [
        (f32(9, 5), f32(3, 5, 5), f32(3, 5), longs(2, 2, 9), 0, "nd"),
        (f32(11, 4), f32(3, 4, 4), f32(3, 4), longs(1, 3, 2), 1, "transposed"),
        (f32(6, 3), f32(2, 3, 3), None, longs(0, 4), 0, "transposed"),
        (
            f32(7, 6).half(),
            f32(3, 6, 6).half(),
            f32(3, 6).half(),
            longs(3, 0, 4),
            1,
            "nz" if not A5 else "nd",
        ),
        (bf16(33, 512), bf16(4, 512, 512), f32(4, 512), longs(8, 9, 30, 33), 0, "nz"),
    ]
    + ([] if A5 else [(f32(8, 4), f32(3, 4, 4), f32(3, 4), pairs, 2, "nd")]),
    PLAIN_FAULTS
    | {
        "no bias": dict(biased=same),
        "bias of expert 0": dict(biased=lambda y, bias, expert: y + bias[0]),
    }
    | ({} if A5 else {"pairs in their order": dict(expert=lambda place, expert: place)}),
    2e-2,
)


APART = Steps(
    weight=lambda weights, i: weights[i],
    turned=same,
    biased=lambda y, biases, i: y + biases[i],
    result=same,
    all=same,
)


def apart(case, steps):
    xs, ws, bs = ([array(t) for t in tensors] if tensors else None for tensors in case)
    result = []
    for i, x in enumerate(xs):
        y = x @ steps.turned(steps.weight(ws, i))
        result.append(steps.result(y if bs is None else steps.biased(y, bs, i)))
    return steps.all(result)


def first_twice(results):
    first, second, *rest = results
    return [first, first[: len(second)] if len(first) >= len(second) else second + 1, *rest]


def npu(tensors):
    return None if tensors is None else [t.npu() for t in tensors]


check(
    "grouped_matmul apart",
    lambda x, w, b: gmm(npu(x), npu(w), bias=npu(b), split_item=0, group_type=-1),
    apart,
    APART,
    [
        ([f32(3, 4), f32(5, 4)], [f32(4, 4), f32(4, 4)], [f32(4), f32(4)]),
        ([bf16(2, 8), bf16(1, 8), bf16(4, 8)], [bf16(8, 8) for _ in range(3)], None),
    ],
    {
        "weights rotated": dict(weight=lambda weights, i: weights[(i + 1) % len(weights)]),
        "first weight for all": dict(weight=lambda weights, i: weights[0]),
        "transposed": dict(turned=np.transpose),
        "no bias": dict(biased=same),
        "bias twice": dict(biased=lambda y, biases, i: y + biases[i] + biases[i]),
        "first bias": dict(biased=lambda y, biases, i: y + biases[0]),
        "rows reversed": dict(result=lambda y: y[::-1]),
        "sign lost": dict(result=np.abs),
        "first tensor twice": dict(all=first_twice),
    },
    2e-2,
)


def several(case, steps):
    xs, ws, counts = case
    x = np.concatenate([array(t) for t in xs])
    w = np.stack([array(t) for t in ws])
    counts = torch.tensor([len(t) for t in xs]) if counts is None else counts
    return plain((torch.tensor(x), torch.tensor(w), None, counts, 1, None), steps)


check(
    "grouped_matmul several tensors",
    lambda x, w, g: gmm(
        npu(x),
        npu(w),
        group_list=None if g is None else g.npu(),
        split_item=2,
        group_type=0,
        group_list_type=1,
    ),
    several,
    PLAIN,
    [
        ([f32(9, 4)], [f32(4, 4), f32(4, 4), f32(4, 4)], longs(2, 3, 4)),
        ([f32(2, 4), f32(5, 4)], [f32(4, 4), f32(4, 4)], longs(2, 5)),
    ],
    PLAIN_FAULTS | {"every row negated": dict(result=np.negative)},
    1e-5,
)


DEPTH = Steps(
    spans=spans,
    start=same,
    weight=lambda w, start, end: w[start:end],
    product=np.matmul,
    results=same,
    place=lambda place, expert: expert,
)


def depth(case, steps):
    x, w, groups, kind = array(case[0]), array(case[1]), case[2], case[3]
    result = []
    for _, start, end in steps.spans(groups, kind):
        start, end = steps.start(start), max(steps.start(start), end)
        b = steps.weight(w, start, end)
        result.append(steps.product(x[:, start:end][:, : len(b)], b))
    result = steps.results(result)
    experts = [expert for expert, _, _ in spans(groups, kind)]
    y = np.zeros((len(experts), *result[0].shape))
    for place, (expert, value) in enumerate(zip(experts, result, strict=False)):
        y[steps.place(place, expert)] = value
    return [y]


def turned_product(a, b):
    return a.T[: len(a)] @ b if a.shape[0] == a.shape[1] else a @ b


check(
    "grouped_matmul depth",
    lambda x, w, g, kind: gmm(
        [x.t().contiguous().t()],
        [w],
        group_list=g,
        split_item=3,
        group_type=2,
        group_list_type=kind,
    ),
    depth,
    DEPTH,
    [
        (f32(3, 9), f32(9, 5), longs(2, 5, 9), 0),
        (f32(4, 8), f32(8, 3), longs(4, 0, 3), 1),
        (bf16(6, 64), bf16(64, 16), longs(16, 64), 0),
    ]
    + ([] if A5 else [(f32(3, 8), f32(8, 5), pairs, 2)]),
    {
        name: GROUP_FAULTS[name]
        for name in ("ends and counts swapped", "one row more", "last group lost")
    }
    | {
        "from the start": dict(start=lambda start: 0),
        "weight one row on": dict(weight=lambda w, start, end: w[start + 1 : end + 1]),
        "x transposed": dict(product=turned_product),
        "groups summed": dict(results=lambda results: [sum(results)] * len(results)),
        "reversed": dict(results=lambda results: results[::-1]),
    }
    | ({} if A5 else {"pairs in their order": dict(place=lambda place, expert: place)}),
    2e-2,
)

ACT = {
    0: lambda y: y,
    1: lambda y: np.maximum(y, 0),
    2: lambda y: y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3))),
    4: lambda y: y * sigmoid(1.702 * y),
    5: lambda y: y * sigmoid(y),
}


A8W8 = Steps(
    spans=spans,
    early_bias=lambda bias: bias is not None and bias.dtype == torch.int32,
    biased=np.add,
    per_token=lambda scale, start, end: scale[start:end],
    scale=lambda scale, expert: scale[expert],
    act=same,
)


def a8w8(case, steps):
    x, w, bias, scale, per_token, act, out, _ = case
    x, w, s = (
        array(x).astype(float),
        array(w).astype(float),
        None if scale is None else array(scale),
    )
    early = steps.early_bias(bias)
    y = np.zeros((len(x), w.shape[2]))
    for expert, start, end in steps.spans(longs(3, 0, len(x) - 3), 1):
        acc = x[start:end] @ w[expert]
        b = 0 if bias is None else array(bias)[expert]
        acc = steps.biased(acc, b) if early else acc
        if out == torch.int32:
            y[start:end] = acc[: len(y[start:end])]
            continue
        p = 1 if per_token is None else steps.per_token(array(per_token)[:, None], start, end)
        acc = acc * steps.scale(s, expert) * p
        acc = ACT[steps.act(act)](acc if early else steps.biased(acc, b))
        y[start:end] = (
            np.clip(np.round(acc), -128, 127)[: len(y[start:end])]
            if out == torch.int8
            else acc[: len(y)]
        )
    return [y]


def call_a8w8(x, w, bias, scale, per_token, act, out, form):
    if scale is not None and out == torch.int8:
        scale = low64(scale.cpu()).npu()
    return gmm(
        [x],
        [nz(w) if form == "nz" else w],
        bias=None if bias is None else [bias],
        scale=None if scale is None else [scale],
        per_token_scale=None if per_token is None else [per_token],
        group_list=longs(3, 0, len(x) - 3).npu(),
        split_item=2,
        group_type=0,
        group_list_type=1,
        act_type=act,
        output_dtype=out,
    )


def scales(e, n, dtype=torch.float32):
    return (positive(e, n) / 64).to(dtype)


def whole(*shape):
    return torch.tensor(rng.integers(-4000, 4000, shape), dtype=torch.int32)


# 19 bits are read for an int8 result.
trunk = (scales(3, 5).view(torch.int32) & ~0x1FFF).view(torch.float32)
check(
    "grouped_matmul A8W8",
    call_a8w8,
    a8w8,
    A8W8,
    [
        (i8(9, 20), i8(3, 20, 5), None, scales(3, 5), positive(9), 0, half, "nd"),
        (
            i8(9, 20),
            i8(3, 20, 6),
            whole(3, 6),
            scales(3, 6, brain),
            positive(9) * 9,
            0,
            brain,
            "nz",
        ),
        (i8(40, 256), i8(3, 256, 64), None, scales(3, 64, brain), positive(40), 0, brain, "nz"),
        (i8(7, 33), i8(3, 33, 5), None, None, None, 0, torch.int32, "nd"),
        (i8(7, 33), i8(3, 33, 5), whole(3, 5), trunk, None, 0, torch.int8, "nd"),
        *(
            (i8(7, 33), i8(3, 33, 5), None, scales(3, 5), None, act, half, "nd")
            for act in (1, 2, 4, 5)
        ),
    ]
    + ([(i8(7, 33), i8(3, 33, 5), f32(3, 5), scales(3, 5), None, 0, brain, "nd")] if A5 else []),
    COUNT_FAULTS
    | {
        "no bias": dict(biased=same),
        "bias behind the scale": dict(early_bias=lambda bias: False),
        "no per-token scale": dict(per_token=lambda scale, start, end: 1),
        "per-token scale from the start": dict(
            per_token=lambda scale, start, end: scale[: end - start]
        ),
        "scale of expert 0": dict(scale=lambda scale, expert: scale[0]),
        "one scale": dict(scale=lambda scale, expert: scale[expert][0]),
        "act": dict(act=lambda act: {1: 5, 2: 4, 4: 5, 5: 1}.get(act, act)),
        "no activation": dict(act=lambda act: 0),
    },
    2e-2,
)
