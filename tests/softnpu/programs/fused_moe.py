"""Mixture-of-experts operators (see fused_check.py); gating is in fused_gating.py."""

import numpy as np
import torch
import torch_npu
from fused_check import A5, CANN, Steps, array, bf16, check, f32, refused, rng, same


def stable(ids):
    return np.argsort(ids, kind="stable")


PERMUTE = Steps(
    flat=lambda ids: ids.reshape(-1),
    order=stable,
    place=stable,
    token=lambda order, tokens, k: order // k,
    kept=lambda wanted, rows: slice(wanted),
)


def permute(case, steps):
    x, ids, wanted = array(case[0]), array(case[1]), case[2]
    flat = steps.flat(ids)
    order = steps.order(flat)
    token = steps.token(order, len(x), ids.shape[1] if ids.ndim == 2 else 1)
    kept = steps.kept(wanted, len(flat)) if wanted else slice(None)
    return [x[token[kept]], steps.place(order)]


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
permute_faults = {
    "column order": dict(flat=lambda ids: ids.T.reshape(-1)),
    "unstable": dict(order=lambda ids: stable(ids[::-1])[::-1]),
    "descending": dict(order=lambda ids: stable(-ids)),
    "order instead of place": dict(place=same),
    "modulo": dict(token=lambda order, tokens, k: order % tokens),
    "tokens not sorted": dict(token=lambda order, tokens, k: np.arange(len(order)) // k),
    "not cut": dict(kept=lambda wanted, rows: slice(None)),
    "cut from the front": dict(
        kept=lambda wanted, rows: slice(rows - min(wanted, rows) if wanted > 0 else -wanted, None)
    ),
}
if A5 and CANN >= (9, 2):
    permute_cases += [(torch.arange(20, dtype=torch.int8).view(5, 4), chosen(5, 2, 4), None)]
else:
    refused(
        "moe_token_permute",
        lambda: call_permute(torch.ones(2, 4).char().npu(), chosen(2, 2, 3).npu()),
        "'tokens'",
    )
check("moe_token_permute", call_permute, permute, PERMUTE, permute_cases, permute_faults, 1e-5)


def refuse_permute(x, ids, argument, wanted=None, padded=False):
    refused(
        "moe_token_permute",
        lambda: torch_npu.npu_moe_token_permute(x.npu(), ids.npu(), wanted, padded),
        argument,
    )


refuse_permute(f32(4, 5), chosen(3, 2, 4), "'indices'")
refuse_permute(f32(4, 5), f32(4, 2), "'indices'")
refuse_permute(f32(4, 5).int(), chosen(4, 2, 4), "'tokens'")
refuse_permute(f32(4, 5), chosen(4, 2, 4), "'padded_mode'", padded=True)
# torch_npu makes it 0: all rows, and no room.
refuse_permute(f32(4, 5), chosen(4, 2, 4), "'permuted_tokens'", wanted=-8)
refuse_permute(f32(1, 1), torch.zeros(1, 16777215, dtype=torch.int32), "'indices'")
refuse_permute(f32(4, 5), chosen(4, 2, 4) - 4, "'indices'")
wide = (f32(2, 3), chosen(2, 513, 600), None)
if A5:
    check(
        "moe_token_permute of 513",
        call_permute,
        permute,
        PERMUTE,
        [wide, *permute_cases],
        permute_faults,
        1e-5,
    )
    if CANN >= (9, 2):
        refuse_permute(torch.ones(2, 1).char(), chosen(2, 5, 9) + 10240, "'indices'")
else:
    refuse_permute(*wide[:2], "'indices'")


UNPERMUTE = Steps(
    place=same,
    probs=same,
    weighed=lambda rows, probs: rows * probs[..., None],
    sum=lambda y: y.sum(1),
)


def unpermute(case, steps):
    rows, place = array(case[0]), array(case[1])
    probs = np.ones((len(place), 1)) if case[2] is None else array(case[2])
    back = rows[steps.place(place)].reshape(*probs.shape, -1)
    return [steps.sum(steps.weighed(back, steps.probs(probs)))]


def first_only(rows, probs):
    return rows * (np.arange(rows.shape[1]) == 0)[:, None] * probs[..., None]


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
unpermute_faults = {
    "the next place": dict(place=lambda place: np.roll(place, 1)),
    "order instead of place": dict(place=np.argsort),
    "probs of another token": dict(probs=lambda probs: np.roll(probs, 1, 0)),
    "probs of another expert": dict(probs=lambda probs: np.roll(probs, 1, 1)),
    "probs sum to one": dict(probs=lambda probs: probs / probs.sum(1, keepdims=True)),
    "first expert only": dict(weighed=first_only),
    "no probs": dict(weighed=same),
    "mean": dict(sum=lambda y: y.mean(1)),
    "largest": dict(sum=lambda y: y.max(1)),
}
check(
    "moe_token_unpermute",
    call_unpermute,
    unpermute,
    UNPERMUTE,
    unpermute_cases,
    unpermute_faults,
    1e-2,
)


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
    check(
        "moe_token_unpermute of 513",
        call_unpermute,
        unpermute,
        UNPERMUTE,
        [wide, *unpermute_cases],
        unpermute_faults,
        1e-2,
    )
else:
    refuse_unpermute(*wide, "'probs'")
