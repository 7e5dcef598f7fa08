"""Attention over chosen keys that are stored quantised (see fused_check.py)."""

import numpy as np
import torch
import torch_npu
from fused_check import A5, Steps, array, bf16, check, f32, problems, refused, rng, same
from sparse_attention import FAULTS, ROPE, STEPS, WIDTH, attended, entries, only_written
from sparse_layouts import int32, on_npu, paged, with_gaps

TILE = 128
DEFAULTS = {
    "attention_mode": 2,
    "quant_scale_repo_mode": 1,
    "tile_size": TILE,
    "rope_head_dim": ROPE,
}


QUANTISED = Steps(
    **vars(STEPS),
    scale=same,
    dequantised=np.multiply,
    rope=same,
    joined=lambda values, rope: np.concatenate([values, rope], -1),
)


def unpacked(packed, query, steps):
    """Rows of 512 quantised values, 64 of the query's dtype and 4 fp32 scales, as 576 numbers."""
    rows = packed.reshape(-1, packed.shape[-1]).view(torch.uint8).contiguous()
    values = array(rows[:, :WIDTH].contiguous().view(packed.dtype).double()).reshape(
        len(rows), -1, TILE
    )
    rope = array(rows[:, WIDTH : WIDTH + 2 * ROPE].contiguous().view(query.dtype))
    scale = steps.scale(
        array(rows[:, WIDTH + 2 * ROPE :].contiguous().view(torch.float32))[..., None]
    )
    return steps.joined(
        steps.dequantised(values, scale).reshape(len(rows), -1), steps.rope(rope, scale)
    )


def quantised(case, steps):
    query, key, _, indices, *layouts, block, mode, scale = case
    flat = array(indices).reshape(-1, indices.shape[-1])
    out = attended(
        query, unpacked(key, query, steps), (key, *layouts), flat, block, mode, scale, steps
    )[0]
    return [out.reshape(*query.shape[:-1], WIDTH)]


def call(
    query,
    key,
    value,
    indices,
    ql,
    kl,
    table,
    layout_query,
    layout_kv,
    block,
    mode,
    scale,
    quant=2,
    **changes,
):
    return [
        torch_npu.npu_kv_quant_sparse_flash_attention(
            query, key, value, indices, scale,
            **{"key_quant_mode": quant, "value_quant_mode": 2, **DEFAULTS, **changes},
            block_table=table, actual_seq_lengths_query=ql, actual_seq_lengths_kv=kl,
            sparse_block_size=block, layout_query=layout_query, layout_kv=layout_kv,
            sparse_mode=mode,
        )
    ]  # fmt: skip


def packed(shape, kind, dtype):
    values = torch.tensor(rng.integers(-8, 9, (*shape, WIDTH)), dtype=torch.float32).to(kind)
    parts = [
        values,
        f32(*shape, ROPE).to(dtype),
        torch.tensor(rng.uniform(0.02, 0.3, (*shape, WIDTH // TILE))).float(),
    ]
    return torch.cat([x.view(torch.uint8) for x in parts], -1).view(kind)


def case_of(layout, heads, queries, keys, ql, kl, size, mode, *, block=1, page=0, kind=torch.int8,
            dtype=torch.bfloat16):  # fmt: skip
    table, keys = paged(kl, keys, page)
    ql, kl = (None if x is None else int32(x) for x in (ql, kl))
    query, key = f32(*queries, heads, WIDTH + ROPE).to(dtype), packed((*keys, 1), kind, dtype)
    layouts = (ql, kl, table, layout, "PA_BSND" if page else layout)
    indices = entries(queries, layouts, query, key, size, block, mode)
    return (query, key, key.clone(), indices, *layouts, block, mode, 0.0625)


CASES = [
    case_of("BSND", 4, (2, 5), (2, 19), None, None, 7, 3),
    case_of("BSND", 2, (3, 4), (3, 9), [4, 0, 2], [9, 3, 1], 12, 3, dtype=torch.float16),
    case_of("TND", 8, (9,), (40,), [4, 4, 7], [20, 23, 40], 30, 0),
    case_of(
        "TND", 64, (4,), None, [2, 4], [700, 515], 512, 3, page=128
    ),  # heads and choice of DeepSeek V4
]
if A5:
    CASES += [
        case_of(
            "BSND", 48, (2, 1), None, None, [100, 17], 64, 0, page=16, kind=torch.float8_e4m3fn
        ),
        case_of(
            "TND",
            16,
            (6,),
            (12,),
            [5, 6],
            [3, 12],
            3,
            3,
            kind=torch.float8_e4m3fn,
            dtype=torch.float16,
        ),
    ]
else:
    CASES += [case_of("BSND", 16, (2, 2), None, None, [100, 17], 20, 3, page=16, block=8)]
check(
    "kv_quant_sparse_flash_attention",
    lambda *a: only_written(a[0], a[4], call(*a)),
    lambda case, steps: only_written(case[0], case[4], quantised(case, steps)),
    QUANTISED,
    CASES,
    {name: replaced for name, replaced in FAULTS.items() if name != "no rope part"}
    | {
        "no dequantisation": dict(dequantised=same),
        "scales rotated": dict(scale=lambda scale: np.roll(scale, 1, 1)),
        "first scale for all": dict(scale=lambda scale: scale[:, :1]),
        "scales of another key": dict(scale=lambda scale: np.roll(scale, 1, 0)),
        "rope part dequantised": dict(rope=lambda rope, scale: rope * scale[:, 0]),
        "rope part first": dict(joined=lambda values, rope: np.concatenate([rope, values], -1)),
    },
    2e-2,
)  # fmt: skip


def bad(argument, case, options=(), **changes):
    """The call with some arguments replaced, by their place in `call`, must be refused."""
    names = [
        "query",
        "key",
        "value",
        "indices",
        "ql",
        "kl",
        "table",
        "layout_query",
        "layout_kv",
        "block",
        "mode",
        "scale",
    ]
    case = [changes.get(name, value) for name, value in zip(names, case, strict=True)]
    refused(
        "kv_quant_sparse_flash_attention",
        lambda: call(*map(on_npu, case), **dict(options)),
        argument,
    )


b, t, p = CASES[0], CASES[2], CASES[3]
bad("query", b, query=b[0].float())
bad("query", b, query=b[0][..., :WIDTH].contiguous())
bad("query", b, query=bf16(2, 5, 12, WIDTH + ROPE))
bad("key", b, key=b[1].view(torch.uint8), value=b[1].view(torch.uint8))
bad("key", b, key=b[1][..., :640].contiguous(), value=b[1][..., :640].contiguous())
bad("key", b, key=with_gaps(b[1]))
bad("value", b, value=b[1][:1].contiguous())
bad("value differs from key", b, value=b[1] + 1)
bad("sparse_indices", b, indices=b[3].long())
bad("actual_seq_lengths_query", t, ql=None)
bad("actual_seq_lengths_kv", p, kl=None)
bad("block_table", p, table=None)
bad("actual_seq_lengths_kv", p, kl=p[5][None])
bad("layout_kv", b, layout_kv="TND")
bad("sparse_block_size", b, block=0)
bad("sparse_mode", b, mode=4)
bad("key_quant_mode", b, {"quant": 0})
for name in (
    "value_quant_mode",
    "attention_mode",
    "quant_scale_repo_mode",
    "tile_size",
    "pre_tokens",
    "next_tokens",
):
    bad(name, b, {name: 0})
bad("rope_head_dim", b, {"rope_head_dim": 32})
bad("key_dequant_scale", b, {"key_dequant_scale": f32(4).npu()})
bad("value_dequant_scale", b, {"value_dequant_scale": f32(4).npu()})
if A5:
    bad("sparse_block_size", b, block=2)
    apart = [with_gaps(x) if i in (1, 2) else on_npu(x) for i, x in enumerate(p)]
    if not np.allclose(array(call(*apart)[0]), quantised(p, QUANTISED)[0], atol=5e-2):
        problems.append("kv_quant_sparse_flash_attention: pages with gaps")
else:
    eight = b[1].view(torch.float8_e4m3fn)
    bad("key", b, key=eight, value=eight)
    bad("query", b, query=bf16(2, 5, 48, WIDTH + ROPE))
    bad("sparse_block_size", b, block=32)
    bad("key", p, key=with_gaps(p[1]))
