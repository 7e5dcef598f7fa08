"""Scattering into the paged key/value cache (see fused_check.py)."""

import numpy as np
import torch
import torch_npu
from fused_check import A5, Steps, array, bf16, check, f32, refused, rng, same


def whole(dtype, *shape):
    return torch.tensor(rng.integers(0, 100, shape), dtype=dtype)


def slots(tokens, limit, dtype=torch.int32):
    return torch.tensor(rng.permutation(limit)[:tokens], dtype=dtype)


def strided(*shape):  # [tokens, heads, width] with its axes exchanged in memory
    return bf16(shape[1], shape[0], shape[2]).transpose(0, 1)


def strided_cache(blocks, size, width):  # [blocks, size, 1, width], places before blocks in memory
    return bf16(size, blocks, 1, width).transpose(0, 1)


SCATTER = Steps(
    stores_value=True,
    slot=lambda slot, slots: slot if slot >= 0 else None,  # None: not stored
    place=lambda slot, size, blocks: divmod(slot, size),
    row=lambda x, t: x[t],
    tokens=same,
    tiles=lambda row, last: row.reshape(-1, last),
    stored=lambda out, cache: out,
)


def scatter(case, steps):
    key, value, key_cache, value_cache, mapping, mode = (
        array(c) if isinstance(c, torch.Tensor) else c for c in case
    )
    return [
        stored(key, key_cache, mapping, mode, steps),
        stored(value, value_cache, mapping, mode, steps)
        if steps.stores_value
        else value_cache.copy(),
    ]


def stored(x, cache, mapping, mode, steps):
    out, tiled = cache.copy(), mode == "PA_NZ"
    if not x.ndim:  # the key alone
        return out
    size = cache.shape[-2] if tiled else cache.shape[1]
    for t, slot in enumerate(steps.tokens(mapping)):
        slot = steps.slot(int(slot), len(cache) * size)
        if slot is None:
            continue
        block, place = steps.place(slot, size, len(cache))
        row = steps.row(x, t)
        if not tiled:
            out[block, place] = row
            continue
        flat = out[block].reshape(-1, size, cache.shape[-1])
        flat[:, place] = steps.tiles(row, cache.shape[-1])
        out[block] = flat.reshape(out[block].shape)
    return steps.stored(out, cache)


def call_scatter(key, value, key_cache, value_cache, mapping, mode):
    torch_npu.npu_scatter_pa_kv_cache(key, value, key_cache, value_cache, mapping, cache_mode=mode)
    return key_cache, value_cache


def functional(key, value, key_cache, value_cache, mapping, mode):
    before = key_cache.clone()
    result = torch_npu.npu_scatter_pa_kv_cache_functional(
        key, value, key_cache, value_cache, mapping, cache_mode=mode
    )
    assert torch.equal(before.cpu(), key_cache.cpu())
    return result


def latent(tokens, blocks):  # DeepSeek V4: one head of 512 and the rotary 64
    return [
        bf16(tokens, 1, 512),
        bf16(tokens, 1, 64),
        bf16(blocks, 128, 1, 512),
        bf16(blocks, 128, 1, 64),
    ]


SCATTER_FAULTS = {
    "value not stored": dict(stores_value=False),
    "negative slots stored": dict(slot=lambda slot, slots: slot if slot >= 0 else slot + slots),
    "the place behind": dict(place=lambda slot, size, blocks: (slot // size, (slot + 1) % size)),
    "the block before": dict(place=lambda slot, size, blocks: (slot // size - 1, slot % size)),
    "interleaved blocks": dict(place=lambda slot, size, blocks: divmod(slot, blocks)[::-1]),
    "first token for all": dict(row=lambda x, t: x[0]),
    "tokens reversed": dict(row=lambda x, t: x[-1 - t]),
    "heads reversed": dict(row=lambda x, t: x[t][::-1]),
    "last token lost": dict(tokens=lambda mapping: mapping[:-1]),
    "tiles transposed": dict(tiles=lambda row, last: row.reshape(last, -1).T),
    "cache cleared": dict(stored=lambda out, cache: np.where(out == cache, 0, out)),
}
holes = torch.tensor([5, -1, 0, 11, -7], dtype=torch.int64)
cases = [
    (bf16(5, 3, 6), bf16(5, 3, 4), bf16(4, 3, 3, 6), bf16(4, 3, 3, 4), holes, "Norm"),
    (strided(7, 2, 8), strided(7, 2, 8), bf16(3, 5, 2, 8), bf16(3, 5, 2, 8), slots(7, 15), None),
    (
        *(whole(torch.int8, *s) for s in ((1, 1, 3), (1, 1, 3), (1, 1, 1, 3), (1, 1, 1, 3))),
        slots(1, 1),
        "Norm",
    ),
    (*latent(150, 3), slots(150, 384), "Norm"),
    (
        f32(6, 4, 32).half(),
        f32(6, 4, 16).half(),
        *(f32(2, n, 4, 16).half() for n in (8, 4)),
        slots(6, 8),
        "PA_NZ",
    ),
    (
        *(
            whole(torch.int8, *s)
            for s in ((3, 2, 64), (3, 2, 32), (3, 2, 2, 5, 32), (3, 2, 1, 5, 32))
        ),
        slots(3, 15),
        "PA_NZ",
    ),
]
if A5:
    for kind in (torch.float32, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32):
        cases.append(
            (
                *(whole(kind, *s) for s in ((4, 2, 3), (4, 2, 5), (2, 4, 2, 3), (2, 4, 2, 5))),
                slots(4, 8),
                "Norm",
            )
        )
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
        cases.append(
            (
                *(f32(*s).to(kind) for s in ((4, 2, 3), (4, 2, 5), (2, 4, 2, 3), (2, 4, 2, 5))),
                slots(4, 8),
                "Norm",
            )
        )
else:  # the key alone
    cases.append((bf16(4, 2, 6), bf16(), bf16(3, 4, 2, 6), bf16(), slots(4, 12), "Norm"))
check("scatter_pa_kv_cache", call_scatter, scatter, SCATTER, cases, SCATTER_FAULTS, 1e-9)
if A5:  # two 4-bit values to a byte

    def call_packed(key, value, key_cache, value_cache, mapping, mode):
        packed = [x.view(torch.float4_e2m1fn_x2) for x in (key, value, key_cache, value_cache)]
        call_scatter(*packed, mapping, mode)
        return key_cache, value_cache

    tiles = [whole(torch.uint8, *s) for s in ((5, 2, 32), (5, 2, 64), (2, 2, 4, 32), (2, 4, 4, 32))]
    check(
        "scatter_pa_kv_cache, 4 bits",
        call_packed,
        scatter,
        SCATTER,
        [
            (*tiles, torch.tensor([5, -1, 0, 7, -7]), "PA_NZ"),
            (
                *(
                    whole(torch.uint8, *s)
                    for s in ((3, 1, 7), (3, 1, 5), (2, 4, 1, 7), (2, 4, 1, 5))
                ),
                slots(3, 8),
                "Norm",
            ),
        ],
        SCATTER_FAULTS,
        1e-9,
    )
    # torch_npu sends the offset of a view of 4-bit values in bytes, CANN counts values: an odd one
    # is inside a byte.
    odd = [
        x.npu() for x in (whole(torch.uint8, 4, 1, 7), whole(torch.uint8, 2, 4, 1, 7), slots(3, 8))
    ]
    refused(
        "scatter_pa_kv_cache, 4 bits",
        lambda: call_packed(odd[0][1:], odd[0][1:], odd[1], odd[1], odd[2], "Norm"),
        "begins inside a byte",
    )
check(
    "scatter_pa_kv_cache_functional",
    functional,
    scatter,
    SCATTER,
    cases[:1] + cases[4:5],
    SCATTER_FAULTS,
    1e-9,
)


def scatter_refused(argument, mode="Norm", **changed):
    case = {"key": bf16(4, 2, 16), "value": bf16(4, 2, 16), "key_cache": bf16(2, 4, 2, 16)}
    case |= {"value_cache": bf16(2, 4, 2, 16), "slot_mapping": slots(4, 8)} | changed
    case = {name: x.npu() for name, x in case.items()}
    refused(
        "scatter_pa_kv_cache",
        lambda: torch_npu.npu_scatter_pa_kv_cache(**case, cache_mode=mode),
        f"'{argument}'",
    )


scatter_refused("key", key=f32(4, 2, 16).double())
scatter_refused("key", key=bf16(4, 32))
scatter_refused("key", key=bf16(0, 2, 16))
scatter_refused("slot_mapping", slot_mapping=slots(0, 8))
scatter_refused("value_cache", value_cache=bf16(0, 4, 2, 16))
scatter_refused("key_cache", key_cache=f32(2, 4, 2, 16).half())
scatter_refused("key_cache", key_cache=bf16(2, 4, 1, 16))
scatter_refused("key_cache", key_cache=bf16(8, 2, 16))
scatter_refused("value", value=bf16(3, 2, 16))
scatter_refused("value", value=f32(4, 2, 16).half(), value_cache=f32(2, 4, 2, 16).half())
scatter_refused("value_cache", value_cache=bf16(2, 4, 2, 15))
scatter_refused("value_cache", value_cache=f32(2, 4, 2, 16).half())
scatter_refused("slot_mapping", slot_mapping=f32(4))
scatter_refused("slot_mapping", slot_mapping=slots(3, 8))
# A kernel fault.
scatter_refused("slot_mapping", slot_mapping=torch.tensor([0, 1, 2, 8], dtype=torch.int32))
scatter_refused("cache_mode", mode="NZ")
scatter_refused("key_cache", mode="PA_NZ")  # not in tiles
scatter_refused("value_cache", mode="PA_NZ", key_cache=bf16(2, 2, 4, 16), value_cache=bf16())
scatter_refused("key", mode="PA_NZ", key=bf16(4, 2, 8), key_cache=bf16(2, 1, 4, 16))
scatter_refused("key_cache", mode="PA_NZ", key_cache=bf16(1, 2, 65535, 16))
scatter_refused("compress_lens", compress_lens=slots(4, 8))
scatter_refused("compress_lens", compress_lens=slots(4, 8, torch.int64))
scatter_refused("seq_lens", seq_lens=slots(4, 8))
if A5:
    scatter_refused("value", value=bf16(), value_cache=bf16())  # the key alone: not here
else:
    scatter_refused("key", key=f32(4, 2, 16))  # float32: Ascend 950 only
    scatter_refused("key", key=bf16(2, 2, 2, 16))  # four dimensions: Ascend 950 only
