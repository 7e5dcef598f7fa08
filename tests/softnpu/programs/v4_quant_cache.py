"""aclnnKvCompressEpilog and aclnnIndexerQuantCache (docs/spec/ascend-operators.md 4.16, 7; see
fused_check.py). A5; elsewhere they are refused.
"""

import ml_dtypes
import numpy as np
import torch
from aclnn import call
from fused_check import A5, Steps, array, bf16, check, f32, refused, rng, same
from v4_paged import int32, on_npu, with_gaps

KV, INDEXER = "aclnnKvCompressEpilog", "aclnnIndexerQuantCache"
E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16


def up_to_power(scale):
    mantissa, exponent = np.frexp(scale)  # mantissa in [0.5, 1)
    return np.ldexp(1.0, np.where(mantissa == 0.5, exponent - 1, exponent))


STEPS = Steps(
    group=64,
    floor=1e-4,
    least=0,
    counted=np.isfinite,
    scaled=lambda x, scale: x * (np.float32(1) / scale),
    filling=0,
    largest=448,
    rounded=up_to_power,
    rope_first=True,
    values=lambda x, scale: np.clip(x / scale, -448, 448),
    place=lambda slot, size, pages: divmod(slot, size),
    slots=same,
    stored=same,
)


def quantised(x, steps, power_of_two):
    """(e4m3 bytes, scales) of the last axis."""
    amax = np.maximum(np.abs(x).max(-1, keepdims=True), steps.floor).astype(np.float32)
    scale = (amax * np.float32(1 / steps.largest)).astype(np.float64)
    scale = steps.rounded(scale) if power_of_two else scale
    return steps.values(x, scale).astype(np.float32).astype(E4M3).view(np.uint8), scale


def row_bytes(x, steps):
    """A row of 608 bytes: what is used, and zeros up to a multiple of 32."""
    nope, rope = x[:-64], x[-64:].astype(np.float32).astype(BF16).view(np.uint8)
    values, scales = quantised(nope.reshape(-1, steps.group), steps, True)
    scales = scales.ravel().astype(np.float32).astype(BF16).view(np.uint8)
    parts = [rope, values.ravel(), scales] if steps.rope_first else [values.ravel(), rope, scales]
    used = sum(map(len, parts))
    return np.concatenate([*parts, np.full(-used % 32, steps.filling, np.uint8)])


def key_codes(x, steps, power_of_two):
    """(e4m3 bytes, fp32 scale) of a row of index keys, in fp32 as the kernel has it."""
    x, known = x.astype(np.float32), steps.counted(x)
    amax = np.float32(max(np.abs(x[known]), default=0))
    scale = np.float32(max(amax, np.float32(steps.least)) * np.float32(1 / steps.largest))
    scale = np.float32(steps.rounded(float(scale))) if power_of_two and scale else scale
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        scaled = steps.scaled(x, scale)
    scaled = np.where(np.isfinite(scaled), scaled, x)
    codes = np.clip(scaled, -448, 448).astype(np.float32).astype(E4M3).view(np.uint8)
    return np.where(np.isfinite(x), codes, 0x7F).astype(np.uint8), scale


def kv_written(case, steps):
    cache, x, slots = case
    out = array(cache).astype(int)
    for row, slot in zip(array(x), steps.slots(array(slots)), strict=True):
        if slot >= 0:
            data = steps.stored(row_bytes(row, steps))
            page, at = steps.place(int(slot), out.shape[1], len(out))
            out[page, at, 0, : len(data)] = data
    return [out]


def write_kv(cache, x, slots, changed=None):
    named = dict(
        kv_compress_cache=cache, x=x, slot_mapping=slots, quant_group_size=64, quant_mode=0,
        round_scale=True, x_scale=1.0,
    )  # fmt: skip
    call(KV, **on_npu(named | (changed or {})))
    return [cache]


def indexer_written(case, steps):
    """The bytes of the cache, and the scales."""
    cache, scales, x, slots, power_of_two = case
    out, held = array(cache.view(torch.uint8)).astype(int), array(scales).copy()
    for row, slot in zip(array(x), steps.slots(array(slots)), strict=True):
        if slot < 0:
            continue
        values, scale = key_codes(row, steps, power_of_two)
        page, at = steps.place(int(slot), out.shape[1], len(out))
        out[page, at, 0, :128] = values
        held[page, at] = scale
    return [out, held]


def write_keys(cache, scales, x, slots, power_of_two=False, changed=None):
    named = dict(
        cache=cache, cache_scale=scales, x=x, slot_mapping=slots, quant_mode=1,
        round_scale=power_of_two, x_scale=1.0,
    )  # fmt: skip
    call(INDEXER, **on_npu(named | (changed or {})))
    return [cache.view(torch.uint8), scales]


def raw(*shape):
    return torch.tensor(rng.integers(0, 256, shape), dtype=torch.uint8)


def slots_of(rows, limit, dtype=torch.int32):
    """Different slots; the second row is stored nowhere."""
    slots = rng.permutation(limit)[:rows]
    slots[1] = -1
    return torch.tensor(slots).to(dtype)


FAULTS = {
    "448 for 240": dict(largest=240),
    "scale not rounded": dict(rounded=same),
    "scale rounded down": dict(rounded=lambda scale: up_to_power(scale) / 2),
    "interleaved pages": dict(place=lambda slot, size, pages: divmod(slot, pages)[::-1]),
    "one place on": dict(place=lambda slot, size, pages: (slot // size, (slot + 1) % size)),
    "slots reversed": dict(slots=lambda slots: slots[::-1]),
    "-1 stored at 0": dict(slots=lambda slots: np.maximum(slots, 0)),
}
OF_ROWS = {
    "no floor": dict(floor=1e-30),
    "nothing divided": dict(values=lambda x, scale: np.clip(x, -448, 448)),
    "groups of 32": dict(group=32),
    "rotated values behind": dict(rope_first=False),
    "padding not written": dict(stored=lambda d: d[:-18]),
    "padding of ones": dict(filling=1),
}
OF_KEYS = {
    "floor of 1e-4": dict(least=1e-4),
    "nothing scaled": dict(scaled=lambda x, scale: x),
    "infinity counts": dict(counted=lambda x: ~np.isnan(x)),
    "zeros of a row without scale are NaN": dict(scaled=lambda x, scale: x / scale + 1 / scale),
}
if A5:
    small = bf16(5, 512)
    small[3] *= 2**-20  # below the floor
    small[2] *= 100
    KV_CASES = [
        (raw(2, 8, 1, 608), small, slots_of(5, 16)),
        (raw(3, 1, 1, 608), bf16(2, 512), slots_of(2, 3, torch.int64)),
        (raw(3, 4, 1, 288), bf16(4, 192) * 3, slots_of(4, 12)),
        (raw(2, 3, 1, 325), bf16(3, 192), slots_of(3, 6)),  # bytes behind rows of 288
    ]
    check(
        "kv_compress_epilog", write_kv, kv_written, STEPS, KV_CASES,
        FAULTS | OF_ROWS,
        1e-9,
    )  # fmt: skip

    def keys(pages, size, width=128):
        return f32(pages, size, 1, width).to(torch.float8_e4m3fn), f32(pages, size, 1, 1)

    few = bf16(4, 128)
    few[2] *= 2**-20
    special = bf16(5, 128)
    special[0, 3], special[2, 5], special[3], special[4, 7] = torch.nan, -torch.inf, 0, torch.inf
    check(
        "indexer_quant_cache", write_keys, indexer_written, STEPS,
        [
            (*keys(3, 4), few, slots_of(4, 12), True),
            (*keys(2, 16, 160), bf16(6, 128) * 9, slots_of(6, 32), False),
            (*keys(2, 5), f32(3, 128).half(), slots_of(3, 10), False),
            (*keys(1, 5), special, slots_of(5, 5), False),
        ],
        FAULTS | OF_KEYS, 1e-6,
    )  # fmt: skip

    cache, x, slots = (t.npu() for t in KV_CASES[0])
    apart = with_gaps(cache)
    write_kv(apart, x, slots)
    assert torch.equal(apart.cpu(), torch.tensor(kv_written(KV_CASES[0], STEPS)[0]).byte())

    def kv(argument, code=None, **changed):
        refused(KV, lambda: write_kv(cache, x, slots, changed), f"'{argument}'", code)

    kv("kv_compress_cache", kv_compress_cache=raw(2, 8, 1, 607))
    kv("kv_compress_cache", kv_compress_cache=raw(2, 8, 608))
    kv("kv_compress_cache", kv_compress_cache=keys(2, 8, 608)[0])
    kv("kv_compress_cache", kv_compress_cache=raw(8, 2, 1, 608).transpose(0, 1))
    kv("x", x=f32(5, 512))
    kv("x", x=bf16(5, 500))
    kv("x", x=bf16(512, 5).t())
    kv("x", x=bf16(5, 64))
    kv("slot_mapping", slot_mapping=f32(5))
    kv("slot_mapping", slot_mapping=int32([1]))
    kv("quant_group_size", quant_group_size=32)
    kv("quant_mode", quant_mode=1)
    kv("round_scale", round_scale=False)
    kv("x_scale", x_scale=2.0)
    kv("slot_mapping", 507015, slot_mapping=int32([0, 1, 2, 3, 16]))
    kv("slot_mapping", 507015, slot_mapping=int32([0, 1, 2, 3, -2]))
    kv("slot_mapping", 507015, slot_mapping=int32([0, 1, -1, -1, 1]))
    pool, scales = (t.npu() for t in keys(2, 8))
    rows, at = bf16(5, 128).npu(), int32([3, 1, -1, 0, 7]).npu()

    def index(argument, code=None, **changed):
        refused(
            INDEXER,
            lambda: write_keys(pool, scales, rows, at, changed=changed),
            f"'{argument}'",
            code,
        )

    index("cache", cache=keys(2, 8, 64)[0])
    index("cache", cache=raw(2, 8, 1, 128))
    index("cache_scale", cache_scale=f32(2, 8, 1))
    index("cache_scale", cache_scale=f32(2, 4, 1, 1))
    index("cache_scale", cache_scale=bf16(2, 8, 1, 1))
    index("x", x=bf16(5, 64))
    index("x", x=f32(5, 128))
    index("slot_mapping", slot_mapping=at.long())
    index("slot_mapping", slot_mapping=at[:3])
    index("quant_mode", quant_mode=0)
    index("x_scale", x_scale=0.5)
    index("slot_mapping", 507015, slot_mapping=int32([0, 1, 2, 3, 16]))
    index("slot_mapping", 507015, slot_mapping=int32([4, 1, 2, 3, 4]))
else:
    here = raw(2, 8, 1, 608).npu(), bf16(2, 512).npu(), int32([0, 1]).npu()
    refused(KV, lambda: write_kv(*here), "does not exist on")
    here = raw(2, 8, 1, 128).npu(), f32(2, 8, 1, 1).npu(), bf16(2, 128).npu(), int32([0, 1]).npu()
    refused(INDEXER, lambda: write_keys(*here), "does not exist on")
