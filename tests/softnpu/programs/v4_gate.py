"""The gate of V4 by built-in operators: on A2 and A3 square root, logit and sigmoid gating of
logits that are folded at load (launch plan 3.1); on A5 aclnnMoeGatingTopKV2's own square root of
softplus (see fused_check.py).
"""

import numpy as np
import torch
from aclnn import call
from dense_check import FAMILY, empty, launch, refuse
from fused_check import A5, Steps, array, bf16, check, f32, refused, rng, same, sigmoid
from torch.nn import functional

NAME = "aclnnMoeGatingTopKV2"
FOLD, SCALE, EPS = 4096, 2.5, 1e-20
SIGMOID, ROOT = 1, 2
STEPS = Steps(
    scores=lambda x: np.sqrt(np.log1p(np.exp(x))),
    biased=lambda s, bias: s + bias,
    weights=lambda s, biased: s,
    normalised=lambda w: w / w.sum(-1, keepdims=True),
    chosen=lambda table, ids: table[ids],
    factor=SCALE,
)


def gate(case, steps):
    x, bias, ids, table = case
    s = steps.scores(array(x))
    biased = s if bias is None else steps.biased(s, array(bias))
    if ids is None:
        picked = np.argsort(-biased, -1, kind="stable")[:, :6]
    else:
        picked = steps.chosen(array(table), array(ids))
    weights = np.take_along_axis(steps.weights(s, biased), picked, -1)
    return [steps.normalised(weights) * steps.factor, picked]


def arguments(x, bias, ids, table, kind):
    return dict(x=x, bias=bias, input_ids=ids, tid2eid=table, k=6, k_group=1, group_count=1,
                group_select_mode=0, renorm=0, norm_type=kind, out_flag=False,
                routed_scaling_factor=SCALE, eps=EPS, y=empty(len(x), 6, dtype=x.dtype),
                expert_idx=empty(len(x), 6, dtype=torch.int32), out=empty(*x.shape))  # fmt: skip


def call_folded(x, bias, ids, table):
    """Calls a to d of the plan; the weight of the gate would be divided by 4096 at load."""
    root = functional.softplus(x / FOLD, beta=FOLD, threshold=20).sqrt()  # s / 64
    odds = empty(*x.shape)
    call("aclnnLogit", root, -1.0, odds)
    folded = None if bias is None else bias / FOLD**0.5
    given = arguments(odds, folded, ids, table, SIGMOID)
    launch(NAME, **given)
    return [given["y"], given["expert_idx"]]


def call_root(*case):
    given = arguments(*case, ROOT)
    launch(NAME, **given)
    return [given["y"], given["expert_idx"]]


def table_of(tokens, experts, vocabulary, types=(torch.int64, torch.int32)):
    rows = np.stack([rng.permutation(experts)[:6] for _ in range(vocabulary)])
    ids = rng.integers(0, vocabulary, tokens)
    return torch.tensor(ids, dtype=types[0]), torch.tensor(rows, dtype=types[1])


def check_gate():
    cases = [
        (f32(7, 256, scale=2), f32(256, scale=0.1), None, None),  # Flash
        (f32(3, 384, scale=2), f32(384, scale=0.1), None, None),  # Pro
        (f32(5, 256, scale=2), None, *table_of(5, 256, 40)),
        (f32(4, 384, scale=9), None, *table_of(4, 384, 40, (torch.int32, torch.int64))),
    ]
    faults = {
        "no root": dict(scores=lambda x: np.log1p(np.exp(x))),
        "sigmoid": dict(scores=sigmoid),
        "no bias": dict(biased=lambda s, bias: s),
        "bias unfolded": dict(biased=lambda s, bias: s + 64 * bias),
        "weights with bias": dict(weights=lambda s, biased: biased),
        "not normalised": dict(normalised=same),
        "no factor": dict(factor=1),
        "row of another token": dict(chosen=lambda table, ids: table[np.roll(ids, 1)]),
    }
    check(f"{NAME}", call_root if A5 else call_folded, gate, STEPS, cases, faults, 2e-5)


def refuse_gate():
    ids, table = table_of(3, 16, 9)

    def good():
        return arguments(f32(3, 16), f32(16), None, None, SIGMOID)

    def by_table():
        return arguments(f32(3, 16), None, ids, table, SIGMOID)

    launch(NAME, **good())
    launch(NAME, **by_table())
    refuse(NAME, good, "'norm_type'", 561002, norm_type=3)
    refuse(NAME, good, "'bias'", bias=bf16(16))
    refuse(NAME, good, "'bias'", 561002, bias=f32(15))
    refuse(NAME, good, "'k'", 561002, k=17)
    refuse(NAME, by_table, "'input_ids'", 561002, input_ids=ids[:2])
    refuse(NAME, by_table, "'tid2eid'", 561002, tid2eid=table[:, :5])
    refuse(NAME, by_table, "'tid2eid'", tid2eid=table.float())
    if not A5:
        refuse(NAME, good, "'norm_type'", 561002, norm_type=ROOT)
        refuse(NAME, by_table, "'norm_type'", 561002, norm_type=ROOT)
    for argument, wrong in (
        ("'input_ids'", dict(input_ids=ids + 9)),
        ("'tid2eid'", dict(tid2eid=table + 16)),
    ):
        refused(NAME, lambda w=wrong: launch(NAME, **{**by_table(), **w}), argument, 507015)


LOGIT = Steps(clamp=lambda x, eps: np.clip(x, eps, 1 - eps) if eps >= 0 else x)


def logit(case, steps):
    with np.errstate(divide="ignore"):
        z = steps.clamp(array(case[0]), case[1])
        return [np.log(z / (1 - z))]


def call_logit(x, eps):
    y = empty(*x.shape)
    call("aclnnLogit", x, eps, y)
    return [y]


def check_logit():
    x = torch.tensor(rng.uniform(0.01, 0.99, (5, 64)), dtype=torch.float32)
    faults = {
        "no clamp": dict(clamp=lambda x, eps: x),
        "always clamped": dict(clamp=lambda x, eps: np.clip(x, 0.2, 0.8)),
        "odds exchanged": dict(clamp=lambda x, eps: 1 - LOGIT.clamp(x, eps)),
    }
    check("aclnnLogit", call_logit, logit, LOGIT, [(x, -1.0), (x, 0.2), (x, 0.0)], faults, 2e-5)
    edge = call_logit(torch.tensor([0.0, 1.0, 2.0]).npu(), -1.0)[0].cpu()
    assert edge[0] == -np.inf and edge[1] == np.inf and edge[2].isnan(), edge


check_logit()
if FAMILY:
    check_gate()
    refuse_gate()
else:
    x = f32(3, 16)
    refuse(NAME, lambda: arguments(x, None, None, None, SIGMOID), "before CANN 9.1.0")
