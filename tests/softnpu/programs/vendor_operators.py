"""vllm-ascend's operators, called in its own library, against formulas written from the documents
(docs/spec/ascend-operators.md 4.2 A, 4.4, 4.13 A; see fused_check.py).
"""

import numpy as np
import torch
from aclnn import vendor
from dense_check import absent, empty, hf32, int8_rows, launch, refuse, rounded_hf32, shown_int8
from fused_check import (
    A5,
    Steps,
    array,
    bf16,
    check,
    f32,
    finish,
    refused,
    rng,
    same,
    sigmoid,
    softmax,
)

LIBRARY = vendor()
GATE, NORM, HYPER = "aclnnMoeGatingTopKHash", "aclnnRmsNormDynamicQuant", "aclnnHcPre"
I8, K, SCALE, EPS = torch.int8, 6, 2.5, 0.25
SOFTMAX, SIGMOID, ROOT = 0, 1, 2

GATES = Steps(
    scores={
        SOFTMAX: softmax,
        SIGMOID: sigmoid,
        ROOT: lambda x: np.sqrt(np.logaddexp(0, x)),
    },
    biased=lambda s, bias: s + bias,
    weights=lambda s, biased: s,
    normalised=lambda w, kind: w if kind == SOFTMAX else w / (w.sum(-1, keepdims=True) + EPS),
    row=lambda ids: ids,
    groups=lambda biased: best_groups(biased, 4, 2),
    factor=SCALE,
)


def best_groups(biased, count, kept):
    """All but the `kept` groups with the largest members at minus infinity."""
    grouped = biased.reshape(len(biased), count, -1)
    order = np.argsort(-grouped.max(-1), -1, kind="stable")
    out = np.ones((len(biased), count), bool)
    np.put_along_axis(out, order[:, :kept], False, -1)
    return np.where(out[..., None], -np.inf, grouped).reshape(biased.shape)


def gate(case, steps):
    x, bias, ids, table, kind, groups = case
    s = steps.scores[kind](array(x))
    biased = s if bias is None else steps.biased(s, array(bias))
    if ids is not None:
        picked = array(table)[steps.row(array(ids))]
    else:
        chosen = steps.groups(biased) if groups > 1 else biased
        picked = np.argsort(-chosen, -1, kind="stable")[:, :K]
    weights = np.take_along_axis(steps.weights(s, biased), picked, -1)
    return [steps.normalised(weights, kind) * steps.factor, picked, s]


def gate_arguments(x, bias, ids, table, kind, groups=1):
    return dict(library=LIBRARY, x=x, bias=bias, input_ids=ids, tid2eid=table, k=K,
                k_group=max(1, groups // 2), group_count=groups, group_select_mode=0, renorm=0,
                norm_type=kind, out_flag=True, routed_scaling_factor=SCALE, eps=EPS,
                y=empty(len(x), K, dtype=x.dtype), expert_idx=empty(len(x), K, dtype=torch.int32),
                out=empty(*x.shape))  # fmt: skip


def call_gate(*case):
    given = gate_arguments(*case)
    launch(GATE, **given)
    return [given["y"], given["expert_idx"], given["out"]]


def table_of(tokens, experts, vocabulary, types=(torch.int64, torch.int32)):
    rows = np.stack([rng.permutation(experts)[:K] for _ in range(vocabulary)])
    ids = rng.integers(0, vocabulary, tokens)
    return torch.tensor(ids, dtype=types[0]), torch.tensor(rows, dtype=types[1])


def check_gate():
    cases = [
        (f32(7, 256, scale=2), f32(256, scale=0.1), None, None, ROOT, 1),  # Flash
        (f32(3, 384, scale=2), f32(384, scale=0.1), None, None, ROOT, 1),  # Pro
        (f32(5, 256, scale=9), None, *table_of(5, 256, 40), ROOT, 1),
        (f32(4, 96), None, *table_of(4, 96, 40, (torch.int32, torch.int64)), SIGMOID, 1),
        (f32(4, 64), f32(64, scale=0.1), None, None, SIGMOID, 4),
        (f32(4, 64), None, None, None, SOFTMAX, 1),
    ]
    plain = GATES.scores
    faults = {
        "no root": dict(scores=plain | {ROOT: lambda x: np.logaddexp(0, x)}),
        "sigmoid for the root": dict(scores=plain | {ROOT: sigmoid}),
        "softmax for the sigmoid": dict(scores=plain | {SIGMOID: softmax}),
        "no bias": dict(biased=lambda s, bias: s),
        "weights with bias": dict(weights=lambda s, biased: biased),
        "not normalised": dict(normalised=same),
        "softmax normalised": dict(normalised=lambda w, _: w / (w.sum(-1, keepdims=True) + EPS)),
        "no epsilon": dict(
            normalised=lambda w, kind: w if kind == SOFTMAX else w / w.sum(-1, keepdims=True)
        ),
        "no groups": dict(groups=same),
        "no factor": dict(factor=1),
        "row of another token": dict(row=lambda ids: np.roll(ids, 1)),
    }
    check(GATE, call_gate, gate, GATES, cases, faults, 2e-5)


def refuse_gate():
    ids, table = table_of(3, 16, 9)

    def good():
        return gate_arguments(f32(3, 16), f32(16), None, None, ROOT)

    def grouped():
        return gate_arguments(f32(3, 64), None, None, None, SIGMOID, 4)

    def by_table():
        return gate_arguments(f32(3, 16), None, ids, table, ROOT)

    for call in (good, grouped, by_table):
        launch(GATE, **call())
    refuse(GATE, good, "'x'", x=f32(3, 16).double())
    refuse(GATE, good, "'bias'", bias=bf16(16))
    refuse(GATE, good, "'bias'", 561002, bias=f32(15))
    refuse(GATE, good, "'norm_type'", 561002, norm_type=3)
    refuse(GATE, good, "'renorm'", 561002, renorm=1)
    refuse(GATE, good, "'k'", 561002, k=17)
    refuse(GATE, good, "'k_group'", 561002, k_group=2)
    refuse(GATE, good, "'group_select_mode'", 561002, group_select_mode=2)
    refuse(GATE, good, "'y'", 561002, y=empty(3, K + 1))
    refuse(GATE, good, "'expert_idx'", expert_idx=empty(3, K, dtype=torch.int64))
    refuse(GATE, good, "'out'", 161001, out=None)
    refuse(GATE, good, "'out'", 561002, out=empty(3, 15))
    refuse(GATE, grouped, "'group_count'", 561002, norm_type=ROOT)
    refuse(GATE, grouped, "'group_count'", 561002, group_count=3)
    refuse(GATE, by_table, "'tid2eid'", 561002, tid2eid=None)
    refuse(GATE, by_table, "'input_ids'", 561002, input_ids=None)
    refuse(GATE, by_table, "'input_ids'", 561002, input_ids=ids[:2])
    refuse(GATE, by_table, "'tid2eid'", 561002, tid2eid=table[:, :5])
    refuse(GATE, by_table, "'tid2eid'", tid2eid=table.float())
    large = gate_arguments(f32(1, 2080), None, None, None, ROOT)
    refused(GATE, lambda: launch(GATE, **large), "'x'", 561002)
    for argument, wrong in (
        ("'input_ids'", dict(input_ids=ids + 9)),
        ("'tid2eid'", dict(tid2eid=table + 16)),
    ):
        refused(GATE, lambda w=wrong: launch(GATE, **{**by_table(), **w}), argument, 507015)


NORMS = Steps(
    rms=lambda x: 1 / np.sqrt((x**2).mean(-1, keepdims=True) + EPS),
    gamma=lambda y, gamma: y * gamma,
    beta=lambda y, beta: y + beta,
    smooth=lambda y, smooths: [y if s is None else y * s for s in smooths],
    wanted=lambda mask, smooths: mask or (True, smooths[1] is not None),
)


def norm(case, steps):
    x, gamma, *rest, mask = case
    x, gamma, *smooths, beta = (None if c is None else array(c) for c in (x, gamma, *rest))
    y = steps.gamma(x * steps.rms(x), gamma)
    y = y if beta is None else steps.beta(y, beta)
    both = zip(steps.smooth(y, smooths), steps.wanted(mask, smooths), strict=True)
    return [result for rows, wanted in both if wanted for result in int8_rows(rows)]


def norm_arguments(x, gamma, smooth_scale1, smooth_scale2, beta, mask=None):
    results = dict(y1=empty(*x.shape, dtype=I8), y2=empty(*x.shape, dtype=I8),
                   scale1=empty(*x.shape[:-1]), scale2=empty(*x.shape[:-1]))  # fmt: skip
    return dict(library=LIBRARY, x=x, gamma=gamma, smooth_scale1=smooth_scale1,
                smooth_scale2=smooth_scale2, beta=beta, epsilon=EPS, output_mask=mask,
                dst_type=0, **results)  # fmt: skip


def call_norm(*case):
    given = norm_arguments(*case)
    launch(NORM, **given)
    results = []
    for number, wanted in enumerate(NORMS.wanted(case[-1], case[2:4]), 1):
        y, scale = given[f"y{number}"], given[f"scale{number}"]
        if wanted:
            results += shown_int8(y, scale)
        else:
            assert torch.isnan(scale).all().item(), "a result that is not wanted is written"
    return results


def check_norm():
    if A5:
        absent(NORM, lambda: norm_arguments(bf16(3, 96), bf16(96), None, None, None))
        return
    cases = [
        (bf16(3, 1536), bf16(1536), None, None, None, None),  # q_norm of Flash
        (bf16(2, 3, 96), bf16(96), bf16(96), bf16(96), None, None),
        (f32(4, 64).half(), *(f32(64).half() for _ in range(4)), (False, True)),
        (bf16(2, 9000), bf16(9000), None, None, bf16(9000), (True, True)),
    ]
    faults = {
        "sum instead of mean": dict(rms=lambda x: 1 / np.sqrt((x**2).sum(-1, keepdims=True) + EPS)),
        "no epsilon": dict(rms=lambda x: 1 / np.sqrt((x**2).mean(-1, keepdims=True))),
        "no gamma": dict(gamma=lambda y, gamma: y),
        "no beta": dict(beta=lambda y, beta: y),
        "no smooth scales": dict(smooth=lambda y, smooths: [y, y]),
        "smooth scales swapped": dict(smooth=lambda y, smooths: NORMS.smooth(y, smooths[::-1])),
    }
    check(NORM, call_norm, norm, NORMS, cases, faults, 1e-4)

    def good():
        return norm_arguments(bf16(3, 96), bf16(96), bf16(96), None, None)

    refuse(NORM, good, "'gamma'", gamma=f32(96))
    refuse(NORM, good, "'gamma'", 561002, gamma=bf16(95))
    refuse(NORM, good, "'smooth_scale1'", 561002, smooth_scale1=bf16(95))
    refuse(NORM, good, "'smooth_scale1'", 561002, smooth_scale1=None, smooth_scale2=bf16(96))
    refuse(NORM, good, "'epsilon'", 561002, epsilon=0.0)
    refuse(NORM, good, "'y1'", 561002, y1=empty(3, 95, dtype=I8))
    refuse(NORM, good, "'scale2'", 561002, scale2=empty(4), output_mask=[True, True])
    refuse(NORM, good, "'y2'", 161001, y2=None)
    launch(NORM, **good() | dict(y2=empty(1, dtype=I8)))  # as vllm-ascend calls it
    zero = norm_arguments(torch.zeros(2, 96).bfloat16(), bf16(96), None, None, None)
    launch(NORM, **zero)
    assert torch.isnan(zero["scale1"]).all().item(), "rows of zeros have a scale"


MIXES = Steps(
    weight=hf32,
    rms=lambda flat: 1 / np.sqrt((flat**2).mean(-1, keepdims=True) + 0.5),
    base=same,
    scale=same,
    pre_eps=0.02,
    eps=0.02,
    doubled=2,
    rounds=20,
    axes=(-1, -2),
)


def mixes(case, steps):
    x, weight, scale, base, rounds = case
    x, weight, a, b = (array(c) for c in (x, weight, scale, base))
    a, b, flat = steps.scale(a), steps.base(b), x.reshape(*x.shape[:-2], -1)
    z = flat @ steps.weight(weight).T * steps.rms(flat)
    pre = sigmoid(a[0] * z[..., :4] + b[:4]) + steps.pre_eps
    post = sigmoid(a[1] * z[..., 4:8] + b[4:8]) * steps.doubled
    m = softmax((a[2] * z[..., 8:] + b[8:]).reshape(*x.shape[:-2], 4, 4)) + steps.eps
    for axis in [*steps.axes[1:], *steps.axes * (min(rounds, steps.rounds) - 1)]:
        m = m / (m.sum(axis, keepdims=True) + steps.eps)
    return [(x * pre[..., None]).sum(-2), post, m]


def mixes_arguments(x, weight, scale, base, rounds=20):
    outer = x.shape[:-2]
    return dict(library=LIBRARY, x=x, hc_fn=weight, hc_scale=scale, hc_base=base, hc_mult=4,
                hc_sinkhorn_iters=rounds, hc_eps=0.02, norm_eps=0.5,
                y=empty(*outer, x.shape[-1], dtype=x.dtype), post=empty(*outer, 4),
                comb_frag=empty(*outer, 4, 4))  # fmt: skip


def mixes_case(*outer, d=4096):
    return bf16(*outer, 4, d), f32(24, 4 * d, scale=1 / d**0.5), f32(3) * 0.2 + 1, f32(24)


def check_mixes():
    def call_mixes(*case):
        given = mixes_arguments(*case)
        launch(HYPER, **given)
        return [given["y"], given["post"], given["comb_frag"]]

    cases = [(*mixes_case(3), 20), (*mixes_case(1, 2, d=7168), 20), (*mixes_case(2), 2)]
    of_mixes = lambda *case: call_mixes(*case)[1:]
    only_mixes = lambda *given: mixes(*given)[1:]
    faults = {
        "GEMM in full fp32": dict(weight=same),
        "weight rounded": dict(weight=rounded_hf32),
        "no norm": dict(rms=lambda flat: 1.0),
        "no norm epsilon": dict(rms=lambda flat: 1 / np.sqrt((flat**2).mean(-1, keepdims=True))),
        "no base": dict(base=np.zeros_like),
        "no scale": dict(scale=np.ones_like),
        "no epsilon in the sums": dict(eps=0),
        "post not doubled": dict(doubled=1),
        "one round": dict(rounds=1),
        "columns first": dict(axes=(-2, -1)),
    }
    check(HYPER, of_mixes, only_mixes, MIXES, cases, faults, 3e-5)
    pre_faults = {name: faults[name] for name in ("no norm", "no base", "no scale")}
    pre_faults["no epsilon behind the gate"] = dict(pre_eps=0)
    of_y, only_y = lambda *case: call_mixes(*case)[:1], lambda *given: mixes(*given)[:1]
    check(f"{HYPER} y", of_y, only_y, MIXES, cases, pre_faults, 1e-2)

    def good():
        return mixes_arguments(*mixes_case(2))

    refuse(HYPER, good, "'x'", 161002, x=f32(2, 4, 4096))
    refuse(HYPER, good, "'x'", 561002, x=bf16(2, 4, 4224))
    refuse(HYPER, good, "'x'", 561002, x=bf16(2, 5, 4096))
    refuse(HYPER, good, "'hc_mult'", 561002, hc_mult=5)
    refuse(HYPER, good, "'hc_fn'", 561002, hc_fn=f32(25, 4 * 4096))
    refuse(HYPER, good, "'hc_scale'", 561002, hc_scale=f32(4))
    refuse(HYPER, good, "'comb_frag'", 561002, comb_frag=empty(2, 16))


check_gate()
refuse_gate()
check_norm()
check_mixes()
finish("vllm-ascend")
