"""Mixture-of-experts operators (see fused_check.py)."""

import numpy as np
import torch
import torch_npu
from fused_check import array, bf16, check, f32, refused, rng, sigmoid, softmax


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
        (f32(64, 32), f32(32, scale=0.2), 3, 4, 2, 1),
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
