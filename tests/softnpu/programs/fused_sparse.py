"""Attention over chosen keys (see fused_check.py).
The formula masks a dense product; nothing is gathered.
"""

import numpy as np
import torch
import torch_npu
from fused_check import A5, array, bf16, check, f32, problems, refused
from sparse_attention import (
    BLOCK_FAULTS,
    FAULTS,
    ROPE,
    SINK_FAULTS,
    STEPS,
    WIDTH,
    attended,
    entries,
    only_written,
)
from sparse_layouts import int32, on_npu, paged, turned, with_gaps


def sparse(case, steps):
    query, key, _, query_rope, key_rope, indices, *layouts, block, mode, scale, lse, sinks = case
    k = np.concatenate([array(key).reshape(-1, WIDTH), array(key_rope).reshape(-1, ROPE)], -1)
    q = torch.cat([query, query_rope], -1)
    flat = array(indices).reshape(-1, indices.shape[-1])
    sinks = None if sinks is None else array(sinks)
    out, *statistics = attended(q, k, (key, *layouts), flat, block, mode, scale, steps, sinks)
    result = [out.reshape(query.shape)]
    if lse:
        shape = query.shape[:-1]
        shape = (1, *shape) if len(shape) == 2 else (shape[0], 1, *shape[1:])
        result += [x.reshape(shape) for x in statistics]
    return result


def call(
    query,
    key,
    value,
    query_rope,
    key_rope,
    indices,
    ql,
    kl,
    table,
    layout_query,
    layout_kv,
    block,
    mode,
    scale,
    lse,
    sinks,
):
    out = torch_npu.npu_sparse_flash_attention(
        query, key, value, indices, scale, block_table=table, actual_seq_lengths_query=ql,
        actual_seq_lengths_kv=kl, query_rope=query_rope, key_rope=key_rope, sparse_block_size=block,
        layout_query=layout_query, layout_kv=layout_kv, sparse_mode=mode, attention_mode=2,
        return_softmax_lse=lse, sinks=sinks,
    )  # fmt: skip
    return out if lse else out[:1]


def case_of(
    layout,
    heads,
    queries,
    keys,
    ql,
    kl,
    size,
    mode,
    *,
    block=1,
    page=0,
    lse=False,
    sinks=False,
    empty=False,
    dtype=torch.bfloat16,
):
    table, keys = paged(kl, keys, page)
    ql, kl = (None if x is None else int32(x) for x in (ql, kl))
    query, key = f32(*queries, heads, WIDTH).to(dtype), f32(*keys, 1, WIDTH).to(dtype)
    layouts = (ql, kl, table, layout, "PA_BSND" if page else layout)
    indices = entries(queries, layouts, query, key, size, block, mode, empty)
    return (
        query,
        key,
        key.clone(),
        f32(*queries, heads, ROPE).to(dtype),
        f32(*keys, 1, ROPE).to(dtype),
        indices,
        *layouts,
        block,
        mode,
        0.0625,
        lse,
        f32(heads) + 2 if sinks else None,
    )


CASES = [
    case_of("BSND", 4, (2, 5), (2, 19), None, None, 7, 3, lse=True),
    case_of("BSND", 1, (3, 4), (3, 9), [4, 0, 2], [9, 3, 1], 12, 3, lse=True, dtype=torch.float16),
    case_of("TND", 8, (9,), (40,), [4, 4, 7], [20, 23, 40], 30, 0, lse=True, empty=True),
    case_of("TND", 2, (6,), (12,), [5, 6], [3, 12], 3, 3),
    case_of("BSND", 16, (2, 1), None, None, [100, 17], 64, 0, page=16),
    case_of(
        "TND", 64, (4,), None, [2, 4], [1030, 515], 512, 3, page=128
    ),  # heads and choice of DeepSeek V4
]
if A5:
    CASES += [
        case_of("BSND", 128, (1, 2), (1, 30), None, None, 8, 3, lse=True, sinks=True),
        case_of("TND", 12, (3,), (20,), [1, 3], [5, 20], 6, 0, lse=True, sinks=True, empty=True),
        case_of("TND", 64, (2,), None, [1, 2], [70, 200], 40, 0, page=64, sinks=True),
    ]
    FAULTS = FAULTS | SINK_FAULTS
else:
    CASES += [
        case_of("BSND", 32, (2, 3), (2, 50), None, [50, 21], 9, 3, block=4),
        case_of("TND", 128, (2,), None, [2], [300], 3, 3, block=64, page=128),
    ]
    FAULTS = FAULTS | BLOCK_FAULTS


check(
    "sparse_flash_attention",
    lambda *a: only_written(a[0], a[6], call(*a)),
    lambda case, steps: only_written(case[0], case[6], sparse(case, steps)),
    STEPS,
    CASES,
    FAULTS,
    1e-2,
)
NAMES = (
    "query key value query_rope key_rope indices ql kl table layout_query layout_kv block mode "
    "scale lse sinks"
)


def bad(argument, case, **changes):
    """The call with some arguments replaced, by their place in `call`, must be refused."""
    case = [changes.get(name, value) for name, value in zip(NAMES.split(), case, strict=True)]
    refused("sparse_flash_attention", lambda: call(*map(on_npu, case)), argument)


b, t, p = CASES[0], CASES[2], CASES[5]
many = case_of("BSND", 129, (1, 1), (1, 3), None, None, 1, 0)
bad("query", many)
bad("query", b, query=b[0].float())
bad("query", b, query=b[0][..., :448].contiguous())
bad("query", b, query=turned(b[0]))
bad("key", b, key=b[1].float())
bad("key", b, key=b[1].half(), value=b[1].half())
bad("key", b, key=bf16(2, 19, 2, WIDTH), value=bf16(2, 19, 2, WIDTH))
bad("key", b, key=with_gaps(b[1]))
bad(
    "key",
    p,
    key=bf16(40, 24, 1, WIDTH),
    value=bf16(40, 24, 1, WIDTH),
    key_rope=bf16(40, 24, 1, ROPE),
)
bad("value", b, value=None)
bad("value", b, value=b[1][..., :448].contiguous())
bad("value", b, value=b[1].half())
bad("value", b, value=with_gaps(b[1]))
bad("value differs from key", b, value=b[1] + 1)
bad("query_rope", b, query_rope=None)
bad("query_rope", b, query_rope=b[3][..., :32].contiguous())
bad("query_rope", b, query_rope=b[3].half())
bad("query_rope", b, query_rope=turned(b[3]))
bad("key_rope", b, key_rope=None)
bad("key_rope", b, key_rope=b[4][:1].contiguous())
bad("key_rope", b, key_rope=b[4].half())
bad("key_rope", b, key_rope=with_gaps(b[4]))
bad("sparse_indices", b, indices=b[5].long())
bad("sparse_indices", b, indices=b[5][:1].contiguous())
bad("sparse_indices", b, indices=b[5].squeeze(2))
bad("sparse_indices", b, indices=turned(b[5]))
bad("sparse_indices", b, indices=b[5].unsqueeze(0))
bad("sparse_indices names a block", b, indices=b[5] * 0 + 19)
bad(
    "sparse_indices has a valid index",
    b,
    indices=int32([-1, 0, 1, 2, 3, 4, 5]).expand(2, 5, 1, 7).contiguous(),
)
bad("actual_seq_lengths_query", t, ql=None)
bad("actual_seq_lengths_query", b, ql=torch.tensor([5, 5]))
bad("actual_seq_lengths_kv", t, kl=None)
bad("actual_seq_lengths_kv", p, kl=None)
bad("actual_seq_lengths_kv", b, kl=int32([19]))
bad("actual_seq_lengths_kv is negative or beyond", b, kl=int32([19, -1]))
bad("block_table", p, table=None)
bad("block_table", p, table=p[8][0])
bad("block_table", p, table=p[8][:1])
bad("block_table", b, table=int32([[0], [1]]))
bad("block_table names a block", p, table=p[8] + 100)
bad("layout_kv", b, layout_kv="BNSD")
bad("sparse_block_size", b, block=0)
bad("sparse_mode", b, mode=4)
bad("return_softmax_lse", p, lse=True)
for name in ("pre_tokens", "next_tokens", "attention_mode"):
    other = {"attention_mode": 2, name: 0}
    refused(
        "sparse_flash_attention",
        lambda other=other: torch_npu.npu_sparse_flash_attention(
            *map(on_npu, (*b[:3], b[5])), 1.0, query_rope=b[3].npu(), key_rope=b[4].npu(), **other
        ),
        name,
    )
if A5:
    bad("sparse_block_size", b, block=2)
    bad("sinks", b, sinks=f32(5))
    bad("sinks", b, sinks=bf16(4))
    bad("sinks", b, sinks=f32(4, 1))
    apart = [with_gaps(x) if i in (1, 2, 4) else on_npu(x) for i, x in enumerate(p)]
    if not np.allclose(array(call(*apart)[0]), sparse(p, STEPS)[0], atol=2e-2):
        problems.append("sparse_flash_attention: pages with gaps")
else:
    bad("query", case_of("BSND", 12, (1, 1), (1, 3), None, None, 1, 0))
    bad("sparse_block_size", b, block=3)
    bad("sparse_block_size", b, block=256)
    bad("sparse_block_size", p, block=128, key=bf16(80, 64, 1, WIDTH), value=bf16(80, 64, 1, WIDTH))
    bad("sinks", b, sinks=f32(4))
    bad("key", p, key=with_gaps(p[1]))
