"""Operators of the paged key/value cache (see fused_check.py)."""

import numpy as np
import torch
import torch_npu
from fused_check import A5, array, bf16, check, f32, refused, rng


def whole(dtype, *shape):
    return torch.tensor(rng.integers(0, 100, shape), dtype=dtype)


def slots(tokens, limit, dtype=torch.int32):
    return torch.tensor(rng.permutation(limit)[:tokens], dtype=dtype)


def strided(*shape):  # [tokens, heads, width] with its axes exchanged in memory
    return bf16(shape[1], shape[0], shape[2]).transpose(0, 1)


def strided_cache(blocks, size, width):  # [blocks, size, 1, width], places before blocks in memory
    return bf16(size, blocks, 1, width).transpose(0, 1)


def scatter(case, fault):
    key, value, key_cache, value_cache, mapping, mode = (array(c) if isinstance(c, torch.Tensor) else c for c in case)
    results = []
    for x, cache in ((key, key_cache), (value, value_cache)):
        out = cache.copy()
        results.append(out)
        if x.ndim == 0 or (fault == "value not stored" and len(results) == 2):
            continue
        tiles = mode == "PA_NZ"
        size = cache.shape[-2] if tiles else cache.shape[1]
        for t, slot in enumerate(mapping):
            if slot < 0:
                if fault != "negative slots stored":
                    continue
                slot += len(cache) * size
            block, place = divmod(int(slot), size)
            if fault == "the place behind":
                place = (place + 1) % size
            if fault == "the block before":
                block -= 1
            if fault == "interleaved blocks":
                place, block = divmod(int(slot), len(cache))
            row = x[{"first token for all": 0, "tokens reversed": -1 - t}.get(fault, t)]
            if fault == "heads reversed":
                row = row[::-1]
            if fault == "last token lost" and t == len(mapping) - 1:
                continue
            if not tiles:
                out[block, place] = row
                continue
            last = cache.shape[-1]
            parts = row.reshape(-1, last) if fault != "tiles transposed" else row.reshape(last, -1).T
            flat = out[block].reshape(-1, size, last)
            flat[:, place] = parts
            out[block] = flat.reshape(out[block].shape)
        if fault == "cache cleared":
            out[:] = np.where(out == cache, 0, out)
    return results


def call_scatter(key, value, key_cache, value_cache, mapping, mode):
    torch_npu.npu_scatter_pa_kv_cache(key, value, key_cache, value_cache, mapping, cache_mode=mode)
    return key_cache, value_cache


def functional(key, value, key_cache, value_cache, mapping, mode):
    before = key_cache.clone()
    result = torch_npu.npu_scatter_pa_kv_cache_functional(key, value, key_cache, value_cache, mapping, cache_mode=mode)
    assert torch.equal(before.cpu(), key_cache.cpu())
    return result


def latent(tokens, blocks):  # DeepSeek V4: one head of 512 and the rotary 64
    return [bf16(tokens, 1, 512), bf16(tokens, 1, 64), bf16(blocks, 128, 1, 512), bf16(blocks, 128, 1, 64)]


SCATTER_FAULTS = [
    "value not stored",
    "negative slots stored",
    "the place behind",
    "the block before",
    "interleaved blocks",
    "first token for all",
    "tokens reversed",
    "heads reversed",
    "last token lost",
    "tiles transposed",
    "cache cleared",
]
holes = torch.tensor([5, -1, 0, 11, -7], dtype=torch.int64)
cases = [
    (bf16(5, 3, 6), bf16(5, 3, 4), bf16(4, 3, 3, 6), bf16(4, 3, 3, 4), holes, "Norm"),
    (strided(7, 2, 8), strided(7, 2, 8), bf16(3, 5, 2, 8), bf16(3, 5, 2, 8), slots(7, 15), None),
    (*(whole(torch.int8, *s) for s in ((1, 1, 3), (1, 1, 3), (1, 1, 1, 3), (1, 1, 1, 3))), slots(1, 1), "Norm"),
    (*latent(150, 3), slots(150, 384), "Norm"),
    (f32(6, 4, 32).half(), f32(6, 4, 16).half(), *(f32(2, n, 4, 16).half() for n in (8, 4)), slots(6, 8), "PA_NZ"),
    (*(whole(torch.int8, *s) for s in ((3, 2, 64), (3, 2, 32), (3, 2, 2, 5, 32), (3, 2, 1, 5, 32))), slots(3, 15), "PA_NZ"),
]  # fmt: skip
if A5:
    for kind in (torch.float32, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32):
        cases.append(
            (*(whole(kind, *s) for s in ((4, 2, 3), (4, 2, 5), (2, 4, 2, 3), (2, 4, 2, 5))), slots(4, 8), "Norm")
        )
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
        cases.append(
            (*(f32(*s).to(kind) for s in ((4, 2, 3), (4, 2, 5), (2, 4, 2, 3), (2, 4, 2, 5))), slots(4, 8), "Norm")
        )
else:  # the key alone
    cases.append((bf16(4, 2, 6), bf16(), bf16(3, 4, 2, 6), bf16(), slots(4, 12), "Norm"))
check("scatter_pa_kv_cache", call_scatter, scatter, cases, SCATTER_FAULTS, 1e-9)
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
        [
            (*tiles, torch.tensor([5, -1, 0, 7, -7]), "PA_NZ"),
            (
                *(whole(torch.uint8, *s) for s in ((3, 1, 7), (3, 1, 5), (2, 4, 1, 7), (2, 4, 1, 5))),
                slots(3, 8),
                "Norm",
            ),
        ],
        SCATTER_FAULTS,
        1e-9,
    )
    # torch_npu sends the offset of a view of 4-bit values in bytes, CANN counts values: an odd one is inside a byte.
    odd = [x.npu() for x in (whole(torch.uint8, 4, 1, 7), whole(torch.uint8, 2, 4, 1, 7), slots(3, 8))]
    refused(
        "scatter_pa_kv_cache, 4 bits",
        lambda: call_packed(odd[0][1:], odd[0][1:], odd[1], odd[1], odd[2], "Norm"),
        "begins inside a byte",
    )
check("scatter_pa_kv_cache_functional", functional, scatter, cases[:1] + cases[4:5], SCATTER_FAULTS, 1e-9)


def scatter_refused(argument, mode="Norm", **changed):
    case = {"key": bf16(4, 2, 16), "value": bf16(4, 2, 16), "key_cache": bf16(2, 4, 2, 16)}
    case |= {"value_cache": bf16(2, 4, 2, 16), "slot_mapping": slots(4, 8)} | changed
    case = {name: x.npu() for name, x in case.items()}
    refused("scatter_pa_kv_cache", lambda: torch_npu.npu_scatter_pa_kv_cache(**case, cache_mode=mode), f"'{argument}'")


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
scatter_refused("slot_mapping", slot_mapping=torch.tensor([0, 1, 2, 8], dtype=torch.int32))  # a kernel fault
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


def compressed(x, cache, mapping, lengths, offsets, ends, fault):
    out = cache.copy().reshape(-1, cache.shape[-1])
    heads = x.shape[2]
    for b in range(x.shape[0]):
        for h in range(heads):
            i = b * heads + h
            slot, n, end = int(mapping[b, h]), int(lengths.reshape(-1)[i]), int(ends[b])
            start = int(offsets[i]) if offsets is not None else end - n
            seen = x[b, :, 0 if fault == "first head for all" else h]
            if offsets is None:
                part = seen[:n] if fault == "the first values" else seen[start:end]
            else:
                window = seen[start : start + n]
                if fault == "window one longer":
                    window = seen[start : start + n + 1]
                middle = window.sum(0) if fault == "sum" else window.max(0) if fault == "maximum" else window.mean(0)
                tail = seen[start + n : end]
                if fault == "tail from the start":
                    tail = seen[: end - start - n]
                if fault == "no tail":
                    tail = tail[:0]
                if fault == "sequence too long":
                    tail = seen[start + n :]
                head = seen[:start] if fault != "no head" else seen[:0]
                part = np.concatenate([head, middle[None], tail])
                if fault == "mean last":
                    part = np.concatenate([head, tail, middle[None]])
            if fault == "slots of the first batch":
                slot = int(mapping[0, h])
            out[slot : slot + len(part)] = part
    return out.reshape(cache.shape)


def window(sequences, heads, length, kind=torch.int32):
    """Slots, window lengths, offsets and sequence lengths that do not overlap."""
    ends = np.array([length - b % 3 for b in range(sequences)])
    lengths = np.stack([rng.integers(1, 4, heads) for _ in range(sequences)])
    offsets = np.stack([rng.integers(0, end - row + 1) for end, row in zip(ends, lengths, strict=True)])
    starts = (rng.permutation(sequences * heads) * (length + 1)).reshape(sequences, heads)
    return [torch.tensor(v, dtype=kind) for v in (starts, lengths, offsets.reshape(-1), ends)]


COMPRESSED_FAULTS = [
    "first head for all",
    "window one longer",
    "sum",
    "maximum",
    "tail from the start",
    "no tail",
    "sequence too long",
    "no head",
    "mean last",
    "slots of the first batch",
]
if A5:

    def pairs(case, fault):
        key, value, key_cache, value_cache, *indices = (array(c) for c in case)
        return [compressed(key, key_cache, *indices, fault), compressed(value, value_cache, *indices, fault)]

    def call_pairs(key, value, key_cache, value_cache, mapping, lengths, offsets, ends):
        torch_npu.npu_scatter_pa_kv_cache(
            key, value, key_cache, value_cache, mapping, compress_lens=lengths, compress_seq_offsets=offsets,
            seq_lens=ends, cache_mode="Norm",
        )  # fmt: skip
        return key_cache, value_cache

    check(
        "scatter_pa_kv_cache, compressed",
        call_pairs,
        pairs,
        [
            (bf16(3, 9, 2, 5), bf16(3, 9, 2, 7), bf16(13, 5, 1, 5), bf16(13, 5, 1, 7), *window(3, 2, 9)),
            (bf16(3, 9, 2, 5), bf16(3, 9, 2, 7), strided_cache(13, 5, 5), strided_cache(13, 5, 7), *window(3, 2, 9)),
            (f32(2, 40, 4, 64), f32(2, 40, 4, 64), *(f32(3, 128, 1, 64) for _ in "kv"), *window(2, 4, 40, torch.int64)),
        ],
        COMPRESSED_FAULTS,
        1e-2,
    )

    def one(case, fault):
        key, cache, mapping, *rest = (c if c is None else array(c) for c in case)
        if key.ndim == 3:
            return [scatter([case[0], torch.tensor(0.0), case[1], torch.tensor(0.0), case[2], "Norm"], fault)[0]]
        return [compressed(key, cache, mapping, *rest, fault)]

    def call_one(key, cache, mapping, lengths, offsets, ends):
        names = {"compress_lens": lengths, "compress_seq_offsets": offsets, "seq_lens": ends}
        return [torch_npu.npu_scatter_pa_cache(key, mapping, **names, key_cache=cache)]

    starts, lengths, _, ends = window(3, 2, 9)
    check(
        "scatter_pa_cache",
        call_one,
        one,
        [
            (bf16(5, 3, 6), bf16(4, 3, 3, 6), holes, None, None, None),
            (f32(6, 1, 64).to(torch.float8_e4m3fn), f32(2, 8, 1, 64).to(torch.float8_e4m3fn), slots(6, 16), None, None, None),
            (bf16(3, 9, 2, 5), bf16(13, 5, 1, 5), *window(3, 2, 9)),
            (bf16(3, 9, 2, 5), bf16(13, 5, 1, 5), starts, lengths.reshape(-1), None, ends),
        ],
        [*COMPRESSED_FAULTS, "the first values", "the place behind", "tokens reversed", "negative slots stored"],
        1e-2,
    )  # fmt: skip
    refuse = [bf16(3, 9, 2, 5), bf16(13, 5, 1, 5), *window(3, 2, 9)]
    for at, bad, argument in (
        (0, f32(3, 9, 2, 5).to(torch.float8_e5m2), "key_cache"),
        (1, bf16(13, 5, 2, 5), "key_cache"),
        (2, slots(6, 9), "slot_mapping"),
        (3, slots(5, 9), "compress_lens"),
        (3, slots(6, 9, torch.int64), "compress_lens"),
        (3, torch.full((3, 2), 10, dtype=torch.int32), "compress_lens"),  # a kernel fault
        (2, torch.full((3, 2), 60, dtype=torch.int32), "slot_mapping"),  # a kernel fault
        (4, slots(5, 9), "compress_seq_offsets"),
        (5, slots(2, 9), "seq_lens"),
    ):
        case = [bad if i == at else x for i, x in enumerate(refuse)]
        refused("scatter_pa_cache", lambda case=case: call_one(*(x.npu() for x in case)), f"'{argument}'")
        if argument not in ("key_cache", "seq_lens") or at == 5:
            both = [case[0], case[0], case[1], case[1], *case[2:]]
            refused("scatter_pa_kv_cache", lambda both=both: call_pairs(*(x.npu() for x in both)), f"'{argument}'")
    both = [refuse[0], bf16(3, 9, 1, 5), refuse[1], refuse[1], *refuse[2:]]
    refused("scatter_pa_kv_cache", lambda: call_pairs(*(x.npu() for x in both)), "'value'")
    starts, lengths, offsets, ends = window(3, 2, 9, torch.int64)
    huge = [*refuse[:2], starts, torch.full_like(lengths, 2**63 - 1), offsets + 1, ends]  # their sum overflows
    refused("scatter_pa_cache", lambda: call_one(*(x.npu() for x in huge)), "'compress_lens'")
    scatter_refused("cache_mode", mode="PA_NZ", key=bf16(2, 2, 2, 16))
    turned = [bf16(3, 2, 9, 5).transpose(1, 2), *refuse[1:]]
    refused("scatter_pa_cache", lambda: call_one(*(x.npu() for x in turned)), "'key'")
    fp8 = [f32(3, 9, 2, 5).to(torch.float8_e5m2), f32(13, 5, 1, 5).to(torch.float8_e5m2), *refuse[2:]]
    refused("scatter_pa_cache", lambda: call_one(*(x.npu() for x in fp8)), "'key'")
else:
    here = bf16(4, 2, 16).npu(), bf16(2, 4, 2, 16).npu()
    refused(
        "scatter_pa_cache",
        lambda: torch_npu.npu_scatter_pa_cache(here[0], slots(4, 8).npu(), key_cache=here[1]),
        "does not exist",
    )
