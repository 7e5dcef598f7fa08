"""Gathering from the paged key/value cache (see fused_check.py)."""

import numpy as np
import torch
import torch_npu
from fused_cache import latent, whole
from fused_check import A5, Steps, array, bf16, check, f32, refused, rng

STEPS = Steps(
    counts=lambda lengths, sums: np.diff(lengths) if sums else lengths,
    first=lambda offset, size: offset // size,
    tokens=range,
    row=lambda table, b: table[b],
    column=lambda first, block: first + block,
    place=lambda t, size: t % size,
    value=lambda value: value,
    next=lambda at, count: at + count,
)


def gathered(case, steps):
    key_cache, value_cache, key, value, table, lengths, offsets, sums = (
        array(c) if isinstance(c, torch.Tensor) else c for c in case
    )
    size = key_cache.shape[1]
    key, value = key.copy(), value.copy()
    at = 0
    for b, count in enumerate(steps.counts(lengths, sums)[: len(table)]):
        first = 0 if offsets is None else steps.first(int(offsets[b]), size)
        for t in steps.tokens(int(count)):
            if at + t >= len(key):
                continue
            block = int(steps.row(table, b)[steps.column(first, t // size) % table.shape[1]])
            place = steps.place(t, size)
            key[at + t] = key_cache[block, place]
            value[at + t] = steps.value(value_cache[block, place])
        at = steps.next(at, int(count))
    return [key, value]


def call_gather(key_cache, value_cache, key, value, table, lengths, offsets, sums):
    torch_npu.npu_gather_pa_kv_cache(
        key_cache,
        value_cache,
        table,
        lengths,
        key,
        value,
        seq_offset=offsets,
        is_seq_lens_cumsum=sums,
    )
    return key, value


def call_gather_functional(key_cache, value_cache, key, value, table, lengths, offsets, sums):
    return torch_npu.npu_gather_pa_kv_cache_functional(
        key_cache,
        value_cache,
        table,
        lengths,
        key,
        value,
        seq_offset=offsets,
        is_seq_lens_cumsum=sums,
    )


GATHER_FAULTS = {
    "lengths as sums": dict(counts=lambda lengths, sums: lengths if sums else np.diff(lengths)),
    "no offset": dict(first=lambda offset, size: 0),
    "offset in blocks": dict(first=lambda offset, size: offset),
    "offset rounded up": dict(first=lambda offset, size: -(-offset // size)),
    "last token lost": dict(tokens=lambda count: range(count - 1)),
    "first block for all": dict(column=lambda first, block: 0),
    "blocks reversed": dict(column=lambda first, block: -1 - block),
    "table of the first batch": dict(row=lambda table, b: table[0]),
    "places reversed": dict(place=lambda t, size: size - 1 - t % size),
    "first place for all": dict(place=lambda t, size: 0),
    "no value": dict(value=lambda value: 0),
    "sequences from the start": dict(next=lambda at, count: at),
}


def ints(values, kind=torch.int32):
    return torch.tensor(values, dtype=kind)


# No two rows agree in a column, so that each reads other blocks.
table = ints(
    np.stack([np.roll(blocks, b)[:4] for blocks in [rng.permutation(5)] for b in range(3)])
)
small = bf16(5, 4, 2, 6), bf16(5, 4, 2, 3)
cases = [
    (*small, bf16(17, 2, 6), bf16(17, 2, 3), table, ints([6, 3, 8]), None, False),
    (
        *small,
        bf16(12, 2, 6),
        bf16(12, 2, 3),
        table,
        ints([0, 5, 5, 12]),
        None,
        True,
    ),  # the second is empty
    (
        *small,
        bf16(13, 2, 6),
        bf16(13, 2, 3),
        table,
        ints([6, 0, 5]),
        ints([5, 0, 8]),
        False,
    ),  # two rows unwritten
    (
        *(whole(torch.int8, *s) for s in ((2, 3, 1, 5), (2, 3, 1, 5), (4, 1, 5), (4, 1, 5))),
        ints([[1, 0]]),
        ints([4]),
        None,
        False,
    ),
    (
        *latent(0, 6)[2:],
        bf16(700, 1, 512),
        bf16(700, 1, 64),
        ints([[4, 1, 0], [5, 3, 3]]),
        ints([0, 330, 700]),
        None,
        True,
    ),
]
if A5:
    fp8 = (
        f32(5, 4, 2, 6).to(torch.float8_e4m3fn),
        small[1],
        f32(7, 2, 6).to(torch.float8_e4m3fn),
        bf16(7, 2, 3),
    )
    cases.append(
        (*fp8, table.long(), ints([3, 0, 4], torch.int64), ints([4, 0, 8], torch.int64), False)
    )
    cases.append(
        (
            *(whole(torch.uint16, *s) for s in ((2, 3, 1, 5), (2, 3, 1, 5), (4, 1, 5), (4, 1, 5))),
            *cases[3][4:],
        )
    )
check("gather_pa_kv_cache", call_gather, gathered, STEPS, cases, GATHER_FAULTS, 1e-9)
check(
    "gather_pa_kv_cache_functional",
    call_gather_functional,
    gathered,
    STEPS,
    cases[:3],
    GATHER_FAULTS,
    1e-9,
)


def gather_refused(argument, sums=False, **changed):
    case = {
        "key_cache": small[0],
        "value_cache": small[1],
        "block_tables": table,
        "seq_lens": ints([6, 3, 8]),
    }
    case |= {"key": bf16(17, 2, 6), "value": bf16(17, 2, 3)} | changed
    case = {name: x.npu() for name, x in case.items()}
    refused(
        "gather_pa_kv_cache",
        lambda: torch_npu.npu_gather_pa_kv_cache(**case, is_seq_lens_cumsum=sums),
        f"'{argument}'",
    )


gather_refused("key_cache", key_cache=f32(5, 4, 2, 6).double())
gather_refused("key_cache", key_cache=bf16(5, 4, 12))
gather_refused("value_cache", value_cache=f32(5, 4, 2, 3).half(), value=f32(17, 2, 3).half())
gather_refused("value_cache", value_cache=bf16(4, 4, 2, 3))
gather_refused("key_cache", key_cache=bf16(5, 0, 2, 6), value_cache=bf16(5, 0, 2, 3))
gather_refused("block_tables", block_tables=ints([0, 1, 2]))
gather_refused("block_tables", block_tables=ints([[0] * 3] * 4).t())
# A kernel fault.
gather_refused("block_tables", block_tables=torch.where(table == table[0, 0], 5, table).int())
# A kernel fault: too few columns.
gather_refused("block_tables", block_tables=table[:, :1].contiguous())
gather_refused("seq_lens", seq_lens=ints([6, 3, 8, 0]))
gather_refused("seq_lens", seq_lens=ints([6, 3, 9]))  # a kernel fault: more tokens than rows
# A kernel fault: sums begin with 0.
gather_refused("seq_lens", sums=True, seq_lens=ints([1, 3, 8, 17]))
gather_refused("seq_offset", seq_offset=ints([1, 2]))
gather_refused("key", key=bf16(17, 12))
gather_refused("key", key=bf16(17, 1, 6))
gather_refused("key", key=f32(17, 2, 6).half())
gather_refused("key", key_cache=bf16(5, 4, 2, 40000), key=bf16(1, 2, 40000))
gather_refused("value", value=bf16(16, 2, 3))
if A5:
    # Another dtype than block_tables.
    gather_refused("seq_lens", seq_lens=ints([6, 3, 8], torch.int64))
else:
    gather_refused("block_tables", block_tables=table.long(), seq_lens=ints([6, 3, 8], torch.int64))
    gather_refused("key_cache", key_cache=f32(5, 4, 2, 6), key=f32(17, 2, 6))
