"""FusedInferAttentionScore in both of torch_npu's forms (see fused_check.py);
refusals: fused_attention_limits.py.
"""

import numpy as np
import torch
import torch_npu
from fused_check import A5, Steps, array, bf16, check, f32, rng, same

INFINITE = 1e4  # stands for the infinity of rows that see no key
TRIANGLE = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
# Ours, npu_fused_infer_attention_score's, npu_fused_infer_attention_score_v2's
NAMES = [
    ("heads", "num_heads", "num_query_heads"),
    ("kv", "num_key_value_heads", "num_key_value_heads"),
    ("scale", "scale", "softmax_scale"),
    ("layout", "input_layout", "input_layout"),
    ("mask", "atten_mask", "atten_mask"),
    ("pse", "pse_shift", "pse_shift"),
    ("lengths", "actual_seq_lengths", "actual_seq_qlen"),
    ("key_lengths", "actual_seq_lengths_kv", "actual_seq_kvlen"),
    ("table", "block_table", "block_table"),
    ("block", "block_size", "block_size"),
    ("sparse", "sparse_mode", "sparse_mode"),
    ("before", "pre_tokens", "pre_tokens"),
    ("after", "next_tokens", "next_tokens"),
    ("precise", "inner_precise", "inner_precise"),
    ("query_rope", "query_rope", "query_rope"),
    ("key_rope", "key_rope", "key_rope"),
    ("sink", None, "learnable_sink"),
    ("lse", "softmax_lse_flag", "return_softmax_lse"),
]


def arguments(options, form):
    moved = {name: x.npu() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    return {names[form]: moved[names[0]] for names in NAMES if names[0] in options}


def finite(x):
    return torch.where(torch.isinf(x), INFINITE, x) if x.dtype == torch.float32 else x


def call_v1(query, key, value, options):
    out = torch_npu.npu_fused_infer_attention_score(query, key, value, **arguments(options, 1))
    return [finite(x) for x in out[: 1 + options.get("lse", False)]]


def call_v2(query, key, value, options):
    out = torch_npu.npu_fused_infer_attention_score_v2(query, key, value, **arguments(options, 2))
    return [finite(x) for x in out[: 1 + options.get("lse", False)]]


def by_workspace(form):
    """With a workspace of the largest size and given results, as captured graphs are updated."""
    name = "npu_fused_infer_attention_score" + ("_v2" if form == 2 else "")
    operator, largest = getattr(torch_npu, name), getattr(torch_npu, f"_{name}_get_max_workspace")

    def call(query, key, value, options):
        given = arguments(options, form)
        workspace = largest(query, key, value, **given)
        out = [torch.full_like(x, 7) for x in operator(query, key, value, **given)]
        operator.out(query, key, value, **given, workspace=workspace, out=out)
        return [finite(x) for x in out[: 1 + options.get("lse", False)]]

    return call


def arrange(x, source, target, heads):
    """From one order of axes to another: letters B S N D T, H = N and D in one."""
    if source[-1] == "H":
        x, source = x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads), source[:-1] + "ND"
    wide = target.replace("H", "ND")
    x = x.transpose([source.index(axis) for axis in wide])
    return x.reshape(*x.shape[:-2], heads * x.shape[-1]) if target[-1] == "H" else x


def unpaged(cache, ids, heads):
    """Blocks of a cache one behind the other: [S, N, D]."""
    x = cache[ids]
    if x.ndim == 3:
        x = arrange(x, "BSH", "BSND", heads)
    elif x.ndim == 4:
        x = arrange(x, "BNSD", "BSND", heads)
    else:
        x = x.transpose(0, 3, 1, 2, 4).reshape(len(x), x.shape[3], heads, -1)
    return x.reshape(-1, *x.shape[2:])


def cut(options, b, s, t, steps):
    """Rows of sequence b: of the queries and of the keys."""
    ends, key_ends = options.get("lengths"), options.get("key_lengths")
    if "T" in options["layout"]:
        q = slice(steps.query_start(ends, b), ends[b])
        if "table" not in options:
            return q, slice(key_ends[b - 1] if b else 0, key_ends[b])
    else:
        q = slice(0, s if ends is None or (s == 1 and not A5) else ends[b if len(ends) > 1 else 0])
        key_ends = steps.key_lengths(key_ends)
    return q, slice(0, t if key_ends is None else key_ends[b if len(key_ends) > 1 else 0])


def causal(i, j, shift, before, after):
    return j <= i + shift


def band(i, j, shift, before, after):
    return (j <= i + shift + after) & (j >= i + shift - before)


def seen(options, b, s, q, k, steps):
    """[queries, keys]: does the query see the key?"""
    i, j = np.arange(q)[:, None], np.arange(k)[None]
    mode, before, after = (
        options.get(n, d) for n, d in (("sparse", 0), ("before", 2**31 - 1), ("after", 2**31 - 1))
    )
    if mode == 0 and "mask" not in options:
        return np.ones((q, k), bool)
    idle = (
        not A5
        and s == 1
        and options["layout"] in ("BSH", "BSND", "BNSD")
        and "query_rope" not in options
    )
    if mode >= 2 and not idle:
        return (causal if mode < 4 else steps.window)(i, j, steps.shift(mode, q, k), before, after)
    masks = array(options["mask"]).astype(bool)
    if masks.ndim == 2:
        masks = masks[:, None] if s == 1 else masks[None]
    masks = masks.reshape(masks.shape[0], *masks.shape[-2:])
    mask = steps.mask(masks[0 if len(masks) == 1 else steps.sequence(b)][:q, :k])
    return ~mask if mode == 1 or idle else ~mask & steps.masked_band(i, j, 0, before, after)


def weigh(scores, see, sink, steps):
    """Weights and log-sum-exp of one head."""
    e, lse = np.zeros_like(scores), np.full((len(scores), 1), INFINITE)
    for row in range(len(scores)):
        if not see[row].any():
            e[row] = steps.blind(scores.shape[1])
            continue
        x = np.exp(scores[row][see[row]])
        total = x.sum() if sink is None else steps.total(x.sum(), np.exp(sink))
        e[row][see[row]] = x / total
        lse[row] = np.log(steps.lse_of(total, x.sum()))
    return e, steps.lse(lse)


STEPS = Steps(
    query_start=lambda ends, b: ends[b - 1] if b else 0,
    key_lengths=same,
    seen=seen,
    window=band,
    masked_band=band,
    shift=lambda mode, queries, keys: keys - queries if mode > 2 else 0,
    mask=same,
    sequence=same,
    blind=lambda keys: 0,
    total=np.add,
    lse_of=same,
    lse=same,
    value=lambda key, value, width: (
        key if A5 and width == 512 else value
    ),  # V5: value has no effect then
    blocks=lambda table, b: table[b],
    group=lambda head, heads, groups: head // (heads // groups),
    rotary=np.add,
    scaled=np.multiply,
    pse=lambda scores, shift, scale: scores + shift,
)


def attention(case, steps):
    query, key, value = (array(x) for x in case[:3])
    options = {"kv": case[3]["heads"], "scale": 1.0} | case[3]
    source, _, target = options["layout"].partition("_")
    heads, groups, tokens, paged = (
        options["heads"],
        options["kv"],
        "T" in source,
        "table" in options,
    )
    common = "TND" if tokens else "BSND"
    if "query_rope" in options:
        value = steps.value(key, value, query.shape[-1] // (heads if source == "BSH" else 1))

    def split(x, of):
        return arrange(x, source, common, of)

    q = split(query, heads)
    qr = split(array(options["query_rope"]), heads) if "query_rope" in options else q[..., :0]
    parts = [key, value, array(options["key_rope"])] if "key_rope" in options else [key, value]
    parts = parts if paged else [split(x, groups) for x in parts]
    batch = len(options["lengths"]) if tokens else len(q)
    width = unpaged(value, [0], groups).shape[-1] if paged else parts[1].shape[-1]
    out, lse = np.zeros((*q.shape[:-1], width)), np.full((*q.shape[:-1], 1), INFINITE)
    for b in range(batch):
        ids = steps.blocks(array(options["table"]), b) if paged else None
        rows = [unpaged(x, ids, groups) if paged else x if tokens else x[b] for x in parts]
        of_q, of_k = cut(options, b, q.shape[-3], len(rows[0]), steps)
        x, r = (y[of_q] if tokens else y[b][of_q] for y in (q, qr))
        k, v, *kr = (y[of_k] for y in rows)
        if not len(x) or not len(k):
            continue
        see = steps.seen(options, b, q.shape[-3], len(x), len(k), steps)
        for h in range(heads):
            g = steps.group(h, heads, groups)
            scores = x[:, h] @ k[:, g].T
            if kr:
                scores = steps.rotary(scores, r[:, h] @ kr[0][:, g].T)
            scores = steps.scaled(scores, options["scale"])
            if "pse" in options:
                shift = array(options["pse"])
                shift = shift[b if len(shift) > 1 else 0, h, : len(x), : len(k)]
                scores = steps.pse(scores, shift, options["scale"])
            e, log = weigh(
                scores, see, array(options["sink"])[h] if "sink" in options else None, steps
            )
            place = (slice(of_q.start, of_q.stop), h) if tokens else (b, of_q, h)
            out[place], lse[place] = e @ v[:, g], log
    out = arrange(out, common, target or source, heads)
    return [out, lse if tokens else lse.transpose(0, 2, 1, 3)] if options.get("lse") else [out]


def pages(heads, width, block, lengths, form, dtype=torch.bfloat16):
    """A cache in which the sequences' blocks lie at random, and its table."""
    need = [-(-n // block) for n in lengths]
    total = sum(need) + 2
    shape = {3: (total, block, heads * width), 4: (total, heads, block, width)}.get(form)
    shape = shape or (total, heads, width // 16, block, 16)
    order = rng.permutation(total)
    table = np.zeros((len(lengths), max(need) + 1), np.int32)
    for b, n in enumerate(need):
        table[b, :n] = order[sum(need[:b]) :][:n]
    return f32(*shape).to(dtype), torch.tensor(table)


def paged(query, heads, width, block, lengths, form, /, rope=False, **options):
    key, table = pages(heads, width, block, lengths, form)
    value, rotary = (pages(heads, w, block, lengths, form)[0] for w in (width, 64))
    options |= {"table": table, "block": block, "key_lengths": lengths, "kv": heads}
    return query, key, value, options | ({"key_rope": rotary} if rope else {})


def masks(*shape):
    return torch.tensor(rng.random(shape) < 0.3)


half = f32(2, 4, 5, 32).half()
blind = masks(2, 1, 5, 9)
blind[1, :, 3] = True
cases = [
    (bf16(2, 5, 64), bf16(2, 7, 32), bf16(2, 7, 32),
     {"layout": "BSH", "heads": 4, "kv": 2, "scale": 0.25, "lse": True}),
    (half, *(f32(2, 4, 9, 32).half() for _ in "kv"),
     {"layout": "BNSD", "heads": 4, "scale": 0.2, "mask": blind, "before": 1, "after": 3}
     | {"lengths": [5, 4], "key_lengths": [9, 6], "precise": 2, "lse": True}),
    (bf16(2, 3, 4, 16), *(bf16(2, 6, 1, 16) for _ in "kv"), {"layout": "BSND", "heads": 4, "kv": 1}
     | {"mask": masks(1, 5, 8).to(torch.int8), "sparse": 1, "key_lengths": [4]}),
    (bf16(1, 6, 2, 32), *(bf16(1, 6, 2, 32) for _ in "kv"),
     {"layout": "BSND", "heads": 2, "mask": TRIANGLE, "sparse": 2}),
    (bf16(2, 2, 6, 16), *(bf16(2, 2, 4, 16) for _ in "kv"),
     {"layout": "BNSD_BSND", "heads": 2, "sparse": 3, "lse": True}
     | {"mask": TRIANGLE.view(1, 1, 2048, 2048), "scale": 0.3}),
    (bf16(9, 8, 128), *(bf16(12, 2, 128) for _ in "kv"),
     {"layout": "TND", "heads": 8, "kv": 2, "scale": 0.09, "sparse": 3, "lse": True}
     | {"mask": TRIANGLE.to(torch.int8), "lengths": [4, 4, 9], "key_lengths": [5, 5, 12]}),
    (bf16(4, 9, 192), bf16(4, 9, 192), bf16(4, 9, 128),
     {"layout": "NTD_TND", "heads": 4, "scale": 0.1} | {"lengths": [2, 9], "key_lengths": [5, 9]}),
    paged(bf16(1, 7, 6 * 128), 2, 128, 128, [300], 3, layout="BSH", heads=6, scale=0.09,
          mask=TRIANGLE, sparse=4, before=100, after=0, lse=True),
    paged(bf16(3, 1, 8 * 128), 1, 128, 128, [300, 1, 128], 3, layout="BSH", heads=8, scale=0.09),
    (bf16(3, 4, 1, 16), *(bf16(3, 4, 6, 16) for _ in "kv"),
     {"layout": "BNSD", "heads": 4, "key_lengths": [6, 2, 4]}
     | {"mask": masks(3, 1, 1, 6) if A5 else masks(3, 6), "sparse": 0 if A5 else 3, "scale": 0.3}),
    (bf16(2, 2, 4, 16), *(bf16(2, 2, 5, 16) for _ in "kv"),
     {"layout": "BNSD", "heads": 2, "pse": bf16(1, 2, 6, 8), "scale": 0.3}),
    (bf16(2, 3, 128), *(bf16(2, 3, 128) for _ in "kv"),
     {"layout": "BSH_BNSD", "heads": 2, "scale": 0.1}),
    (bf16(8, 2, 128), *(bf16(8, 2, 128) for _ in "kv"),
     {"layout": "TND", "heads": 2, "lengths": [3, 8], "key_lengths": [3, 8], "scale": 0.07}
     | {"query_rope": bf16(8, 2, 64), "key_rope": bf16(8, 2, 64), "mask": TRIANGLE, "sparse": 3}
     | {"lse": True}),
    paged(bf16(5, 16, 512), 1, 512, 16, [40, 17, 33], 4, rope=True, layout="TND_NTD", heads=16,
          scale=0.04, lengths=[1, 4, 5], query_rope=bf16(5, 16, 64), mask=TRIANGLE, sparse=3),
    paged(bf16(2, 2, 3, 512), 1, 512, 16, [40, 17], 5, rope=True, layout="BNSD_NBSD", heads=2,
          scale=0.04, query_rope=bf16(2, 2, 3, 64), mask=TRIANGLE, sparse=3, lse=True),
    paged(bf16(1, 1, 128, 512), 1, 512, 128, [200], 3, rope=True, layout="BSND", heads=128,
          scale=0.04, query_rope=bf16(1, 1, 128, 64), precise=1),
    (bf16(2, 3, 32), *(bf16(2, 0, 32) for _ in "kv"), {"layout": "BSH", "heads": 2, "lse": True}),
    (bf16(0, 3, 32), *(bf16(0, 4, 32) for _ in "kv"), {"layout": "BSH", "heads": 2, "lse": True}),
]  # fmt: skip
if A5:  # unequal head sizes; the mask's sparseMode with one query
    cases += [
        (bf16(6, 2, 64), bf16(8, 1, 64), bf16(8, 1, 48),
         {"layout": "TND", "heads": 2, "kv": 1, "scale": 0.1, "sparse": 3}
         | {"mask": TRIANGLE, "lengths": [2, 6], "key_lengths": [4, 8]}),
        (bf16(2, 1, 2, 16), *(bf16(2, 5, 2, 16) for _ in "kv"),
         {"layout": "BSND", "heads": 2, "mask": TRIANGLE, "sparse": 2}),
        (bf16(1, 2, 3, 512), *(bf16(1, 1, 5, 512) for _ in "kv"),
         {"layout": "BNSD", "heads": 2, "kv": 1, "scale": 0.04}
         | {"query_rope": bf16(1, 2, 3, 64), "key_rope": bf16(1, 1, 5, 64)}),
    ]  # fmt: skip
else:  # tokens behind the last sequence; head size 256 in TND
    cases += [
        (bf16(7, 4, 256), *(bf16(8, 2, 256) for _ in "kv"),
         {"layout": "TND", "heads": 4, "kv": 2, "scale": 0.06}
         | {"lengths": [2, 6], "key_lengths": [4, 7], "lse": True}),
        (bf16(3, 1, 2, 20), *(bf16(3, 5, 2, 20) for _ in "kv"),
         {"layout": "BSND", "heads": 2, "lengths": [0, 1, 0]}),
    ]  # fmt: skip

ALL_FAULTS = {
    "no scale": dict(scaled=same),
    "first key head": dict(group=lambda head, heads, groups: 0),
    "interleaved heads": dict(group=lambda head, heads, groups: head % groups),
    "key lengths ignored": dict(key_lengths=lambda ends: None),
    "ends as lengths": dict(query_start=lambda ends, b: 0),
    "mask ignored": dict(seen=lambda options, b, s, q, k, steps: np.ones((q, k), bool)),
    "mask inverted": dict(mask=np.logical_not),
    "mask of the first sequence": dict(sequence=lambda b: 0),
    "band ignored": dict(
        window=causal, masked_band=lambda i, j, *_: np.ones((i.size, j.size), bool)
    ),
    "from the top left": dict(shift=lambda mode, queries, keys: 0),
    "one key more": dict(shift=lambda mode, queries, keys: STEPS.shift(mode, queries, keys) + 1),
    "window one longer": dict(
        window=lambda i, j, shift, before, after: band(i, j, shift, before + 1, after)
    ),
    "blind rows see all": dict(blind=lambda keys: 1 / keys),
    "first row of the table": dict(blocks=lambda table, b: table[0]),
    "blocks in order": dict(blocks=lambda table, b: np.arange(table.shape[1])),
    "no rotary part": dict(rotary=same),
    "value as given": dict(value=lambda key, value, width: value if A5 else key),
    "no pse": dict(pse=same),
    "pse scaled": dict(pse=lambda scores, shift, scale: scores + shift * scale),
    "lse negative": dict(lse=np.negative),
    "no sink": dict(total=same),
    "lse without the sink": dict(lse_of=lambda total, without: without),
}
FAULTS = {name: replaced for name, replaced in ALL_FAULTS.items() if "sink" not in name}
check("fused_infer_attention_score", call_v1, attention, STEPS, cases, FAULTS, 2e-2)
check("fused_infer_attention_score_v2", call_v2, attention, STEPS, cases, FAULTS, 2e-2)
sinks = [
    paged(bf16(7, 8, 64), 2, 64, 16, [30, 5, 64], 3, layout="TND", heads=8, scale=0.12,
          sink=bf16(8), lengths=[3, 4, 7], mask=TRIANGLE, sparse=4, before=20, after=0, lse=True),
    paged(bf16(4, 6, 64), 2, 64, 128, [130, 7], 4, layout="NTD_TND", heads=4, scale=0.12,
          sink=bf16(4), lengths=[2, 6]),
    (f32(2, 3, 2, 64).half(), *(f32(2, 4, 2, 64).half() for _ in "kv"),
     {"layout": "BSND", "heads": 2, "scale": 0.1}
     | {"sink": f32(2).half(), "key_lengths": [4, 2], "lse": True}),
]  # fmt: skip
SINK_FAULTS = {
    name: ALL_FAULTS[name]
    for name in (
        "no sink",
        "lse without the sink",
        "no scale",
        "first key head",
        "interleaved heads",
        "ends as lengths",
        "mask ignored",
        "from the top left",
        "window one longer",
        "first row of the table",
        "blocks in order",
    )
}
check("fused_infer_attention_score_v2, sinks", call_v2, attention, STEPS, sinks, SINK_FAULTS, 2e-2)
check(
    "fused_infer_attention_score_v2.out",
    by_workspace(2),
    attention,
    STEPS,
    [cases[0], sinks[0]],
    SINK_FAULTS,
    2e-2,
)
check("fused_infer_attention_score.out", by_workspace(1), attention, STEPS, cases, FAULTS, 2e-2)
