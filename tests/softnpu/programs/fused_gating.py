"""moe_gating_top_k, by scores and by a table of token ids (see fused_check.py)."""

import numpy as np
import torch
import torch_npu
from fused_check import (
    A5,
    CANN,
    Steps,
    array,
    bf16,
    check,
    f32,
    refused,
    rng,
    same,
    sigmoid,
    softmax,
)

SOFTMAX, SIGMOID, ROOT = 0, 1, 2
EPS, FACTOR = 0.25, 2.5


def norm(x, kind):
    return (
        softmax(x)
        if kind == SOFTMAX
        else sigmoid(x)
        if kind == SIGMOID
        else np.sqrt(np.logaddexp(0, x))
    )


def grouped(scores, groups, keep, by_maximum):
    g = scores.reshape(len(scores), groups, -1)
    value = g.max(-1) if by_maximum else np.sort(g, -1)[..., -2:].sum(-1)
    best = np.argsort(-value, -1, kind="stable")[:, :keep]
    mask = np.full(value.shape, -np.inf)
    np.put_along_axis(mask, best, 0, 1)
    return (g + mask[..., None]).reshape(scores.shape)


def best(scores, k):
    return np.argsort(-scores, -1, kind="stable")[:, :k]


STEPS = Steps(
    norm=norm,
    biased=np.add,
    groups=grouped,
    best=best,
    row=lambda table, ids, chosen: table[ids],
    weights=lambda p, scores: p,
    normalised=lambda w, p: w / (w.sum(-1, keepdims=True) + EPS),
    factor=FACTOR,
    shown=lambda p, scores: p,
)


def gating(case, steps):
    x, bias, ids, table = (None if c is None else array(c) for c in case[:4])
    k, groups, keep, select, renorm, kind = case[4:]
    p = steps.norm(x, kind)
    scores = p if bias is None else steps.biased(p, bias)
    if groups > 1:
        scores = steps.groups(scores, groups, keep, select == 0)
    experts = steps.best(scores, k)
    if table is not None:
        experts = steps.row(table, ids, experts)
    weights = np.take_along_axis(steps.weights(p, scores), experts, 1)
    if kind != SOFTMAX or renorm:
        weights = steps.normalised(weights, p)
    return [weights * steps.factor, experts, steps.shown(p, scores)]


def call_gating(x, bias, ids, table, k, groups, keep, select, renorm, kind):
    return torch_npu.npu_moe_gating_top_k(
        x,
        k,
        bias=bias,
        input_ids=ids,
        tid2eid=table,
        k_group=keep,
        group_count=groups,
        group_select_mode=select,
        renorm=renorm,
        norm_type=kind,
        out_flag=True,
        routed_scaling_factor=FACTOR,
        eps=EPS,
    )


def by_table(
    tokens, experts, k, keys, kind, groups=1, types=(torch.int32, torch.int64), renorm=0, bias=None
):
    ids = torch.tensor(rng.integers(0, keys, tokens), dtype=types[0])
    table = torch.tensor(
        np.stack([rng.permutation(experts)[:k] for _ in range(keys)]), dtype=types[1]
    )
    return f32(tokens, experts), bias, ids, table, k, groups, groups, 1, renorm, kind


NONE = (None, None)
tied = torch.zeros(3, 16)
cases = [
    (f32(9, 16), f32(16), *NONE, 4, 1, 1, 0, 0, SIGMOID),
    (f32(64, 32), f32(32, scale=0.2), *NONE, 3, 4, 2, 1, 0, SIGMOID),
    (f32(64, 32), None, *NONE, 3, 4, 2, 0, 0, SOFTMAX),
    (f32(5, 16), f32(16), *NONE, 2, 1, 1, 1, 0, SOFTMAX),
    (tied, torch.zeros(16), *NONE, 4, 1, 1, 1, 0, SIGMOID),
    (f32(7, 256), f32(256, scale=0.1), *NONE, 6, 1, 1, 0, 0, SIGMOID),
    (f32(3, 384), f32(384, scale=0.1), *NONE, 6, 1, 1, 0, 0, SIGMOID),
    (f32(5, 2048), None, *NONE, 1, 1, 1, 0, 0, SIGMOID),
    (f32(5, 8), None, *NONE, 8, 4, 4, 0, 0, SIGMOID),  # two experts in a group
]
weight_faults = {
    "another norm": dict(norm=lambda x, kind: norm(x, (kind + 1) % 2)),
    "weights with bias": dict(weights=lambda p, scores: scores),
    "not normalised": dict(normalised=same),
    "sum of all experts": dict(normalised=lambda w, p: w / (p.sum(-1, keepdims=True) + EPS)),
    "no epsilon": dict(normalised=lambda w, p: w / w.sum(-1, keepdims=True)),
    "no factor": dict(factor=1),
    "norm with bias": dict(shown=lambda p, scores: scores),
}
faults = weight_faults | {
    "no bias": dict(biased=same),
    "no groups": dict(groups=same),
    "groups by the other value": dict(
        groups=lambda s, groups, keep, largest: grouped(s, groups, keep, not largest)
    ),
    "ties to the larger": dict(best=lambda s, k: s.shape[1] - 1 - best(s[:, ::-1], k)),
    "worst experts": dict(best=lambda s, k: best(-s, k)),
}
renormed = (f32(6, 16), f32(16, scale=0.1), *NONE, 4, 1, 1, 0, 1, SOFTMAX)
roots = [
    (f32(7, 256, scale=2), f32(256, scale=0.1), *NONE, 6, 1, 1, 0, 0, ROOT),  # Flash
    (f32(3, 384, scale=2), f32(384, scale=0.1), *NONE, 6, 1, 1, 0, 0, ROOT),  # Pro
]
if CANN >= (9, 0):
    cases += [renormed]
if A5 and CANN >= (9, 1):
    cases = cases + roots
    faults |= {"no root": dict(norm=lambda x, kind: norm(x, kind) ** (2 if kind == ROOT else 1))}
check("moe_gating_top_k", call_gating, gating, STEPS, cases, faults, 1e-5)
half = [(bf16(9, 16), bf16(16), *NONE, 4, 1, 1, 0, 0, SIGMOID)]
half_faults = {
    fault: replaced
    for fault, replaced in faults.items()
    if "group" not in fault and fault not in ("ties to the larger", "no root")
}
check("moe_gating_top_k in 16 bits", call_gating, gating, STEPS, half, half_faults, 1e-2)


def refuse(argument, *case):
    on_npu = [c.npu() if isinstance(c, torch.Tensor) else c for c in case]
    refused("moe_gating_top_k", lambda: call_gating(*on_npu), argument)


def refuse_settings(argument, experts, *settings):
    refuse(argument, f32(2, experts), f32(experts), *NONE, *settings)


refuse_settings("'k'", 16, 17, 1, 1, 0, 0, SIGMOID)
refuse_settings("'k'", 16, 0, 1, 1, 0, 0, SIGMOID)
refuse_settings("'k'", 16, 9, 4, 2, 0, 0, SIGMOID)
refuse_settings("'k_group'", 16, 2, 4, 5, 0, 0, SIGMOID)
refuse_settings("'k_group'", 16, 2, 4, 0, 0, 0, SIGMOID)
refuse_settings("'group_count'", 16, 2, 3, 1, 0, 0, SIGMOID)
refuse_settings("'group_count'", 16, 2, 0, 1, 0, 0, SIGMOID)
refuse_settings("'group_count'", 8, 1, 8, 8, 1, 0, SIGMOID)  # the best two of one
refuse_settings("'group_count'", 260, 1, 65, 1, 0, 0, SIGMOID)  # 65 groups, padded to 32 each
refuse_settings("'group_select_mode'", 16, 2, 1, 1, 2, 0, SIGMOID)
refuse_settings("'renorm'", 16, 2, 1, 1, 0, 2, SOFTMAX)
refuse_settings("'norm_type'", 16, 2, 1, 1, 0, 0, 3)
refuse_settings("'x'", 2049, 2, 1, 1, 0, 0, SIGMOID)
refuse("'x'", f32(0, 16), None, *NONE, 2, 1, 1, 0, 0, SIGMOID)
if CANN < (9, 0):
    refuse("'renorm'", *renormed)
if not A5 or CANN < (9, 1):
    refuse("'norm_type'", *roots[0])
types = [(a, b) for a in (torch.int32, torch.int64) for b in (torch.int32, torch.int64)]
tables = [
    by_table(9, 16, 4, 30, SIGMOID),
    by_table(9, 16, 4, 30, SOFTMAX, renorm=1),
    by_table(5, 256, 6, 50, SIGMOID, bias=f32(256)),
    *(by_table(6, 16, 3, 20, SIGMOID, types=pair) for pair in types),
    by_table(6, 96, 64, 20, SIGMOID, groups=3),
]
if CANN < (9, 1):
    refuse("input_ids", *tables[0])
else:
    if A5:
        tables += [by_table(5, 256, 6, 50, ROOT), by_table(5, 384, 6, 50, ROOT)]
    table_faults = weight_faults | {
        "no table": dict(row=lambda table, ids, chosen: chosen),
        "table row of another token": dict(row=lambda table, ids, chosen: table[np.roll(ids, 1)]),
    }
    check("moe_gating_top_k by table", call_gating, gating, STEPS, tables, table_faults, 1e-5)
    refuse("'k'", *by_table(3, 128, 65, 20, SIGMOID))
    x, _, ids, table, *rest = by_table(3, 16, 4, 20, SIGMOID)
    refuse("'k_group'", x, None, ids, table, 4, 4, 2, 0, 0, SIGMOID)
    refuse("'input_ids'", x, None, ids + 20, table, 4, 1, 1, 0, 0, SIGMOID)  # behind the table
    refuse("'tid2eid'", x, None, ids, table + 16, 4, 1, 1, 0, 0, SIGMOID)  # no such experts
    if not A5:
        refuse("'norm_type'", x, None, ids, table, 4, 1, 1, 0, 0, ROOT)
