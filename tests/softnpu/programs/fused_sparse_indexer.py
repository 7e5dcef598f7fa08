"""Lightning indexers (see fused_check.py).
Integer data: scores are exact, so that indices can be compared one by one.
"""

import numpy as np
import torch
import torch_npu
from fused_check import A5, Steps, array, check, problems, refused, rng, same
from sparse_layouts import (
    ALL,
    PLACE_FAULTS,
    PLACES,
    int32,
    on_npu,
    page_table,
    places,
    turned,
    whole,
    with_gaps,
)

HIDDEN = -4096.0  # stands for -inf, which has no distance


def best_first(score, visible):
    return sorted(range(visible), key=lambda i: (-score[i], i))


def seen(i, queries, keys):
    return keys + i - queries + 1


def summed(dots, w):
    return (np.maximum(dots, 0) * w).sum(0)


STEPS = Steps(
    **vars(PLACES),
    weights=same,
    query_scale=np.multiply,
    key_scale=lambda dots, scale, keys: dots * scale[keys].T,
    score=summed,
    visible=seen,
    order=best_first,
    chosen=same,
    filler=-1,
)


def indexed(case, steps, scales=(None, None)):
    query, key, weights, ql, kl, table, layout_query, layout_key, count, mode, values = case
    q, w = (
        array(query.double()).reshape(-1, *query.shape[-2:]),
        array(weights).reshape(-1, query.shape[-2]),
    )
    k, w = array(key.double()).reshape(-1, key.shape[-1]), steps.weights(w)
    ids, best = np.full((len(q), count), -1), np.full((len(q), count), HIDDEN)
    scale_q, scale_k = (None if s is None else array(s).reshape(-1, s.shape[-1]) for s in scales)
    for rows, keys in places(query, key, ql, kl, table, layout_query, layout_key, steps):
        for i, row in enumerate(rows):
            dots = q[row] @ k[keys].T
            if scale_q is not None:
                dots = steps.key_scale(
                    steps.query_scale(dots, scale_q[row][:, None]), scale_k, keys
                )
            score = steps.score(dots, w[row][:, None])
            visible = steps.visible(i, len(rows), len(keys)) if mode == 3 else len(keys)
            order = steps.chosen(steps.order(score, int(np.clip(visible, 0, len(keys))))[:count])
            ids[row] = [*order, *[steps.filler] * (count - len(order))]
            best[row, : len(order)] = score[order]
    shape = (*query.shape[:-2], 1, count)
    best = torch.tensor(best).to(query.dtype).double().numpy() if scales[0] is None else best
    return [ids.reshape(shape), *([best.reshape(shape)] if values else [])]


def call(query, key, weights, ql, kl, table, layout_query, layout_key, count, mode, values):
    ids, best = torch_npu.npu_lightning_indexer(
        query, key, weights, actual_seq_lengths_query=ql, actual_seq_lengths_key=kl,
        block_table=table, layout_query=layout_query, layout_key=layout_key, sparse_count=count,
        sparse_mode=mode, return_value=values,
    )  # fmt: skip
    return [ids, *([torch.nan_to_num(best.float().cpu(), neginf=HIDDEN)] if values else [])]


def weights_of(*shape, dtype=torch.bfloat16):
    return (whole(*shape, most=8, dtype=torch.float32) / 8).to(dtype)


def paged(heads, ends, lengths, block, count, mode, dtype=torch.bfloat16):
    """Queries TND (or, without `ends`, one for each sequence), keys in pages."""
    table, pages = page_table(lengths, block)
    first = (ends[-1],) if ends else (len(lengths), 1)
    return (whole(*first, heads, 128, dtype=dtype), whole(pages, block, 1, 128, dtype=dtype),
            weights_of(*first, heads, dtype=dtype), int32(ends) if ends else None, int32(lengths),
            table,
            "TND" if ends else "BSND", "PA_BSND", count, mode, False)  # fmt: skip


def plain(
    layout, heads, queries, keys, ql, kl, count, mode, values, dtype=torch.bfloat16, weights=None
):
    return (whole(*queries, heads, 128, dtype=dtype), whole(*keys, 1, 128, dtype=dtype),
            weights_of(*queries, heads, dtype=weights or dtype), ql and int32(ql), kl and int32(kl),
            None,
            layout, layout, count, mode, values)  # fmt: skip


CASES = [
    plain("BSND", 8, (2, 5), (2, 37), None, None, 7, 3, True),
    plain("BSND", 16, (3, 4), (3, 9), [4, 0, 2], [9, 3, 0], 12, 3, True, torch.float16),
    plain("TND", 24, (9,), (70,), [4, 4, 7], [30, 40, 70], 2048, 0, False),
    plain("TND", 8, (6,), (12,), [5, 6], [3, 12], 3, 3, True),  # the first queries have no key
    paged(32, None, [100, 17], 16, 3072, 0, torch.float16),
    paged(
        64, [2, 4], [1030, 515], 128, 512, 3
    ),  # DeepSeek V4: 64 heads of 128, 512 keys, speculative decoding
]
if not A5:
    CASES += [
        plain("BSND", 5, (1, 3), (1, 20), None, [18], 4, 3, False),
        plain("BSND", 64, (1, 2), (1, 33), [2], None, 33, 0, True, torch.float16, torch.float32),
    ]
FAULTS = {
    "no relu": dict(score=lambda dots, w: (dots * w).sum(0)),
    "relu behind the weights": dict(score=lambda dots, w: np.maximum(dots * w, 0).sum(0)),
    "no weights": dict(weights=np.ones_like),
    "weights without sign": dict(weights=np.abs),
    "first head only": dict(score=lambda dots, w: summed(dots[:1], w[:1])),
    "no causal mask": dict(visible=lambda i, queries, keys: keys),
    "one key too many": dict(visible=lambda i, queries, keys: seen(i, queries, keys) + 1),
    "diagonal from the left": dict(visible=lambda i, queries, keys: i + 1),
    "worst first": dict(
        order=lambda score, visible: sorted(range(visible), key=lambda i: (score[i], i))
    ),
    "ties to the larger": dict(
        order=lambda score, visible: sorted(range(visible), key=lambda i: (-score[i], -i))
    ),
    "in the order of keys": dict(chosen=sorted),
    "zeros behind the last": dict(filler=0),
    **PLACE_FAULTS,
}
SCALE_FAULTS = {
    "no query scale": dict(query_scale=same),
    "no key scale": dict(key_scale=same),
    "scale of another key": dict(
        key_scale=lambda dots, scale, keys: dots * scale[np.roll(keys, 1)].T
    ),
}


def untouched(case):
    """Rows of TND behind the last sequence are not written:
    the formula and the call leave them out.
    """
    return case[0].shape[0] if case[6] == "BSND" else int(case[3][-1])


check(
    "lightning_indexer",
    lambda *a: [x[: untouched(a)] for x in call(*a)],
    lambda case, steps: [x[: untouched(case)] for x in indexed(case, steps)],
    STEPS,
    CASES,
    FAULTS,
    1e-6,
)


NAMES = (
    "query",
    "key",
    "weights",
    "ql",
    "kl",
    "table",
    "layout_query",
    "layout_key",
    "count",
    "mode",
    "values",
)


def bad(argument, case, **changes):
    """The call with some arguments replaced, by their place in `call`, must be refused."""
    case = [changes.get(name, value) for name, value in zip(NAMES, case, strict=True)]
    refused("lightning_indexer", lambda: call(*map(on_npu, case)), argument)


b, t, p = CASES[0], CASES[2], CASES[5]
bad("query", b, query=whole(2, 5, 8, 128, dtype=torch.float32))
bad("query", b, query=whole(2, 5, 8, 64))
bad("query", b, query=whole(10, 8, 128), weights=weights_of(10, 8))
bad("query", b, query=whole(2, 5, 65, 128), weights=weights_of(2, 5, 65))
bad("key", b, key=b[1].half())
bad("key", b, key=whole(2, 37, 2, 128))
bad("key", b, key=whole(1, 37, 1, 128))
bad("key", p, key=whole(40, 24, 1, 128))
bad("key", p, key=whole(4, 2048, 1, 128))
bad("weights", b, weights=b[2].half())
bad("weights", b, weights=weights_of(2, 5, 9))
bad("weights", b, weights=weights_of(2, 5, 8, 1))
bad("weights", b, weights=turned(b[2]))
bad("query", b, query=turned(b[0]))
bad("actual_seq_lengths_query", b, ql=torch.tensor([5, 5]))
bad("actual_seq_lengths_query", b, ql=int32([5]))
bad("actual_seq_lengths_query", t, ql=None)
bad("actual_seq_lengths_key", t, kl=None)
bad("actual_seq_lengths_key", p, kl=None)
bad("actual_seq_lengths_key", t, kl=int32([30, 40]))
bad("block_table", p, table=None)
bad("block_table", p, table=p[5][:1])
bad("block_table", p, table=p[5][0])
bad("block_table", p, table=p[5].long())
bad("block_table", b, table=int32([[0], [1]]))
bad("layout_query", b, layout_query="BNSD")
bad("layout_key", b, layout_key="TND")
bad("sparse_count", b, count=2049)
bad("sparse_count", b, count=9216)
bad("sparse_mode", b, mode=1)
bad("return_value", p, values=True)
for name in ("pre_tokens", "next_tokens"):
    refused(
        "lightning_indexer",
        lambda name=name: torch_npu.npu_lightning_indexer(
            *[x.npu() for x in b[:3]], sparse_count=7, **{name: 1}
        ),
        name,
    )
bad("actual_seq_lengths_key is negative or beyond", b, kl=int32([37, 38]), values=False)
bad("actual_seq_lengths_query falls", t, ql=int32([4, 3, 7]))
bad("block_table names a block", p, table=p[5] * 0 - 1)


if A5:
    bad("query", b, query=whole(2, 5, 40, 128), weights=weights_of(2, 5, 40))
    bad("weights", b, weights=b[2].float())
    gaps = call(*[with_gaps(x) if i == 1 else on_npu(x) for i, x in enumerate(p)])
    if not (array(gaps[0]) == indexed(p, STEPS)[0]).all():
        problems.append("lightning_indexer: pages with gaps")
else:
    bad("key", p, key=with_gaps(p[1]))
bad("key", b, key=with_gaps(b[1]))


def call_quant(
    query,
    key,
    weights,
    ql,
    kl,
    table,
    layout_query,
    layout_key,
    count,
    mode,
    values,
    scale_q,
    scale_k,
):
    return [
        torch_npu.npu_quant_lightning_indexer(
            query, key, weights, scale_q, scale_k, 0, 0, actual_seq_lengths_query=ql,
            actual_seq_lengths_key=kl, block_table=table, layout_query=layout_query,
            layout_key=layout_key, sparse_count=count, sparse_mode=mode,
        )
    ]  # fmt: skip


def powers(*shape, dtype):
    return torch.tensor(2.0 ** rng.integers(-1, 2, shape)).to(dtype)


def quantised(case, kind, dtype=torch.float16):
    """A case of the float operator with int8 or FP8 data;
    scales are fp16 with fp16 weights, fp32 with bf16.
    """
    query, key, weights, *rest = case
    scale = torch.float16 if dtype == torch.float16 else torch.float32
    numbers = [whole(*x.shape, most=4, dtype=torch.float32).to(kind) for x in (query, key)]
    return (*numbers, weights.to(dtype), *rest[:7], False,
            powers(*weights.shape, dtype=scale), powers(*key.shape[:-1], dtype=scale))  # fmt: skip


QUANTISED = [quantised(case, torch.int8) for i, case in enumerate(CASES) if case[8] <= 2048]
if A5:
    QUANTISED += [
        quantised(case, torch.float8_e4m3fn, torch.bfloat16)
        for case in (CASES[0], CASES[2], CASES[5])
    ]
    QUANTISED += [quantised(CASES[1], torch.float8_e4m3fn)]

check(
    "quant_lightning_indexer",
    lambda *a: [x[: untouched(a)] for x in call_quant(*a)],
    lambda case, steps: [x[: untouched(case)] for x in indexed(case[:11], steps, case[11:])],
    STEPS,
    QUANTISED,
    FAULTS | SCALE_FAULTS,
    1e-6,
)


def bad_quant(argument, case, *modes, **changes):
    names = [*NAMES, "scale_q", "scale_k"]
    case = [changes.get(name, value) for name, value in zip(names, case, strict=True)]
    refused(
        "quant_lightning_indexer",
        lambda: call_quant(*map(on_npu, case)),
        argument,
    )


b, p = QUANTISED[0], quantised(CASES[5], torch.int8)
bad_quant("query", b, query=b[0].half())
bad_quant("query", b, query=b[0][..., :64].contiguous())
bad_quant(
    "query", b, query=b[0].float().to(torch.float8_e5m2), key=b[1].float().to(torch.float8_e5m2)
)
bad_quant("weights", b, weights=b[2].bfloat16())
bad_quant("weights", b, weights=b[2].float())
bad_quant("query_dequant_scale", b, scale_q=b[11].float())
bad_quant("query_dequant_scale", b, scale_q=b[11][:1].contiguous())
bad_quant("key_dequant_scale", b, scale_k=b[12].float())
bad_quant("key_dequant_scale", b, scale_k=b[12][:, :1].contiguous())
bad_quant("query_dequant_scale", b, scale_q=turned(b[11]))
bad_quant("key_dequant_scale", b, scale_k=b[12][..., None])
bad_quant("sparse_count", b, count=3072)
bad_quant("block_table", p, table=None)
bad_quant("beyond fp16", b, weights=b[2] * 0 + 60000)
for place, name in enumerate(("query_quant_mode", "key_quant_mode")):
    refused(
        "quant_lightning_indexer",
        lambda place=place: torch_npu.npu_quant_lightning_indexer(
            *[x.npu() for x in (*b[:3], *b[11:])],
            *[int(i == place) for i in range(2)],
            sparse_count=7,
        ),
        name,
    )
for name in ("pre_tokens", "next_tokens"):
    refused(
        "quant_lightning_indexer",
        lambda name=name: torch_npu.npu_quant_lightning_indexer(
            *[x.npu() for x in (*b[:3], *b[11:])], 0, 0, sparse_count=7, **{name: ALL - 1}
        ),
        name,
    )
if A5:
    f = quantised(CASES[0], torch.float8_e4m3fn, torch.bfloat16)
    bad_quant("key", f, key=b[1])
    bad_quant("query_dequant_scale", f, scale_q=f[11].half(), scale_k=f[12].half())
    refused(
        "quant_lightning_indexer",
        lambda: torch_npu.npu_quant_lightning_indexer(
            *[x.npu() for x in (b[0].byte(), b[1].byte(), f[2], *f[11:])], 0, 0, sparse_count=2048,
            query_dtype=torch_npu.hifloat8, key_dtype=torch_npu.hifloat8,
        ),
        "not emulated",
    )  # fmt: skip
else:
    bad_quant(
        "query",
        b,
        query=b[0].float().to(torch.float8_e4m3fn),
        key=b[1].float().to(torch.float8_e4m3fn),
    )
    bad_quant("key", p, key=with_gaps(p[1]))
    bad_quant("key_dequant_scale", p, scale_k=with_gaps(p[12]))
