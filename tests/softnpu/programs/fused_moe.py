"""Mixture-of-experts operators (see fused_check.py); gating is in fused_gating.py."""

import numpy as np
import torch
import torch_npu
from fused_check import A5, CANN, array, bf16, check, f32, refused, rng


def permute(case, fault):
    x, ids, wanted = array(case[0]), array(case[1]), case[2]
    k = ids.shape[1] if ids.ndim == 2 else 1
    flat = ids.T.reshape(-1) if fault == "column order" else ids.reshape(-1)
    order = np.argsort(flat, kind="stable") if fault != "unstable" else np.argsort(flat[::-1], kind="stable")[::-1]
    if fault == "descending":
        order = np.argsort(-flat, kind="stable")
    place = np.argsort(order, kind="stable") if fault != "order instead of place" else order
    token = order % len(x) if fault == "modulo" else order // k
    if fault == "tokens not sorted":
        token = np.arange(len(flat)) // k
    kept = slice(None) if not wanted or fault == "not cut" else slice(wanted)
    if fault == "cut from the front" and wanted:
        kept = slice(len(flat) - min(wanted, len(flat)) if wanted > 0 else -wanted, None)
    return [x[token[kept]], place]


def call_permute(x, i, wanted=None):
    return torch_npu.npu_moe_token_permute(x, i, wanted)


def chosen(tokens, k, experts, dtype=torch.int64):
    return torch.tensor(rng.integers(0, experts, (tokens, k)), dtype=dtype)


permute_cases = [
    (bf16(5, 6), chosen(5, 2, 4), None),
    (bf16(7, 4), chosen(7, 3, 9, torch.int32), None),
    (f32(7, 5), chosen(7, 3, 9), 11),
    (f32(7, 5).half(), chosen(7, 3, 9), 99),
    (f32(7, 5), chosen(7, 3, 9), -4),
    (f32(7, 5), chosen(7, 3, 9)[:, 0], None),
    (bf16(6, 4096), chosen(6, 6, 256), None),
    (f32(0, 5), chosen(0, 2, 3), None),
]
permute_faults = [
    "column order",
    "unstable",
    "descending",
    "order instead of place",
    "modulo",
    "tokens not sorted",
    "not cut",
    "cut from the front",
]
if A5 and CANN >= (9, 2):
    permute_cases += [(torch.arange(20, dtype=torch.int8).view(5, 4), chosen(5, 2, 4), None)]
else:
    refused("moe_token_permute", lambda: call_permute(torch.ones(2, 4).char().npu(), chosen(2, 2, 3).npu()), "'tokens'")
check("moe_token_permute", call_permute, permute, permute_cases, permute_faults, 1e-5)


def refuse_permute(x, ids, argument, wanted=None, padded=False):
    refused("moe_token_permute", lambda: torch_npu.npu_moe_token_permute(x.npu(), ids.npu(), wanted, padded), argument)


refuse_permute(f32(4, 5), chosen(3, 2, 4), "'indices'")
refuse_permute(f32(4, 5), f32(4, 2), "'indices'")
refuse_permute(f32(4, 5).int(), chosen(4, 2, 4), "'tokens'")
refuse_permute(f32(4, 5), chosen(4, 2, 4), "'padded_mode'", padded=True)
refuse_permute(
    f32(4, 5), chosen(4, 2, 4), "'permuted_tokens'", wanted=-8
)  # torch_npu makes it 0: all rows, and no room
refuse_permute(f32(1, 1), torch.zeros(1, 16777215, dtype=torch.int32), "'indices'")
refuse_permute(f32(4, 5), chosen(4, 2, 4) - 4, "'indices'")
wide = (f32(2, 3), chosen(2, 513, 600), None)
if A5:
    check("moe_token_permute of 513", call_permute, permute, [wide, *permute_cases], permute_faults, 1e-5)
    if CANN >= (9, 2):
        refuse_permute(torch.ones(2, 1).char(), chosen(2, 5, 9) + 10240, "'indices'")
else:
    refuse_permute(*wide[:2], "'indices'")


def unpermute(case, fault):
    rows, place = array(case[0]), array(case[1])
    probs = np.ones((len(place), 1)) if case[2] is None else array(case[2])
    t, k = probs.shape
    if fault == "the next place":
        place = np.roll(place, 1)
    back = rows[np.argsort(place) if fault == "order instead of place" else place].reshape(t, k, -1)
    if fault == "probs of another token":
        probs = np.roll(probs, 1, 0)
    if fault == "probs of another expert":
        probs = np.roll(probs, 1, 1)
    if fault == "probs sum to one":
        probs = probs / probs.sum(1, keepdims=True)
    if fault == "first expert only":
        back = back * (np.arange(k) == 0)[:, None]
    y = back if fault == "no probs" else back * probs[..., None]
    return [y.mean(1) if fault == "mean" else y.max(1) if fault == "largest" else y.sum(1)]


def call_unpermute(r, i, p):
    return [torch_npu.npu_moe_token_unpermute(r, i, p)]


def places(n):
    return torch.tensor(rng.permutation(n), dtype=torch.int32)


unpermute_cases = [
    (bf16(10, 6), places(10), bf16(5, 2)),
    (bf16(21, 3), places(21), bf16(7, 3)),
    (bf16(36, 4096), places(36), f32(6, 6)),
    (f32(12, 5).half(), places(12), f32(4, 3).half()),
    (f32(9, 5), places(9), None),
    (f32(6, 0), places(6), f32(3, 2)),
]
unpermute_faults = [
    "the next place",
    "order instead of place",
    "probs of another token",
    "probs of another expert",
    "probs sum to one",
    "first expert only",
    "no probs",
    "mean",
    "largest",
]
check("moe_token_unpermute", call_unpermute, unpermute, unpermute_cases, unpermute_faults, 1e-2)


def refuse_unpermute(r, i, p, argument, padded=False):
    refused(
        "moe_token_unpermute",
        lambda: torch_npu.npu_moe_token_unpermute(r.npu(), i.npu(), p.npu(), padded),
        argument,
    )


refuse_unpermute(f32(6, 4), places(6), f32(3, 2), "'padded_mode'", padded=True)
refuse_unpermute(f32(6, 4), places(6).long(), f32(3, 2), "'sorted_indices'")
refuse_unpermute(f32(5, 4), places(6), f32(3, 2), "'sorted_indices'")
refuse_unpermute(f32(6, 4), places(6), f32(2, 2), "'probs'")
refuse_unpermute(f32(6, 4), places(6), f32(3, 2).double(), "'probs'")
refuse_unpermute(f32(6, 4).int(), places(6), f32(3, 2), "'permuted_tokens'")
refuse_unpermute(f32(6, 4), places(6) + 1, f32(3, 2), "'sorted_indices'")
refuse_unpermute(f32(6, 4), places(6) - 1, f32(3, 2), "'sorted_indices'")
wide = (f32(1026, 3, scale=0.1), places(1026), f32(2, 513, scale=0.1))
if A5:
    check("moe_token_unpermute of 513", call_unpermute, unpermute, [wide, *unpermute_cases], unpermute_faults, 1e-2)
else:
    refuse_unpermute(*wide, "'probs'")
