"""Scattering windows of a sequence, their middle compressed to its mean,
into the paged key/value cache (see fused_check.py).
"""

import numpy as np
import torch
import torch_npu
from fused_cache import (
    SCATTER,
    SCATTER_FAULTS,
    holes,
    scatter_refused,
    slots,
    stored,
    strided_cache,
)
from fused_check import A5, Steps, array, bf16, check, f32, refused, rng

COMPRESSED = Steps(
    head=lambda x, b, h: x[b, :, h],
    without_offset=lambda seen, start, end: seen[start:end],
    window=lambda seen, start, n: seen[start : start + n],
    mean=lambda window: window.mean(0),
    front=lambda seen, start: seen[:start],
    tail=lambda seen, start, end: seen[start:end],
    joined=lambda front, middle, tail: np.concatenate([front, middle, tail]),
    first_slot=lambda mapping, b, h: mapping[b, h],
)


def compressed(x, cache, mapping, lengths, offsets, ends, steps):
    out = cache.copy().reshape(-1, cache.shape[-1])
    heads = x.shape[2]
    for b in range(x.shape[0]):
        for h in range(heads):
            i = b * heads + h
            slot, n, end = (
                int(steps.first_slot(mapping, b, h)),
                int(lengths.reshape(-1)[i]),
                int(ends[b]),
            )
            seen = steps.head(x, b, h)
            if offsets is None:
                part = steps.without_offset(seen, end - n, end)
            else:
                start = int(offsets[i])
                middle = steps.mean(steps.window(seen, start, n))[None]
                part = steps.joined(
                    steps.front(seen, start), middle, steps.tail(seen, start + n, end)
                )
            out[slot : slot + len(part)] = part
    return out.reshape(cache.shape)


def window(sequences, heads, length, kind=torch.int32):
    """Slots, window lengths, offsets and sequence lengths that do not overlap."""
    ends = np.array([length - b % 3 for b in range(sequences)])
    lengths = np.stack([rng.integers(1, 4, heads) for _ in range(sequences)])
    offsets = np.stack(
        [rng.integers(0, end - row + 1) for end, row in zip(ends, lengths, strict=True)]
    )
    starts = (rng.permutation(sequences * heads) * (length + 1)).reshape(sequences, heads)
    return [torch.tensor(v, dtype=kind) for v in (starts, lengths, offsets.reshape(-1), ends)]


COMPRESSED_FAULTS = {
    "first head for all": dict(head=lambda x, b, h: x[b, :, 0]),
    "window one longer": dict(window=lambda seen, start, n: seen[start : start + n + 1]),
    "sum": dict(mean=lambda window: window.sum(0)),
    "maximum": dict(mean=lambda window: window.max(0)),
    "tail from the start": dict(tail=lambda seen, start, end: seen[: end - start]),
    "no tail": dict(tail=lambda seen, start, end: seen[:0]),
    "sequence too long": dict(tail=lambda seen, start, end: seen[start:]),
    "no head": dict(front=lambda seen, start: seen[:0]),
    "mean last": dict(joined=lambda front, middle, tail: np.concatenate([front, tail, middle])),
    "slots of the first batch": dict(first_slot=lambda mapping, b, h: mapping[0, h]),
}
if A5:

    def pairs(case, steps):
        key, value, key_cache, value_cache, *indices = (array(c) for c in case)
        return [
            compressed(key, key_cache, *indices, steps),
            compressed(value, value_cache, *indices, steps),
        ]

    def call_pairs(key, value, key_cache, value_cache, mapping, lengths, offsets, ends):
        torch_npu.npu_scatter_pa_kv_cache(
            key, value, key_cache, value_cache, mapping, compress_lens=lengths,
            compress_seq_offsets=offsets, seq_lens=ends, cache_mode="Norm",
        )  # fmt: skip
        return key_cache, value_cache

    check(
        "scatter_pa_kv_cache, compressed",
        call_pairs,
        pairs,
        COMPRESSED,
        [
            (
                bf16(3, 9, 2, 5),
                bf16(3, 9, 2, 7),
                bf16(13, 5, 1, 5),
                bf16(13, 5, 1, 7),
                *window(3, 2, 9),
            ),
            (
                bf16(3, 9, 2, 5),
                bf16(3, 9, 2, 7),
                strided_cache(13, 5, 5),
                strided_cache(13, 5, 7),
                *window(3, 2, 9),
            ),
            (
                f32(2, 40, 4, 64),
                f32(2, 40, 4, 64),
                *(f32(3, 128, 1, 64) for _ in "kv"),
                *window(2, 4, 40, torch.int64),
            ),
        ],
        COMPRESSED_FAULTS,
        1e-2,
    )

    def one(case, steps):
        key, cache, mapping, *rest = (c if c is None else array(c) for c in case)
        if key.ndim == 3:
            return [stored(key, cache, mapping, "Norm", steps)]
        return [compressed(key, cache, mapping, *rest, steps)]

    def call_one(key, cache, mapping, lengths, offsets, ends):
        names = {"compress_lens": lengths, "compress_seq_offsets": offsets, "seq_lens": ends}
        return [torch_npu.npu_scatter_pa_cache(key, mapping, **names, key_cache=cache)]

    starts, lengths, _, ends = window(3, 2, 9)
    check(
        "scatter_pa_cache",
        call_one,
        one,
        Steps(**vars(SCATTER), **vars(COMPRESSED)),
        [
            (bf16(5, 3, 6), bf16(4, 3, 3, 6), holes, None, None, None),
            (
                f32(6, 1, 64).to(torch.float8_e4m3fn),
                f32(2, 8, 1, 64).to(torch.float8_e4m3fn),
                slots(6, 16),
                None,
                None,
                None,
            ),
            (bf16(3, 9, 2, 5), bf16(13, 5, 1, 5), *window(3, 2, 9)),
            (bf16(3, 9, 2, 5), bf16(13, 5, 1, 5), starts, lengths.reshape(-1), None, ends),
        ],
        COMPRESSED_FAULTS
        | {"the first values": dict(without_offset=lambda seen, start, end: seen[: end - start])}
        | {
            name: SCATTER_FAULTS[name]
            for name in ("the place behind", "tokens reversed", "negative slots stored")
        },
        1e-2,
    )
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
        refused(
            "scatter_pa_cache",
            lambda case=case: call_one(*(x.npu() for x in case)),
            f"'{argument}'",
        )
        if argument not in ("key_cache", "seq_lens") or at == 5:
            both = [case[0], case[0], case[1], case[1], *case[2:]]
            refused(
                "scatter_pa_kv_cache",
                lambda both=both: call_pairs(*(x.npu() for x in both)),
                f"'{argument}'",
            )
    both = [refuse[0], bf16(3, 9, 1, 5), refuse[1], refuse[1], *refuse[2:]]
    refused("scatter_pa_kv_cache", lambda: call_pairs(*(x.npu() for x in both)), "'value'")
    starts, lengths, offsets, ends = window(3, 2, 9, torch.int64)
    # Their sum overflows.
    huge = [*refuse[:2], starts, torch.full_like(lengths, 2**63 - 1), offsets + 1, ends]
    refused("scatter_pa_cache", lambda: call_one(*(x.npu() for x in huge)), "'compress_lens'")
    scatter_refused("cache_mode", mode="PA_NZ", key=bf16(2, 2, 2, 16))
    turned = [bf16(3, 2, 9, 5).transpose(1, 2), *refuse[1:]]
    refused("scatter_pa_cache", lambda: call_one(*(x.npu() for x in turned)), "'key'")
    fp8 = [
        f32(3, 9, 2, 5).to(torch.float8_e5m2),
        f32(13, 5, 1, 5).to(torch.float8_e5m2),
        *refuse[2:],
    ]
    refused("scatter_pa_cache", lambda: call_one(*(x.npu() for x in fp8)), "'key'")
else:
    here = bf16(4, 2, 16).npu(), bf16(2, 4, 2, 16).npu()
    refused(
        "scatter_pa_cache",
        lambda: torch_npu.npu_scatter_pa_cache(here[0], slots(4, 8).npu(), key_cache=here[1]),
        "does not exist",
    )
