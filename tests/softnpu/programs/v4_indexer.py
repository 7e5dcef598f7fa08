"""aclnnLightningIndexerV2, aclnnQuantLightningIndexerV2 and their metadata
(docs/spec/ascend-operators.md 4.10 C, D; see fused_check.py). Values are small integers: sums are
exact in any order, and equal scores are frequent.
"""

import ml_dtypes
import numpy as np
import torch
from aclnn import call
from fused_check import A5, Steps, array, bf16, check, f32, refused, rng, same
from sparse_layouts import whole
from v4_paged import cumulative, int32, on_npu, pool_of, with_gaps

PLAIN, QUANTISED = "aclnnLightningIndexerV2", "aclnnQuantLightningIndexerV2"
MODE = 1 if A5 else 2
KEYS = torch.float8_e4m3fn if A5 else torch.int8
SCALES = torch.float32 if A5 else torch.float16
HEADS = [64, 32] if A5 else [64, 64]
LENGTHS = ["cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "cmp_residual_k"]
NUMBERS = dict(mask_mode=3, cmp_ratio=4, layout_q="TND", layout_k="PA_BBND")


def listed(score, topk):
    """Best first, of equal ones the last; A5 lists what it chose from the last to the first."""
    order = np.lexsort((-np.arange(len(score)), -score))[:topk]
    return np.sort(order)[::-1] if A5 else order


STEPS = Steps(
    visible=lambda tokens, queries, i, ratio: (tokens - queries + i + 1) // ratio,
    tokens=lambda held, ratio, residual: held * ratio + residual,
    page=lambda table, b, column: table[b, column],
    relu=lambda dots: np.maximum(dots, 0),
    heads=lambda weights, dots: weights @ dots,
    scaled=lambda dots, q, k: dots * q[:, None] * k,
    rounded=lambda score: (
        np.float32(score).astype(ml_dtypes.bfloat16).astype(float) if A5 else score
    ),
    listed=listed,
    tail=-1,
)


def keys_of(case, name, b, held, steps):
    pool = case[name]
    if case.get("layout_k") == "TND":
        start = case["cu_seqlens_k"][b]
        return pool[start : start + held].reshape(held, -1)
    if case.get("layout_k") == "BSND":
        return pool[b, :held].reshape(held, -1)
    size = pool.shape[1]
    rows = [pool[steps.page(case["block_table"], b, i // size), i % size] for i in range(held)]
    return np.stack(rows).reshape(held, -1) if held else np.zeros((0, pool.shape[-1]))


def sequences(case):
    """(first row, queries, padding, keys) of each."""
    for b in range(len(case["residual"])):
        if "seqused_k" in case:
            held = case["seqused_k"][b]
        else:
            held = case["cu_seqlens_k"][b + 1] - case["cu_seqlens_k"][b]
        if case.get("layout_q") == "BSND":
            room = case["q"].shape[1]
            used = case["seqused_q"][b] if "seqused_q" in case else room
            yield b * room, used, room - used, held
        else:
            first, end = case["cu_seqlens_q"][b : b + 2]
            yield first, end - first, 0, held


def chosen(case, steps):
    case = {k: array(v) if isinstance(v, torch.Tensor) else v for k, v in case.items()}
    q = case["q"].reshape(-1, *case["q"].shape[-2:])
    weights, topk = case["weights"].reshape(len(q), -1), case["topk"]
    ratio, mask = case.get("cmp_ratio", 4), case.get("mask_mode", 3)
    index, value = np.full((len(q), topk), -7), np.full((len(q), topk), -7.0)
    for b, (first, queries, padding, held) in enumerate(sequences(case)):
        tokens = steps.tokens(held, ratio, case["residual"][b])
        keys = keys_of(case, "k", b, held, steps)
        scale = keys_of(case, "k_descale", b, held, steps)[:, 0] if "k_descale" in case else None
        for i in range(queries + padding):
            index[first + i], value[first + i] = steps.tail, -np.inf
            count = held if mask == 0 else min(steps.visible(tokens, queries, i, ratio), held)
            if i >= queries or count <= 0:
                continue
            dots = q[first + i] @ keys[:count].T
            if scale is not None:
                q_scale = case["q_descale"].reshape(len(q), -1)[first + i]
                dots = steps.scaled(dots, q_scale, scale[:count])
            score = steps.heads(weights[first + i], steps.relu(dots))
            score = steps.rounded(score) if scale is not None else score
            order = steps.listed(score, topk)
            index[first + i, : len(order)] = order
            value[first + i, : len(order)] = score[order]
    shape = (*case["q"].shape[:-2], 1, topk)
    value = np.where(np.isinf(value), -(2.0**30), value)
    return [index.reshape(shape), value.reshape(shape)]


def case_of(held, queries, topk, heads, *, quantised=False, ratio=4, size=16, behind=0, **more):
    """A TND call on pages: `held` entries of each sequence; so many rows `behind` belong to none
    and are not written.
    """
    rows = sum(queries) + behind
    kind = KEYS if quantised else torch.bfloat16
    k, table = pool_of([whole(n, 1, 128, most=2).to(kind) for n in held], size)
    residual = rng.integers(0, ratio, len(held))
    residual[-1] = ratio - 1  # where it counts: whatever was drawn, more is visible than without
    residual = np.maximum(residual, np.array(queries) - np.array(held) * ratio)
    case = dict(
        q=whole(rows, heads, 128, most=2).to(kind), k=k, block_table=table, topk=topk,
        weights=whole(rows, heads, most=3).to(SCALES if quantised else torch.float32),
        cu_seqlens_q=cumulative(queries), seqused_k=int32(held), residual=residual,
    )  # fmt: skip
    if ratio > 1:
        case["cmp_residual_k"] = int32(residual)
    if quantised:
        scales = [(2.0 ** whole(n, 1, most=1, dtype=torch.float32)).to(SCALES) for n in held]
        case["k_descale"] = torch.full(k.shape[:3], float("nan"), dtype=SCALES)
        for b, part in enumerate(scales):
            for i, scale in enumerate(part):
                case["k_descale"][table[b, i // size], i % size] = scale
        case["q_descale"] = (2.0 ** whole(rows, heads, most=1, dtype=torch.float32)).to(SCALES)
    return case | (dict(cmp_ratio=ratio) if ratio != 4 else {}) | more


def numbers(case, quantised):
    named = NUMBERS | {k: case[k] for k in NUMBERS if k in case}
    return named | (dict(quant_mode=MODE) if quantised else {})


def metadata_of(case, **changed):
    quantised = "k_descale" in case
    named = {k: case[k] for k in LENGTHS if k in case} | numbers(case, quantised)
    named |= dict(
        num_heads_q=case["q"].shape[-2], num_heads_k=1, head_dim=128, topk=case["topk"],
        batch_size=len(case["residual"]), max_seqlen_k=1 << 20,
        max_seqlen_q=case["q"].shape[1] if named["layout_q"] == "BSND" else 4096,
    )  # fmt: skip
    result = torch.empty(1024, dtype=torch.int32).npu()
    symbol = (QUANTISED if quantised else PLAIN) + "Metadata"
    call(symbol, **on_npu(named | changed), metadata=result)
    return result


def select(case, **changed):
    """(indices, values or nothing)."""
    quantised = "k_descale" in case
    if "metadata" not in changed:
        changed["metadata"] = metadata_of(case)
    returned = int(not quantised or A5)
    named = {k: v for k, v in case.items() if k != "residual"} | numbers(case, quantised)
    named |= dict(max_seqlen_q=-1, return_value=returned) | changed
    shape = (*named["q"].shape[:-2], 1, named["topk"])
    indices = torch.full(shape, -7, dtype=torch.int32).npu()
    kind = torch.bfloat16 if quantised else torch.float32
    values = torch.full(shape if named["return_value"] else (0,), -7.0, dtype=kind).npu()
    named = dict(sparse_indices=indices, sparse_values=values) | on_npu(named)
    call(QUANTISED if quantised else PLAIN, **named)
    return [indices, values.clamp(min=-(2.0**30))] if returned else [indices]


def formula(case, steps):
    """Without values where the call returns none; NaN where a page that nobody filled is read."""
    with np.errstate(invalid="ignore"):
        return chosen(case, steps)[: 2 if "k_descale" not in case or A5 else 1]


FAULTS = {
    "the first of equal scores": dict(
        listed=lambda score, topk: np.lexsort((np.arange(len(score)), -score))[:topk]
    ),
    "worst first": dict(listed=lambda score, topk: listed(-score, topk)),
    "in place": dict(listed=lambda score, topk: np.arange(len(score))[:topk]),
    "the entry that closes is hidden": dict(
        visible=lambda tokens, queries, i, ratio: (tokens - queries + i) // ratio
    ),
    "all entries visible": dict(visible=lambda tokens, queries, i, ratio: tokens),
    "queries from the start": dict(visible=lambda tokens, queries, i, ratio: (i + 1) // ratio),
    "residual ignored": dict(tokens=lambda held, ratio, residual: held * ratio),
    "pages of the first sequence": dict(page=lambda table, b, column: table[0, column]),
    "no relu": dict(relu=same),
    "weights of the first head": dict(heads=lambda weights, dots: weights[0] * dots.sum(0)),
    "rows of nothing": dict(tail=0),
}
SCALE_FAULTS = {
    "keys not scaled": dict(scaled=lambda dots, q, k: dots * q[:, None]),
    "queries not scaled": dict(scaled=lambda dots, q, k: dots * k),
}
if A5:
    SCALE_FAULTS["scores in fp32"] = dict(rounded=same)


def other_layouts():
    """BSND with seqused_q beside pages; TND beside TND; BSND beside BSND."""
    first = case_of([9, 30], [3, 3], 8, HEADS[0])
    first |= dict(
        q=first["q"].view(2, 3, HEADS[0], 128), weights=first["weights"].view(2, 3, -1),
        layout_q="BSND", seqused_q=int32([2, 3]),
    )  # fmt: skip
    second = case_of([20, 7], [2, 1], 5, HEADS[0])
    second |= dict(k=whole(27, 1, 128).bfloat16(), cu_seqlens_k=cumulative([20, 7]), layout_k="TND")
    third = dict(first) | dict(k=whole(2, 40, 1, 128).bfloat16(), layout_k="BSND")
    drop = {
        0: ["cu_seqlens_q"],
        1: ["block_table", "seqused_k"],
        2: ["cu_seqlens_q", "block_table"],
    }
    return [
        {k: v for k, v in case.items() if k not in drop[i]}
        for i, case in enumerate((first, second, third))
    ]


def checked(name, cases, faults):
    check(
        name, select, lambda case, steps: formula(case[0], steps), STEPS,
        [(case,) for case in cases], faults, 1e-6,
    )  # fmt: skip


def all_equal(case):
    """Every score is 0, so that ties decide everything, whatever was drawn."""
    return case | dict(weights=case["weights"] * 0)


cases = [
    case_of([9, 30, 1], [3, 2, 4], 8, HEADS[0], behind=2),
    all_equal(case_of([30], [2], 8, HEADS[0])),
    case_of([300], [2], 128, HEADS[1], size=32),
    case_of([40, 17], [5, 1], 16, HEADS[0], ratio=1),
    case_of([3, 2], [2, 300], 4, HEADS[1], ratio=128),
    case_of([12, 20], [3, 2], 6, HEADS[0], mask_mode=0),
    *other_layouts(),
]
checked("lightning_indexer_v2", cases, FAULTS)
quantised = [
    case_of([9, 30, 1], [3, 2, 4], 8, HEADS[0], quantised=True),
    all_equal(case_of([30], [2], 8, HEADS[0], quantised=True)),
    case_of([200], [2], 64, HEADS[1], quantised=True, size=32),
    case_of([40, 17], [5, 1], 16, HEADS[0], quantised=True, ratio=1),
    case_of([12, 20], [3, 2], 6, HEADS[0], quantised=True, mask_mode=0),
]
checked("quant_lightning_indexer_v2", quantised, FAULTS | SCALE_FAULTS)


def refusable(case):
    """(argument, what it is replaced by) that both indexers refuse."""
    rows, heads = case["q"].shape[:2]
    return (
        ("q", dict(q=f32(rows, heads, 128))),
        ("q", dict(q=case["q"][..., :64].contiguous())),
        ("q", dict(q=case["q"].unsqueeze(0))),
        ("k", dict(k=case["k"][..., :64].contiguous())),
        ("k", dict(k=f32(*case["k"].shape))),
        ("k", dict(k=case["k"].transpose(0, 1))),
        ("weights", dict(weights=case["weights"][:-1])),
        ("weights", dict(weights=bf16(rows, heads))),
        ("cu_seqlens_q", dict(cu_seqlens_q=None)),
        ("cu_seqlens_q", dict(cu_seqlens_q=case["cu_seqlens_q"].long())),
        ("seqused_q", dict(seqused_q=int32([1, 2, 3]))),
        ("seqused_k", dict(seqused_k=None)),
        ("seqused_k", dict(seqused_k=int32([1]))),
        ("cmp_residual_k", dict(cmp_residual_k=None)),
        ("cmp_residual_k", dict(cmp_residual_k=int32([0]))),
        ("block_table", dict(block_table=None)),
        ("block_table", dict(block_table=case["block_table"][:1])),
        ("output_idx_offset", dict(output_idx_offset=int32([0, 0, 0]))),
        ("metadata", dict(metadata=int32([1]))),
        ("topk", dict(topk=0)),
        ("topk", dict(topk=2049)),
        ("mask_mode", dict(mask_mode=4)),
        ("cmp_ratio", dict(cmp_ratio=8)),
        ("layout_q", dict(layout_q="BNSD")),
        ("layout_k", dict(layout_k="PA_BNSD")),
        ("return_value", dict(return_value=2)),
        ("sparse_indices", dict(sparse_indices=torch.zeros(rows, 1, 3, dtype=torch.int32))),
        ("sparse_values", dict(sparse_values=torch.zeros(0).half())),
    )


def faulty(case):
    """(argument, changes) that both kernels name."""
    wrong = case["weights"].clone()
    wrong[0, 0] = float("nan")
    return (
        ("metadata", dict(metadata=torch.zeros(1024, dtype=torch.int32))),
        ("block_table", dict(block_table=case["block_table"] * 0 + 99)),
        ("seqused_k", dict(metadata=None, seqused_k=case["seqused_k"] + 99)),
        ("seqused_k", dict(metadata=None, seqused_k=case["seqused_k"] * 0)),
        ("cmp_residual_k", dict(metadata=None, cmp_residual_k=case["cmp_residual_k"] * 0 + 4)),
        ("max_seqlen_q", dict(max_seqlen_q=1)),
        ("q", dict(weights=wrong)),
    )


METADATA_REFUSES = (
    ("num_heads_q", dict(num_heads_q=16)),
    ("num_heads_k", dict(num_heads_k=2)),
    ("head_dim", dict(head_dim=64)),
    ("topk", dict(topk=-1)),
    ("mask_mode", dict(mask_mode=1)),
    ("cmp_ratio", dict(cmp_ratio=2)),
    ("batch_size", dict(batch_size=-1)),
    ("cmp_residual_k", dict(cmp_residual_k=None)),
)


def refusals(case):
    symbol = QUANTISED if "k_descale" in case else PLAIN
    made = metadata_of(case)

    def run(changed):
        return lambda: select(case, **{"metadata": made} | changed)

    for argument, changed in refusable(case):
        refused(symbol, run(changed), f"'{argument}'")
    for name, other in (
        ("cu_seqlens_q", cumulative([3, 3, 3])),
        ("seqused_k", case["seqused_k"] - 1),
        ("cmp_residual_k", (case["cmp_residual_k"] + 1) % 4),
    ):
        refused(symbol, run({name: other}), f"'metadata': made for another {name}", 507015)
    for argument, changed in faulty(case):
        refused(symbol, run(changed), f"'{argument}'", 507015)
    for argument, changed in METADATA_REFUSES:
        refused(symbol, lambda changed=changed: metadata_of(case, **changed), f"'{argument}'")
    lengths = case["seqused_k"].long()
    refused(symbol, lambda: metadata_of(case, seqused_k=lengths), "'seqused_k'")
    if not A5:
        refused(symbol, lambda: select(case_of([9], [1], 8, 32, quantised=symbol == QUANTISED)),
                "'num_heads_q'")  # fmt: skip
    apart = select(case, k=with_gaps(case["k"]), metadata=None)[0].cpu()
    assert torch.equal(apart, select(case)[0].cpu()), "pages with gaps"


refusals(cases[0])
refusals(quantised[0])
case = quantised[0]
for argument, changed in (
    ("quant_mode", dict(quant_mode=3 - MODE)),
    ("quant_mode", dict(quant_mode=4)),
    ("q_descale", dict(q_descale=None)),
    ("q_descale", dict(q_descale=case["q_descale"].double())),
    ("q_descale", dict(q_descale=case["q_descale"][:1])),
    ("k_descale", dict(k_descale=case["k_descale"].unsqueeze(-1))),
    ("k_descale", dict(k_descale=case["k_descale"][:1])),
):
    refused(QUANTISED, lambda c=changed: select(case, **c), f"'{argument}'")
refused(QUANTISED, lambda: metadata_of(case, quant_mode=0), "'quant_mode'")
if A5:
    refused(PLAIN, lambda: metadata_of(cases[0], topk=3072), "'topk'")
else:
    metadata_of(cases[0], topk=3072)
    refused(QUANTISED, lambda: metadata_of(case, topk=3072), "'topk'")
    refused(QUANTISED, lambda: select(case, return_value=1), "'return_value'")
    huge = dict(weights=case["weights"] * 0 + 60000, q_descale=case["q_descale"] * 0 + 4)
    refused(QUANTISED, lambda: select(case, **huge), "beyond fp16", 507015)
