"""moe_gating_top_k, by scores and by a table of token ids (see fused_check.py)."""

import numpy as np
import torch
import torch_npu
from fused_check import A5, CANN, array, bf16, check, f32, refused, rng, sigmoid, softmax

SOFTMAX, SIGMOID, ROOT = 0, 1, 2
EPS, FACTOR = 0.25, 2.5


def norm(x, kind):
    return softmax(x) if kind == SOFTMAX else sigmoid(x) if kind == SIGMOID else np.sqrt(np.logaddexp(0, x))


def grouped(scores, groups, keep, by_maximum):
    g = scores.reshape(len(scores), groups, -1)
    value = g.max(-1) if by_maximum else np.sort(g, -1)[..., -2:].sum(-1)
    best = np.argsort(-value, -1, kind="stable")[:, :keep]
    mask = np.full(value.shape, -np.inf)
    np.put_along_axis(mask, best, 0, 1)
    return (g + mask[..., None]).reshape(scores.shape)


def best(scores, k, fault):
    if fault == "ties to the larger":
        return scores.shape[1] - 1 - np.argsort(-scores[:, ::-1], -1, kind="stable")[:, :k]
    return np.argsort(scores if fault == "worst experts" else -scores, -1, kind="stable")[:, :k]


def gating(case, fault):
    x, bias, ids, table = (None if c is None else array(c) for c in case[:4])
    k, groups, keep, select, renorm, kind = case[4:]
    p = norm(x, (kind + 1) % 2 if fault == "another norm" else kind)
    if fault == "no root" and kind == ROOT:
        p = p**2
    scores = p if bias is None or fault == "no bias" else p + bias
    if groups > 1 and fault != "no groups":
        scores = grouped(scores, groups, keep, (select == 0) ^ (fault == "groups by the other value"))
    experts = best(scores, k, fault)
    if table is not None and fault != "no table":
        experts = table[np.roll(ids, 1) if fault == "table row of another token" else ids]
    weights = np.take_along_axis(scores if fault == "weights with bias" else p, experts, 1)
    if (kind != SOFTMAX or renorm) and fault != "not normalised":
        total = p.sum(-1, keepdims=True) if fault == "sum of all experts" else weights.sum(-1, keepdims=True)
        weights = weights / (total + (0 if fault == "no epsilon" else EPS))
    return [weights * (1 if fault == "no factor" else FACTOR), experts, scores if fault == "norm with bias" else p]


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


def by_table(tokens, experts, k, keys, kind, groups=1, types=(torch.int32, torch.int64), renorm=0, bias=None):
    ids = torch.tensor(rng.integers(0, keys, tokens), dtype=types[0])
    table = torch.tensor(np.stack([rng.permutation(experts)[:k] for _ in range(keys)]), dtype=types[1])
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
weight_faults = [
    "another norm",
    "weights with bias",
    "not normalised",
    "sum of all experts",
    "no epsilon",
    "no factor",
    "norm with bias",
]
faults = [*weight_faults, "no bias", "no groups", "groups by the other value", "ties to the larger", "worst experts"]
renormed = (f32(6, 16), f32(16, scale=0.1), *NONE, 4, 1, 1, 0, 1, SOFTMAX)
roots = [
    (f32(7, 256, scale=2), f32(256, scale=0.1), *NONE, 6, 1, 1, 0, 0, ROOT),  # Flash
    (f32(3, 384, scale=2), f32(384, scale=0.1), *NONE, 6, 1, 1, 0, 0, ROOT),  # Pro
]
if CANN >= (9, 0):
    cases += [renormed]
if A5 and CANN >= (9, 1):
    cases, faults = cases + roots, [*faults, "no root"]
check("moe_gating_top_k", call_gating, gating, cases, faults, 1e-5)
half = [(bf16(9, 16), bf16(16), *NONE, 4, 1, 1, 0, 0, SIGMOID)]
half_faults = [fault for fault in faults if "group" not in fault and fault not in ("ties to the larger", "no root")]
check("moe_gating_top_k in 16 bits", call_gating, gating, half, half_faults, 1e-2)


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
if CANN < (9, 2):
    refuse("input_ids", *tables[0])
else:
    if A5:
        tables += [by_table(5, 256, 6, 50, ROOT), by_table(5, 384, 6, 50, ROOT)]
    table_faults = [*weight_faults, "no table", "table row of another token"]
    check("moe_gating_top_k by table", call_gating, gating, tables, table_faults, 1e-5)
    refuse("'k'", *by_table(3, 128, 65, 20, SIGMOID))
    x, _, ids, table, *rest = by_table(3, 16, 4, 20, SIGMOID)
    refuse("'k_group'", x, None, ids, table, 4, 4, 2, 0, 0, SIGMOID)
    refuse("'input_ids'", x, None, ids + 20, table, 4, 1, 1, 0, 0, SIGMOID)  # behind the table
    refuse("'tid2eid'", x, None, ids, table + 16, 4, 1, 1, 0, 0, SIGMOID)  # no such experts
    if not A5:
        refuse("'norm_type'", x, None, ids, table, 4, 1, 1, 0, 0, ROOT)
