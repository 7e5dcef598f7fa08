"""Gating by softmax, older routing, permutation by maps, and gradients (see fused_check.py)."""

import numpy as np
import torch
import torch_npu
from dense_check import STEP, empty, int8_rows, launch, refuse, shown_int8
from fused_check import Steps, array, bf16, check, f32, refused, rng, same, softmax

I32 = torch.int32


def stable(ids):
    return np.argsort(ids, kind="stable")


def chosen(tokens, k, experts):
    """Different experts for each token."""
    rows = [rng.permutation(experts)[:k] for _ in range(tokens)]
    return torch.tensor(np.array(rows), dtype=I32)


GATE = Steps(
    weights=softmax,
    best=lambda p, k: np.argsort(-p, -1, kind="stable")[..., :k],
    after=same,
    finished=lambda ids, done, experts: np.where(done[..., None], experts, ids),
    rows=lambda n, k: np.arange(n * k).reshape(k, n).T,
)


def gate(case, steps):
    x, k, done = array(case[0]), case[1], case[2]
    p = steps.weights(x)
    ids = steps.best(p, k)
    y = steps.after(np.take_along_axis(p, ids, -1))
    if done is not None:
        ids = steps.finished(ids, array(done), x.shape[-1])
    return [y, ids, steps.rows(len(x), k)]


def call_gate(x, k, done):
    return torch_npu.npu_moe_gating_top_k_softmax(x, done, k=k)


def some(*shape):
    return torch.tensor(rng.integers(0, 2, shape), dtype=torch.bool)


GATE_FAULTS = {
    "no softmax": dict(weights=same),
    "softmax over tokens": dict(weights=lambda x: softmax(x.T).T),
    "worst experts": dict(best=lambda p, k: np.argsort(p, -1, kind="stable")[..., :k]),
    "ascending": dict(best=lambda p, k: np.argsort(-p, -1, kind="stable")[..., :k][..., ::-1]),
    "made to sum to one": dict(after=lambda y: y / y.sum(-1, keepdims=True)),
    "finished ignored": dict(finished=lambda ids, done, experts: ids),
    "finished are -1": dict(finished=lambda ids, done, _: np.where(done[..., None], -1, ids)),
    "rows in order": dict(rows=lambda n, k: np.arange(n * k).reshape(n, k)),
}
check("npu_moe_gating_top_k_softmax", call_gate, gate, GATE,
      [(f32(5, 8), 2, None), (f32(7, 16), 3, some(7)), (bf16(6, 32).float(), 8, some(6))],
      GATE_FAULTS, 1e-5)  # fmt: skip


def gate_v2(case, steps):
    x, k = array(case[0]), case[1]
    ids = steps.best(x, k)
    return [steps.weights(np.take_along_axis(x, ids, -1)), ids]


def call_gate_v2(x, k):
    y, ids, _ = torch_npu.npu_moe_gating_top_k_softmax_v2(x, k=k, renorm=1)
    return y, ids


check("npu_moe_gating_top_k_softmax_v2", call_gate_v2, gate_v2, GATE,
      [(f32(5, 8), 2), (f32(7, 16), 3), (f32(4, 32), 8)],
      {name: GATE_FAULTS[name] for name in ("no softmax", "worst experts", "ascending")}
      | {"softmax of all": dict(weights=lambda x: softmax(x) / 2)}, 1e-5)  # fmt: skip

ROUTE = Steps(order=stable, row=lambda row, rows: row % rows, place=lambda i, n: i)


def first_routing(case, steps):
    x, rows, experts, active = array(case[0]), array(case[1]), array(case[2]), case[3]
    order = steps.order(experts.reshape(-1))
    taken = rows.reshape(-1)[order]
    back = np.empty_like(taken)
    back[taken] = steps.place(np.arange(len(taken)), len(taken))
    kept = taken[: min(len(x), active) * experts.shape[1]]
    return [x[steps.row(kept, len(x))], back, experts.reshape(-1)[order]]


def routed(tokens, k, experts, active, width=5):
    rows = torch.arange(tokens * k, dtype=I32).view(k, tokens).t().contiguous()
    return f32(tokens, width), rows, chosen(tokens, k, experts), active


check("npu_moe_init_routing", torch_npu.npu_moe_init_routing, first_routing, ROUTE,
      [routed(5, 2, 4, 5), routed(7, 3, 9, 4), routed(6, 6, 16, 99)],
      {"descending": dict(order=lambda ids: stable(-ids)),
       "unsorted": dict(order=lambda ids: np.arange(len(ids))),
       "divided": dict(row=lambda row, rows: row // (row.max() // rows + 1) % rows),
       "first rows": dict(row=lambda row, rows: np.arange(len(row)) % rows),
       "places backwards": dict(place=lambda i, n: n - 1 - i)}, 1e-6)  # fmt: skip

INT8 = Steps(order=stable, token=lambda place, k: place // k, rows=int8_rows,
             static=lambda x, s, o: np.clip(np.rint(x * s + o), -128, 127) * STEP,
             smooth=lambda x, table, expert: x * table[expert],
             counts=lambda ids, n, mode: np.bincount(ids, minlength=n).cumsum() if mode == 1
             else np.bincount(ids, minlength=n))  # fmt: skip


def routing_int8(case, steps):
    x, experts, scale, offset, mode, count = (
        array(c) if isinstance(c, torch.Tensor) else c for c in case
    )
    k, flat = experts.shape[1], experts.reshape(-1)
    order = steps.order(flat)
    rows = x[steps.token(order, k)]
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    tail = [back, steps.counts(flat, count, mode)]
    if offset is not None:
        return [steps.static(rows, scale, offset), *tail]
    if scale is not None:
        rows = steps.smooth(rows, scale, flat[order])
    return [*steps.rows(rows), *tail]


def call_routing_int8(x, experts, scale, offset, mode, count):
    y, back, counts, _, row_scale = torch_npu.npu_moe_init_routing_quant(
        x, experts, scale=scale, offset=offset, expert_num=count, expert_tokens_num_mode=mode,
        quant_mode=int(offset is None),
    )  # fmt: skip
    shown = [y.float() * STEP] if offset is not None else shown_int8(y, row_scale)
    return [*shown, back, counts]


check("npu_moe_init_routing_quant", call_routing_int8, routing_int8, INT8,
      [(f32(5, 8), chosen(5, 2, 4), None, None, 1, 4),
       (f32(7, 16), chosen(7, 3, 9), f32(9, 16), None, 2, 9),
       (f32(6, 8), chosen(6, 2, 5), torch.tensor([30.0]), torch.tensor([5.0]), 1, 5)],
      {"unsorted": dict(order=lambda ids: np.arange(len(ids))),
       "modulo": dict(token=lambda place, k: place % (place.max() // k + 1)),
       "scale by 128": dict(rows=lambda y: int8_rows(y * 127 / 128)),
       "no smooth scale": dict(smooth=lambda x, table, expert: x),
       "smooth scale of the first": dict(smooth=lambda x, table, expert: x * table[0]),
       "no offset": dict(static=lambda x, s, o: np.clip(np.rint(x * s), -128, 127) * STEP),
       "divided": dict(static=lambda x, s, o: np.clip(np.rint(x / s + o), -128, 127) * STEP),
       "counts for sums": dict(counts=lambda ids, n, mode: np.bincount(ids, minlength=n))},
      1e-4)  # fmt: skip

REROUTE = Steps(begin=lambda n: n.cumsum() - n, by=lambda ranks, experts: (1, 0), index=same)


def re_routing(case, steps):
    x, counts, scales = array(case[0]), array(case[1]), case[2]
    begin = steps.begin(counts.reshape(-1)).reshape(counts.shape)
    major = steps.by(*counts.shape)
    places = sorted(np.ndindex(counts.shape), key=lambda place: [place[i] for i in major])
    rows = np.concatenate([np.arange(begin[p], begin[p] + counts[p]) for p in places])
    results = [x[rows % len(x)], steps.index(rows), counts.sum(0)]
    return results if scales is None else [*results, array(scales)[rows % len(x)]]


def call_re_routing(x, counts, scales):
    y, s, index, total = torch_npu.npu_moe_re_routing(x, counts, per_token_scales=scales)
    return [y, index, total] if scales is None else [y, index, total, s]


def ranks(*counts):
    table = torch.tensor(counts, dtype=torch.int64)
    return bf16(int(table.sum()), 6), table


check("npu_moe_re_routing", call_re_routing, re_routing, REROUTE,
      [(*ranks([2, 0, 3], [1, 4, 2]), None), (*ranks([1, 2], [3, 1], [2, 2]), f32(11)),
       (*ranks([4, 3, 2, 1]), None), (*ranks([5], [2]), f32(7))],
      {"rank by rank": dict(by=lambda ranks, experts: (0, 1)),
       "begins at the ends": dict(begin=lambda n: n.cumsum()),
       "begins at the counts": dict(begin=lambda n: n),
       "places for sources": dict(index=stable)}, 1e-6)  # fmt: skip
few = (bf16(4, 6).npu(), torch.tensor([[2, 1]]).npu(), None)
refused("npu_moe_re_routing", lambda: call_re_routing(*few), "'expertTokenNumPerRank'")

BACK = Steps(
    pick=lambda g, index: np.where((index < len(g))[:, None], g[np.minimum(index, len(g) - 1)], 0),
    join=lambda rows, k: rows.reshape(-1, k, rows.shape[1]).sum(1),
)


def permute_gradient(case, steps):
    g, index, k = array(case[0]), array(case[1]), case[2]
    return [steps.join(steps.pick(g, index), k)]


def call_permute_gradient(g, index, k):
    out = empty(len(index) // k, g.size(1))
    launch("aclnnMoeTokenPermuteGrad", gradient=g, sorted_indices=index, topk=k,
           padded_mode=False, out=out)  # fmt: skip
    return [out]


def shuffled(n):
    return torch.tensor(rng.permutation(n), dtype=I32)


check("aclnnMoeTokenPermuteGrad", call_permute_gradient, permute_gradient, BACK,
      [(f32(10, 6), shuffled(10), 2), (f32(9, 5), shuffled(12), 3), (f32(7, 4), shuffled(7), 1)],
      {"not permuted": dict(pick=lambda g, index: np.pad(g, ((0, len(index) - len(g)), (0, 0)))),
       "dropped rows wrap": dict(pick=lambda g, index: g[index % len(g)]),
       "inverse": dict(pick=lambda g, index: np.pad(g, ((0, len(index) - len(g)), (0, 0)))[
           np.argsort(index)]),
       "mean": dict(join=lambda rows, k: rows.reshape(-1, k, rows.shape[1]).mean(1)),
       "columns": dict(join=lambda rows, k: rows.reshape(k, -1, rows.shape[1]).sum(0))},
      1e-5)  # fmt: skip


def good_gradient():
    return dict(gradient=f32(10, 6), sorted_indices=shuffled(10), topk=2, padded_mode=False,
                out=empty(5, 6))  # fmt: skip


refuse("aclnnMoeTokenPermuteGrad", good_gradient, "'paddedMode'", padded_mode=True)
refuse("aclnnMoeTokenPermuteGrad", good_gradient, "'sortedIndices'", topk=3)
refuse("aclnnMoeTokenPermuteGrad", good_gradient, "'out'", out=empty(5, 7))


def unpermuted(rows, index, probs):
    """The forward pass in torch, whose gradients are the formula."""
    picked = rows[index.long()].view(*probs.shape, -1)
    return (picked * probs.unsqueeze(-1)).sum(1)


def check_unpermute_gradient():
    """aclnnMoeTokenUnpermuteGrad gives what autograd gives for the forward pass."""
    for tokens, k, width in ((5, 2, 6), (4, 3, 5), (7, 1, 4)):
        rows, probs = f32(tokens * k, width), f32(tokens, k)
        index, g = shuffled(tokens * k), f32(tokens, width)
        inputs = [x.clone().requires_grad_() for x in (rows, probs)]
        unpermuted(inputs[0], index, inputs[1]).backward(g)
        got = [empty(*rows.shape), empty(*probs.shape)]
        launch("aclnnMoeTokenUnpermuteGrad", permuted=rows, gradient=g, sorted_indices=index,
               probs=probs, padded_mode=False, restore_shape=[1], permuted_gradient=got[0],
               probs_gradient=got[1])  # fmt: skip
        for result, leaf in zip(got, inputs, strict=True):
            torch.testing.assert_close(result.cpu(), leaf.grad, rtol=1e-5, atol=1e-5)


check_unpermute_gradient()

MAP = Steps(by=lambda m: m.T, weights=lambda p: p.T, order=stable)


def map_permute(case, steps):
    x, m, probs = array(case[0]), array(case[1]), array(case[2])
    mask = steps.by(m).astype(bool)
    token = np.broadcast_to(np.arange(len(x)), mask.shape)[mask]
    return [x[token], steps.weights(probs)[mask], steps.order(token)]


def call_map_permute(x, m, probs):
    rows = int(m.sum().item())
    return torch_npu.npu_moe_token_permute_with_routing_map(x, m, probs=probs, num_out_tokens=rows)


def routing_map(tokens, k, experts):
    m = torch.zeros(tokens, experts, dtype=torch.bool)
    return f32(tokens, 5), m.scatter_(1, chosen(tokens, k, experts).long(), True)


check("npu_moe_token_permute_with_routing_map", call_map_permute, map_permute, MAP,
      [(*routing_map(5, 2, 5), f32(5, 5)), (*routing_map(7, 3, 7), f32(7, 7)),
       (*routing_map(4, 1, 4), f32(4, 4))],
      {"token by token": dict(by=same),
       "probs not turned": dict(weights=same),
       "no place": dict(order=same),
       "places backwards": dict(order=lambda token: stable(-token))}, 1e-6)  # fmt: skip
