"""npu_moe_init_routing_v2 (see fused_check.py):
what is compared are the values that the document defines.
"""

import numpy as np
import torch
import torch_npu
from fused_check import A5, Steps, array, bf16, check, f32, refused, reseed, rng, same
from fused_formats import LARGEST, encode, pack

reseed(__name__)
DEFAULTS = dict(active=0, capacity=0, drop=0, kind=1, quant=-1, range=None, row=0)
MX = {2: "e5m2", 3: "e4m3", 9: "e2m1"}
BLOCKS = {11: "e5m2", 12: "e4m3"}


def stable(ids):
    return np.argsort(ids, kind="stable")


def first_rows(ids, capacity):
    """Of each expert the first rows: which are kept, and the rank of each among its expert's."""
    rank = np.arange(len(ids)) - np.searchsorted(ids, ids)
    return np.nonzero(rank < capacity)[0], rank


def last_rows(ids, capacity):
    rank = np.arange(len(ids)) - np.searchsorted(ids, ids)
    behind = np.searchsorted(ids, ids, "right") - 1 - np.arange(len(ids))
    return np.nonzero(behind < capacity)[0], np.maximum(
        rank - np.maximum(np.bincount(ids)[ids] - capacity, 0), 0
    )


STEPS = Steps(
    order=stable,
    exponent=same,
    whole=np.rint,
    offset=np.add,
    smoothed=lambda x, smooth, expert, first: x * smooth[expert - first],
    top=127,
    counts=lambda counts, first, last: counts[first:last],
    first_key=same,
    summed=lambda kind: kind == 0,
    scale_rows=lambda scale, token: scale[token],
    inside=lambda order, inside: order[inside],
    capacity=first_rows,
    active=lambda active: active,
    token=lambda pair, k, rows: pair // k,
    missing=-1,
    by_place=lambda row: row == 1,
)


def shared_exponents(x, kind, steps):
    """Blocks of 32 along the row: bytes of the values, bytes of the scales in pairs."""
    count = -(-x.shape[1] // 32)
    parts = np.pad(x, [(0, 0), (0, count * 32 - x.shape[1])]).reshape(len(x), count, 32)
    with np.errstate(divide="ignore"):
        exponent = (
            np.floor(np.log2(np.abs(parts).max(-1))) - {"e4m3": 8, "e5m2": 15, "e2m1": 2}[kind]
        )
    exponent = np.maximum(steps.exponent(exponent), -127)
    y = encode((parts * 2.0 ** -exponent[..., None]).reshape(len(x), -1)[:, : x.shape[1]], kind)
    scale = np.pad(exponent + 127, [(0, 0), (0, count % 2)])
    return (pack(y), scale.reshape(len(x), -1, 2)) if kind == "e2m1" else (y, scale)


def quantised(x, expert, case, steps):
    scale, offset, quant, first = case[2], case[3], case[4]["quant"], case[4]["first"]
    x = np.float32(x)
    if quant == 0:
        shifted = steps.offset(x * np.float32(array(scale)), np.float32(array(offset)))
        return np.clip(steps.whole(shifted), -128, 127), None
    if quant in MX:
        return shared_exponents(x.astype(float), MX[quant], steps)
    if quant in BLOCKS:
        kind, count = BLOCKS[quant], -(-x.shape[1] // 256) * 2
        parts = np.pad(x, [(0, 0), (0, count * 128 - x.shape[1])]).reshape(len(x), count, 128)
        s = np.abs(parts).max(-1) / np.float32(LARGEST[kind])
        y = parts / np.where(s == 0, np.float32(1), s)[..., None]
        return encode(y.reshape(len(x), -1)[:, : x.shape[1]], kind), s.reshape(len(x), -1, 2)
    if scale is not None:
        x = steps.smoothed(x, np.float32(array(scale)), expert, first)
    s = np.abs(x).max(-1) / np.float32(steps.top)
    return np.clip(steps.whole(x / np.where(s == 0, np.float32(1), s)[:, None]), -128, 127), s


def counted(case, ids, steps):
    o = case[4]
    counts = steps.counts(np.bincount(ids, minlength=o["count"]), o["first"], o["last"])
    if o["kind"] == 2:
        present = np.nonzero(counts)[0]
        pairs = np.stack([present + steps.first_key(o["first"]), counts[present]], 1)
        return np.concatenate([pairs, np.zeros((min(1, o["count"] - len(present)), 2))])
    return np.cumsum(counts) if steps.summed(o["kind"]) else counts


def copied(case, token, steps):
    x, scale = case[0], case[2]
    x = x.view(torch.uint8).numpy() if x.element_size() == 1 and x.dtype != torch.int8 else array(x)
    if scale is None:
        return x[token], None
    return x[token], steps.scale_rows(
        scale.numpy() if scale.dtype == torch.uint8 else array(scale), token
    )


def route(case, steps):
    experts, o = array(case[1]), case[4]
    ids, k = experts.reshape(-1), experts.shape[1]
    order = steps.order(ids)
    order = steps.inside(order, (ids[order] >= o["first"]) & (ids[order] < o["last"]))
    place = kept = np.arange(len(order))
    if o["drop"]:
        kept, rank = steps.capacity(ids[order], o["capacity"])
        place = (ids[order] * o["capacity"] + rank)[kept]
    elif steps.active(o["active"]) > 0:
        kept = place = place[: o["active"]]
    token = steps.token(order[kept], k, len(experts))
    if o["quant"] == -1:
        y, scale = copied(case, token, steps)
    else:
        y, scale = quantised(array(case[0])[token], ids[order][kept], case, steps)
    index = np.full(len(ids), steps.missing)
    if o["drop"]:
        index[order[kept]] = place
    else:
        index[order] = np.arange(len(order))
    if steps.by_place(o["row"]):
        index = order
    if o["drop"]:
        full = np.zeros((o["count"] * o["capacity"], *y.shape[1:]))
        full[place] = y
        y = full.reshape(o["count"], o["capacity"], -1)
        if scale is not None:
            wide = np.zeros(len(full))
            wide[place] = scale
            scale = wide
    return [
        np.asarray(v, float) for v in (y, index, counted(case, ids, steps), scale) if v is not None
    ]


def call(x, experts, scale, offset, o, raw=False):
    given = {"x_dtype": torch_npu.float4_e2m1fn_x2} if x.dtype == torch.uint8 else {}
    out = torch_npu.npu_moe_init_routing_v2(
        x,
        experts,
        scale=scale,
        offset=offset,
        active_num=o["active"],
        expert_capacity=o["capacity"],
        expert_num=o["count"],
        drop_pad_mode=o["drop"],
        expert_tokens_num_type=o["kind"],
        expert_tokens_num_flag=True,
        quant_mode=o["quant"],
        active_expert_range=o["range"] or [],
        row_idx_type=o["row"],
        **given,
    )
    if raw:
        return out
    ids = experts.cpu().flatten()
    available = int(((ids >= o["first"]) & (ids < o["last"])).sum())
    rows = min(available, o["active"]) if o["active"] > 0 else available
    y, index, counts, s = out
    if y.element_size() == 1 and y.dtype != torch.int8:
        y = y.view(torch.uint8)
    s = s.view(torch.uint8) if s.element_size() == 1 else s
    if not o["drop"]:
        y, s = y[:rows], s[:rows]
    if o["row"] == 1:
        index = index[:available]
    if o["kind"] == 2:
        present = len({int(i) for i in ids if o["first"] <= i < o["last"]})
        counts = counts[: present + 1]
    defined = o["quant"] > 0 or (o["quant"] == -1 and scale is not None)
    return [y, index, counts, *([s] if defined else [])]


def case(x, experts, scale=None, offset=None, count=8, **options):
    # Left out only with 8 experts: torch_npu keeps the expert_num of the first call that
    # leaves it out.
    o = {**DEFAULTS, "count": count, "range": None if count == 8 else [0, count], **options}
    o["first"], o["last"] = o["range"] or (0, count)
    if A5:
        o["active"] = experts.numel()
    return (x, experts, scale, offset, o)


def choose(rows, k, experts=8):
    """k different experts for each row."""
    return torch.tensor(
        np.stack([rng.permutation(experts)[:k] for _ in range(rows)]), dtype=torch.int32
    )


def codes(*shape):
    return torch.tensor(rng.integers(0, 254, shape), dtype=torch.uint8)


zero = bf16(5, 8)
zero[2] = 0
cases = [
    case(f32(9, 5), choose(9, 3)),
    case(bf16(9, 5), choose(9, 3), f32(9), row=1),
    case(f32(7, 4).half(), choose(7, 2), f32(7), kind=0, range=[2, 6]),
    case(
        torch.tensor(rng.integers(-99, 99, (7, 4)), dtype=torch.int8),
        choose(7, 2),
        range=[3, 8],
        row=1,
        kind=2,
    ),
    case(zero, choose(5, 4), quant=1, kind=2),
    case(bf16(6, 8), choose(6, 3), f32(8, 8), quant=1),
    case(f32(6, 9), choose(6, 3), f32(3, 9), quant=1, range=[4, 7], row=1),
    case(bf16(16, 7168), choose(16, 6, 256), f32(32, 7168), quant=1, count=256, range=[64, 96]),
    case(bf16(40, 16), choose(40, 8, 256), count=256, range=[0, 128], row=1),
    case(f32(6, 8), choose(6, 3), f32(1) * 30, f32(1) * 9, quant=0),
    case(f32(8, 3), choose(8, 3, 4), f32(8), count=4, drop=1, capacity=2),
    case(bf16(8, 3), choose(8, 1, 6), count=6, drop=1, capacity=8),
]
faults = {
    "unstable": dict(order=lambda ids: len(ids) - 1 - stable(ids[::-1])),
    "falling experts": dict(order=lambda ids: stable(-ids)),
    "divided by 128": dict(top=128),
    "no smooth scale": dict(smoothed=same),
    "smooth scale of the first": dict(smoothed=lambda x, smooth, expert, first: x * smooth[0]),
    "truncated": dict(whole=np.trunc),
    "no offset": dict(offset=same),
    "counts of the first experts": dict(counts=lambda counts, first, last: counts[: last - first]),
    "keys from zero": dict(first_key=lambda first: 0),
    "counts and sums exchanged": dict(summed=lambda kind: kind != 0),
    "scales not moved": dict(
        scale_rows=lambda scale, token: scale[np.arange(len(token)) % len(scale)]
    ),
    "range ignored": dict(inside=same),
    "last rows kept": dict(capacity=last_rows),
    "token by remainder": dict(token=lambda pair, k, rows: pair % rows),
    "zero instead of -1": dict(missing=0),
    "gather and scatter exchanged": dict(by_place=lambda row: row != 1),
}
if A5:
    cases += [
        case(bf16(6, width), choose(6, 3), quant=quant)
        for quant in (2, 3, 9, 11, 12)
        for width in (70, 256, 384)
    ]
    cases += [
        case(f32(6, 70).to(torch.float8_e4m3fn), choose(6, 3), codes(6, 2, 2)),
        case(f32(6, 64).to(torch.float8_e5m2), choose(6, 3), codes(6, 1, 2), row=1),
        case(codes(6, 32), choose(6, 3), codes(6, 1, 2), range=[1, 5]),
        case(bf16(3, 7168), choose(3, 6, 256), quant=3, count=256),
    ]
    faults |= {"exponent rounded up": dict(exponent=lambda exponent: exponent + 1)}
else:
    cases += [
        case(f32(9, 5), choose(9, 3), f32(9), active=11),
        case(f32(9, 5), choose(9, 3), f32(9), active=-1),
        case(bf16(6, 8), choose(6, 2), f32(8, 8), quant=1, drop=1, capacity=2),
    ]
    faults |= {"active_num ignored": dict(active=lambda active: 0)}
check("moe_init_routing_v2", call, route, STEPS, cases, faults, 1e-6)
empty = call(*case(bf16(0, 8).npu(), choose(1, 2)[:0].npu()), raw=True)
assert [tuple(v.shape) for v in empty] == [(0, 8), (0,), (8,), (0,)] and not empty[2].any()


def refuse(argument, x, experts, scale=None, offset=None, **options):
    given = case(x, experts, scale, offset, **options)
    if "active" in options:
        given[4]["active"] = options["active"]
    given = [v.npu() if isinstance(v, torch.Tensor) else v for v in given]
    refused("moe_init_routing_v2", lambda: call(*given, raw=True), argument)


x, ids = f32(6, 8), choose(6, 2)
refuse("'x'", x.int(), ids)
refuse("'x'", x.to(torch.int8), ids, quant=1)
refuse("expert_idx", x, ids.long())
refuse("expert_idx", x, choose(5, 2))
refuse("'scale'", x, ids, f32(5))
refuse("'scale'", x, ids, bf16(6))
refuse("'scale'", x, ids, f32(8), quant=1)
refuse("'scale'", x, ids, f32(7, 8), quant=1)
refuse("'scale'", x, ids, None, f32(1), quant=0)
refuse("'offset'", x, ids, f32(1), quant=0)
refuse("'offset'", x, ids, f32(1), f32(2), quant=0)
refuse("'offset'", x, ids, None, f32(1), quant=1)
refuse("quant_mode", x, ids, quant=4)
refuse("row_idx_type", x, ids, row=2)
refuse("expert_tokens_count_or_cumsum", x, ids, count=9, range=None)
refuse("expert_num", x, ids, count=5121, kind=2)
refuse("expert_num", x, ids, count=10241)
refuse("active_expert_range", x, ids, range=[2, 9])
refuse("active_expert_range", x, ids, range=[5, 5])
refuse("active_expert_range", x, ids, range=[0, 4], drop=1, capacity=2)
refuse("expert_tokens_num_type", x, ids, drop=1, capacity=2, kind=2)
refuse("expert_capacity", x, ids, drop=1, capacity=7)
refuse("expert_capacity", x, ids, drop=1, capacity=0)
refuse("row_idx_type", x, ids, drop=1, capacity=2, row=1)
if A5:
    refuse("active_num", x, ids, active=11)
    refuse("active_num", x, ids, active=0)
    refuse("quant_mode", x, ids, drop=1, capacity=2, quant=1)
    refuse("'scale'", x, ids, f32(1), quant=3)
    refuse("'scale'", f32(6, 64).to(torch.float8_e4m3fn), ids, codes(6, 2, 2))
else:
    refuse("'x'", x.to(torch.float8_e4m3fn), ids)
    refuse("quant_mode", x, ids, quant=3)
    refuse("active_num", x, ids, active=-2)
