"""Fused operators against formulas written from their documents in NumPy, with named faults that the cases must catch.

A fault is a wrong formula, or a wrong result: the device's result must be closer to the right one than the tolerance, and every
faulty one farther away. Prints one line for each operator.
"""

import os
import sys

import numpy as np
import torch
import torch_npu

A5 = os.environ.get("SOFTNPU_SOC", "").startswith("Ascend950")
rng = np.random.default_rng(5)
problems = []


def array(x):
    return x.detach().cpu().double().numpy() if x.is_floating_point() else x.detach().cpu().numpy()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def f32(*shape, scale=1.0):
    return torch.tensor(rng.standard_normal(shape) * scale, dtype=torch.float32)


def bf16(*shape):
    return f32(*shape).bfloat16()


OUTPUT_FAULTS = {
    "one zero value": lambda y: np.where(np.arange(y.size).reshape(y.shape) == np.abs(y).argmax(), 0, y),
    "stale last row": lambda y: np.concatenate([y[:-1], np.zeros_like(y[:1])]),
    "rows shifted": lambda y: np.roll(y, 1, 0),
    "columns shifted": lambda y: np.roll(y, 1, -1),
    "scaled by 1.1": lambda y: y * 1.1,
    "a NaN": lambda y: np.where(np.arange(y.size).reshape(y.shape) == 0, np.nan, y.astype(float)),
}


def distance(got, want):
    if got.shape != want.shape:
        return np.inf
    d = np.abs(got.astype(float) - want) / (1 + np.abs(want))
    return np.inf if np.isnan(d).any() else (d.max() if d.size else 0.0)


def check(name, call, formula, cases, faults, tolerance):
    """`formula(case, fault)` gives the list of outputs; `faults` are the names it knows."""
    results = [
        [array(o) for o in call(*[a.npu() if isinstance(a, torch.Tensor) else a for a in case])] for case in cases
    ]
    worst = max(
        distance(g, w)
        for case, got in zip(cases, results, strict=False)
        for g, w in zip(got, formula(case, None), strict=True)
    )
    if not worst <= tolerance:
        problems.append(f"{name}: differs by {worst:.3g}, tolerance {tolerance}")
    alive = []
    for fault in faults:
        if not any(
            distance(g, w) > tolerance
            for case, got in zip(cases, results, strict=False)
            for g, w in zip(got, formula(case, fault), strict=True)
        ):
            alive.append(fault)
    for fault, spoil in OUTPUT_FAULTS.items():
        if not any(
            distance(spoil(w), w) > tolerance for case in cases for w in formula(case, None) if w.ndim and w.size
        ):
            alive.append(fault)
    if alive:
        problems.append(f"{name}: faults not caught: {alive}")
    print(f"{name}: {len(cases)} cases, worst {worst:.2g}, {len(faults) + len(OUTPUT_FAULTS)} faults")


def refused(name, call, argument):
    """The device must refuse this call, naming the argument."""
    try:
        call()
        torch.npu.synchronize()
    except RuntimeError as error:
        if argument not in str(error):
            problems.append(f"{name}: refused without naming {argument}: {error}")
        return
    problems.append(f"{name}: bad {argument} was accepted")


def rms(case, fault):
    x, gamma, eps = array(case[0]), array(case[1]), case[2]
    axes = tuple(range(-gamma.ndim, 0))
    square = (x**2).sum(axes, keepdims=True) if fault == "sum instead of mean" else (x**2).mean(axes, keepdims=True)
    if fault == "mean subtracted":
        square = ((x - x.mean(axes, keepdims=True)) ** 2).mean(axes, keepdims=True)
    r = (
        1 / np.sqrt(square + (0 if fault == "no epsilon" else eps))
        if fault != "epsilon outside the root"
        else 1 / (np.sqrt(square) + eps)
    )
    y = x * r * (1 if fault == "no gamma" else 1 + gamma if fault == "gamma plus one" else gamma)
    return [y, r]


norm_cases = [
    (f32(5, 7), f32(7), 1e-1),
    (f32(2, 3, 4, 8), f32(4, 8), 1e-2),
    (f32(1, 1) * 0, f32(1), 1e-1),
    (f32(3, 128), f32(128), 1e-1),
]
norm_faults = [
    "sum instead of mean",
    "no epsilon",
    "no gamma",
    "gamma plus one",
    "mean subtracted",
    "epsilon outside the root",
]
check("rms_norm", lambda x, g, e: torch_npu.npu_rms_norm(x, g, e), rms, norm_cases, norm_faults, 1e-5)
refused("rms_norm", lambda: torch_npu.npu_rms_norm(f32(3, 4).npu(), f32(5).npu()), "gamma")
refused("rms_norm", lambda: torch_npu.npu_rms_norm(f32(3, 4).npu(), f32(4).half().npu()), "gamma")


def add_rms(case, fault):
    a, b = array(case[0]), array(case[1])
    x = a if fault == "no addition" else a - b if fault == "subtraction" else a + b
    y, r = rms((torch.tensor(x), *case[2:]), fault)
    return [y, r, a if fault == "sum not stored" else x]


add_cases = [(f32(5, 7), f32(5, 7), f32(7), 1e-1), (f32(2, 3, 8), f32(2, 3, 8), f32(3, 8), 1e-2)]
check(
    "add_rms_norm",
    lambda a, b, g, e: torch_npu.npu_add_rms_norm(a, b, g, e),
    add_rms,
    add_cases,
    [*norm_faults, "no addition", "subtraction", "sum not stored"],
    1e-5,
)
refused("add_rms_norm", lambda: torch_npu.npu_add_rms_norm(f32(3, 4).npu(), f32(2, 4).npu(), f32(4).npu()), "x2")


def swiglu(case, fault):
    a, b = np.split(array(case[0]), 2, axis=-1 if fault == "last axis always" else case[1])
    if fault == "halves swapped":
        a, b = b, a
    gate = {"no sigmoid": a, "sigmoid only": sigmoid(a), "gelu": a * sigmoid(1.702 * a)}.get(fault, a * sigmoid(a))
    return [gate * (1 if fault == "no product" else b)]


check(
    "swiglu",
    lambda x, d: [torch_npu.npu_swiglu(x, d)],
    swiglu,
    [(f32(5, 6), -1), (f32(4, 2), 0), (f32(2, 4, 6), 1), (f32(1, 2), -1)],
    ["halves swapped", "no sigmoid", "sigmoid only", "gelu", "no product", "last axis always"],
    1e-5,
)
refused("swiglu", lambda: torch_npu.npu_swiglu(f32(3, 5).npu()), "dim")


def clipped(case, fault):
    x, interleaved = array(case[0]), case[1] ^ (fault == "the other split")
    alpha, limit, bias = 1.702, 2.0, 1.0
    a, b = (x[:, ::2], x[:, 1::2]) if interleaved else np.split(x, 2, -1)
    a = (
        a
        if fault == "gate not clipped"
        else np.clip(a, -limit, limit)
        if fault == "gate clipped below"
        else np.minimum(a, limit)
    )
    b = (
        b
        if fault == "up not clipped"
        else np.minimum(b, limit)
        if fault == "up clipped above only"
        else np.clip(b, -limit, limit)
    )
    return [a * sigmoid((1 if fault == "no alpha" else alpha) * a) * (b + (0 if fault == "no bias" else bias))]


def call_clipped(x, i):
    return [torch_npu.npu_clipped_swiglu(x, limit=2.0, interleaved=i)]


if A5:
    refused("clipped_swiglu", lambda: call_clipped(f32(4, 6).npu(), True), "does not exist on Ascend950")
else:
    check(
        "clipped_swiglu",
        call_clipped,
        clipped,
        [(f32(7, 6, scale=3), True), (f32(9, 8, scale=3), False)],
        [
            "the other split",
            "gate not clipped",
            "gate clipped below",
            "up not clipped",
            "up clipped above only",
            "no alpha",
            "no bias",
        ],
        1e-5,
    )
    refused("clipped_swiglu", lambda: call_clipped(f32(4, 5).npu(), True), "dim")


def rotary(case, fault):
    x, cos, sin = (array(c) for c in case[:3])
    mode = case[3] if fault != "the other mode" else {"half": "interleave", "interleave": "half"}[case[3]]
    if mode == "half":
        a, b = np.split(x, 2, -1)
        turned = np.concatenate([-b, a], -1)
    else:
        turned = np.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
    if fault == "inverse":
        turned = -turned
    if fault == "cos and sin swapped":
        cos, sin = sin, cos
    if fault == "first position only":
        cos, sin = cos[:, :1] + 0 * cos, sin[:, :1] + 0 * sin
    return [x * (1 if fault == "no cos" else cos) + turned * (0 if fault == "no sin" else sin)]


rotary_faults = ["the other mode", "inverse", "cos and sin swapped", "no cos", "no sin", "first position only"]
check(
    "rotary_mul",
    lambda x, c, s, m: [torch_npu.npu_rotary_mul(x, c, s, m)],
    rotary,
    [
        (f32(2, 5, 3, 8), f32(1, 5, 1, 8), f32(1, 5, 1, 8), "half"),
        (f32(1, 4, 2, 6), f32(1, 4, 1, 6), f32(1, 4, 1, 6), "interleave"),
    ],
    rotary_faults,
    1e-5,
)
refused(
    "rotary_mul",
    lambda: torch_npu.npu_rotary_mul(f32(1, 2, 1, 898).npu(), f32(1, 2, 1, 898).npu(), f32(1, 2, 1, 898).npu()),
    "x",
)


def interleave_rope(case, fault):
    x = array(case[0])
    q = x if fault == "not regrouped" else np.concatenate([x[..., ::2], x[..., 1::2]], -1)
    c = tuple(torch.tensor(v) for v in (q, array(case[1]), array(case[2])))
    return rotary((*c, "half"), {"first position only": "no sin"}.get(fault, fault))


check(
    "interleave_rope",
    lambda x, c, s: [torch_npu.npu_interleave_rope(x, c, s)],
    interleave_rope,
    [(bf16(2, 3, 5, 64), bf16(2, 1, 5, 64), bf16(2, 1, 5, 64))],
    ["not regrouped", *rotary_faults[:5]],
    1e-2,
)
refused(
    "interleave_rope",
    lambda: torch_npu.npu_interleave_rope(bf16(1, 1, 1, 32).npu(), bf16(1, 1, 1, 32).npu(), bf16(1, 1, 1, 32).npu()),
    "x",
)
refused("interleave_rope", lambda: torch_npu.npu_interleave_rope(*(f32(1, 1, 1, 64).npu() for _ in range(3))), "x")


def dynamic_quant(case, fault):
    x = array(case[0]).astype(np.float32)  # fp32 as the hardware: a quotient of exactly n + 1/2 hangs on it
    x = x if case[1] is None or fault == "no smoothing" else x * array(case[1]).astype(np.float32)
    if fault == "one scale for all":
        largest = np.broadcast_to(np.abs(x).max(), x.shape[:-1])
    else:
        largest = (
            np.abs(x).mean(-1) if fault == "mean" else x.max(-1) if fault == "no absolute value" else np.abs(x).max(-1)
        )
    scale = largest / np.float32({"divided by 128": 128, "divided by 255": 255}.get(fault, 127))
    q = np.divide(x, scale[..., None], out=np.zeros_like(x), where=scale[..., None] != 0)
    q = np.floor(q) if fault == "rounded down" else np.trunc(q) if fault == "truncated" else np.rint(q)
    return [np.clip(q, -128, 127), 1 / np.where(scale == 0, 1, scale) if fault == "inverse scale" else scale]


check(
    "dynamic_quant",
    lambda x, s: torch_npu.npu_dynamic_quant(x, smooth_scales=s),
    dynamic_quant,
    [(bf16(6, 40), None), (bf16(3, 2, 16), bf16(16)), (bf16(2, 8) * 0, None)],
    [
        "no smoothing",
        "one scale for all",
        "mean",
        "no absolute value",
        "divided by 128",
        "divided by 255",
        "rounded down",
        "truncated",
        "inverse scale",
    ],
    1e-5,
)
refused("dynamic_quant", lambda: torch_npu.npu_dynamic_quant(f32(3, 8).npu()), "x")


def gating(case, fault):
    x, bias, k, groups, keep, kind = array(case[0]), array(case[1]), *case[2:]
    p = softmax(x) if (kind == 0) ^ (fault == "the other norm") else sigmoid(x)
    scores = p if fault == "no bias" else p + bias
    if groups > 1 and fault != "no groups":
        g = scores.reshape(len(x), groups, -1)
        value = np.sort(g, -1)[..., -2:].sum(-1) if fault != "group by maximum" else g.max(-1)
        best = np.argsort(-value, -1, kind="stable")[:, :keep]
        mask = np.full(value.shape, -np.inf)
        np.put_along_axis(mask, best, 0, 1)
        scores = (g + mask[..., None]).reshape(scores.shape)
    if fault == "ties to the larger":
        ids = scores.shape[1] - 1 - np.argsort(-scores[:, ::-1], -1, kind="stable")[:, :k]
    else:
        ids = np.argsort(-scores, -1, kind="stable")[:, :k]
    if fault == "worst experts":
        ids = np.argsort(scores, -1, kind="stable")[:, :k]
    weights = np.take_along_axis(scores if fault == "weights with bias" else p, ids, 1)
    if kind == 1 and fault != "not normalised":
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return [weights * (1 if fault == "no factor" else 2.5), ids]


def call_gating(x, bias, k, groups, keep, kind):
    return torch_npu.npu_moe_gating_top_k(
        x,
        k,
        bias=bias,
        k_group=keep,
        group_count=groups,
        group_select_mode=1,
        norm_type=kind,
        routed_scaling_factor=2.5,
    )[:2]


tied = torch.zeros(3, 16)
check(
    "moe_gating_top_k",
    call_gating,
    gating,
    [
        (f32(9, 16), f32(16), 4, 1, 1, 1),
        (f32(7, 32), f32(32), 3, 4, 2, 1),
        (f32(5, 16), f32(16), 2, 1, 1, 0),
        (tied, torch.zeros(16), 4, 1, 1, 1),
    ],
    [
        "the other norm",
        "no bias",
        "no groups",
        "group by maximum",
        "ties to the larger",
        "worst experts",
        "weights with bias",
        "not normalised",
        "no factor",
    ],
    1e-5,
)
refused("moe_gating_top_k", lambda: call_gating(f32(2, 16).npu(), f32(16).npu(), 17, 1, 1, 1), "k")
refused("moe_gating_top_k", lambda: call_gating(f32(2, 16).npu(), f32(15).npu(), 4, 1, 1, 1), "bias")


def permute(case, fault):
    x, ids = array(case[0]), array(case[1])
    flat = ids.T.reshape(-1) if fault == "column order" else ids.reshape(-1)
    order = np.argsort(flat, kind="stable") if fault != "unstable" else np.argsort(flat[::-1], kind="stable")[::-1]
    if fault == "descending":
        order = np.argsort(-flat, kind="stable")
    place = np.argsort(order, kind="stable") if fault != "order instead of place" else order
    token = order % len(x) if fault == "modulo" else order // ids.shape[1]
    return [x[token], place]


check(
    "moe_token_permute",
    lambda x, i: torch_npu.npu_moe_token_permute(x, i),
    permute,
    [(bf16(5, 6), torch.tensor(rng.integers(0, 4, (5, 2)))), (bf16(7, 4), torch.tensor(rng.integers(0, 9, (7, 3))))],
    ["column order", "unstable", "descending", "order instead of place", "modulo"],
    1e-5,
)


def unpermute(case, fault):
    rows, place, probs = (array(c) for c in case)
    t, k = probs.shape
    back = rows[np.argsort(place) if fault == "order instead of place" else place].reshape(t, k, -1)
    if fault == "probs of another token":
        probs = np.roll(probs, 1, 0)
    if fault == "first expert only":
        back = back * (np.arange(k) == 0)[:, None]
    y = back if fault == "no probs" else back * probs[..., None]
    return [y.mean(1) if fault == "mean" else y.sum(1)]


check(
    "moe_token_unpermute",
    lambda r, i, p: [torch_npu.npu_moe_token_unpermute(r, i, p)],
    unpermute,
    [
        (bf16(10, 6), torch.tensor(rng.permutation(10), dtype=torch.int32), bf16(5, 2)),
        (bf16(21, 3), torch.tensor(rng.permutation(21), dtype=torch.int32), bf16(7, 3)),
    ],
    ["order instead of place", "probs of another token", "first expert only", "no probs", "mean"],
    1e-2,
)


def finalize(case, fault):
    rows, skip, bias, scales, index, experts = (array(c) for c in case)
    t, k = scales.shape
    place = index.reshape(t, k) if fault == "row order" else index.reshape(k, t).T
    y = rows[place]
    if fault != "no bias":
        y = y + bias[experts if fault != "bias of expert 0" else experts * 0]
    y = (y * (1 if fault == "no scales" else scales[..., None])).sum(1)
    if fault == "last expert dropped":
        y = (rows[place][:, :-1] * scales[:, :-1, None]).sum(1)
    return [y + (0 if fault == "no skip" else 2 * skip if fault == "skip twice" else skip)]


def call_finalize(rows, skip, bias, scales, index, experts):
    return [torch_npu.npu_moe_finalize_routing(rows, skip, None, bias, scales, index, experts, 0)]


check(
    "moe_finalize_routing",
    call_finalize,
    finalize,
    [
        (
            f32(12, 5),
            f32(6, 5),
            f32(4, 5),
            f32(6, 2),
            torch.tensor(rng.permutation(12), dtype=torch.int32),
            torch.tensor(rng.integers(0, 4, (6, 2)), dtype=torch.int32),
        )
    ],
    ["row order", "no bias", "bias of expert 0", "no scales", "no skip", "skip twice", "last expert dropped"],
    1e-5,
)


def grouped(case, fault):
    x, w, bias, ends = (array(c) for c in case[:4])
    counts = case[4] == 1
    if fault == "ends and counts swapped":
        counts = not counts
    ends = np.cumsum(ends) if counts else ends
    y, start = np.zeros((len(x), w.shape[2])), 0
    for i, end in enumerate(ends):
        end = min(end + (fault == "one row more") * (i == 0), len(x))
        weight = w[{"first weight for all": 0, "weights rotated": (i + 1) % len(w)}.get(fault, i)]
        y[start:end] = x[start:end] @ (weight.T if fault == "weight transposed" else weight) + (
            0 if fault == "no bias" else bias[i]
        )
        start = end if fault != "rows from the start" else 0
    return [y]


def call_grouped(x, w, bias, groups, kind):
    return torch_npu.npu_grouped_matmul(
        [x], [w], bias=[bias], group_list=groups, split_item=3, group_type=0, group_list_type=kind
    )


check(
    "grouped_matmul",
    call_grouped,
    grouped,
    [
        (f32(9, 4), f32(3, 4, 4), f32(3, 4), torch.tensor([2, 2, 9]), 0),
        (f32(6, 4), f32(3, 4, 4), f32(3, 4), torch.tensor([1, 3, 2]), 1),
    ],
    [
        "ends and counts swapped",
        "one row more",
        "first weight for all",
        "weights rotated",
        "weight transposed",
        "no bias",
        "rows from the start",
    ],
    1e-5,
)
refused(
    "grouped_matmul",
    lambda: call_grouped(f32(4, 4).npu(), f32(2, 4, 4).half().npu(), f32(2, 4).npu(), torch.tensor([1, 4]).npu(), 0),
    "weight",
)


def sinkhorn(case, fault):
    x, rounds = array(case[0]), case[1] - (fault == "a round too few")
    m = softmax(x) + 1e-2 if fault != "softmax over columns" else softmax(x.swapaxes(-1, -2)).swapaxes(-1, -2) + 1e-2
    if fault == "no softmax":
        m = np.exp(x) + 1e-2
    eps = 0 if fault == "no epsilon" else 1e-2
    for i in range(rounds):
        if i or fault == "rows first":
            m = m / (m.sum(-1, keepdims=True) + eps)
        m = m / (m.sum(-2, keepdims=True) + eps)
    return [m.swapaxes(-1, -2) if fault == "transposed" else m]


def mhc_post(case, fault):
    x, res, out, post = (array(c) for c in case)
    res = res if fault == "not transposed" else res.swapaxes(-1, -2)
    mixed = x if fault == "no mixing" else res @ x
    gate = np.roll(post, 1, -1) if fault == "streams rotated" else post
    if fault == "no branch":
        return [mixed]
    return [
        (0 if fault == "no residual" else mixed) + out[..., None, :] * (1 if fault == "no gate" else gate[..., None])
    ]


def mhc_pre(case, fault):
    x, phi, alpha, bias, gamma = (array(c) for c in case)
    n = x.shape[-2]
    flat = x.reshape(*x.shape[:-2], -1)
    r = 1 / np.sqrt((flat**2).mean(-1, keepdims=True) + (0 if fault == "no norm epsilon" else 0.5))
    z = (flat if fault == "no gamma" else (x * gamma).reshape(flat.shape)) @ phi.T * (1 if fault == "no norm" else r)
    pre, post, res = z[..., :n], z[..., n : 2 * n], z[..., 2 * n :]
    if fault == "pre and post swapped":
        pre, post = post, pre
    b = np.zeros_like(bias) if fault == "no bias" else bias
    a = np.ones(3) if fault == "no alpha" else alpha
    pre = sigmoid(a[0] * pre + b[:n]) + (0 if fault == "no epsilon" else 0.25)
    post = sigmoid(a[1] * post + b[n : 2 * n]) * (1 if fault == "post not doubled" else 2)
    res = (a[2] * res + b[2 * n :]).reshape(*x.shape[:-2], n, n)
    return [(x * pre[..., None]).sum(-2), post, res]


def call_sinkhorn(x, rounds):
    return [torch_npu.npu_mhc_sinkhorn(x, eps=1e-2, num_iters=rounds)[0]]


def call_pre(x, phi, alpha, bias, gamma):
    return torch_npu.npu_mhc_pre(x, phi, alpha, bias, gamma=gamma, norm_eps=0.5, hc_eps=0.25)[:3]


if A5:
    check(
        "mhc_sinkhorn",
        call_sinkhorn,
        sinkhorn,
        [(f32(5, 4, 4), 3), (f32(2, 3, 6, 6), 2)],
        ["a round too few", "softmax over columns", "no softmax", "no epsilon", "rows first", "transposed"],
        1e-5,
    )
    refused("mhc_sinkhorn", lambda: call_sinkhorn(f32(5, 5, 5).npu(), 3), "x")
    refused("mhc_sinkhorn", lambda: call_sinkhorn(f32(5, 4, 4).npu(), 101), "num_iters")
    check(
        "mhc_post",
        lambda *a: [torch_npu.npu_mhc_post(*a)],
        mhc_post,
        [(bf16(5, 4, 16), f32(5, 4, 4), bf16(5, 16), f32(5, 4))],
        ["not transposed", "no mixing", "streams rotated", "no branch", "no residual", "no gate"],
        1.5e-2,
    )
if A5 and os.environ.get("SOFTNPU_CANN", "8") >= "9":  # torch_npu wants this CANN for it
    check(
        "mhc_pre",
        call_pre,
        mhc_pre,
        [(bf16(5, 4, 16), f32(24, 64, scale=0.3), f32(3) + 2, f32(24), f32(4, 16))],
        [
            "no norm epsilon",
            "no gamma",
            "no norm",
            "pre and post swapped",
            "no bias",
            "no alpha",
            "no epsilon",
            "post not doubled",
        ],
        1.5e-2,
    )
else:
    refused("mhc_sinkhorn", lambda: call_sinkhorn(f32(5, 4, 4).npu(), 3), "does not exist on Ascend910")

for problem in problems:
    print("PROBLEM", problem)
print(f"fused: {len(problems)} problems")
sys.exit(bool(problems))
