"""aclnnScatterPaKvCache as V4's launchers call it (docs/spec/ascend-operators.md 12, item 11):
negative slots skipped, the key alone, two caches of different widths, gaps between pages.
"""

import torch
from aclnn import call
from fused_check import A5, bf16, f32, problems, refused
from v4_paged import int32, on_npu, with_gaps

NAME = "aclnnScatterPaKvCache"
SLOTS = [3, -1, 9, 0, -7]


def stored(rows, cache):
    """What the cache holds afterwards."""
    flat = cache.clone().view(-1, *cache.shape[2:])
    for row, slot in zip(rows, SLOTS, strict=True):
        if slot >= 0:
            flat[slot] = row
    return flat.view(cache.shape)


def scatter(**named):
    call(NAME, **on_npu(named | dict(slot_mapping=int32(SLOTS))), cache_mode="Norm",
         scatter_mode="None")  # fmt: skip


def alone():
    """The key alone: no value, or an empty one."""
    rows, cache = bf16(5, 1, 512), bf16(3, 4, 1, 512)
    empty = torch.zeros(0).bfloat16()
    for value, value_cache in ((None, None), (empty, empty), (torch.tensor(0.0).bfloat16(),) * 2):
        on_chip = with_gaps(cache)
        named = dict(key=rows, key_cache=on_chip, value=value, value_cache=value_cache)
        if A5:
            refused(NAME, lambda n=named: scatter(**n), "'value'")
            continue
        scatter(**named)
        if not torch.equal(on_chip.cpu(), stored(rows, cache)):
            problems.append("scatter_pa_kv_cache: the key alone")


def both():
    """Index keys and the two bytes of their scales, as int8."""
    keys, scales = (f32(5, 1, n).mul(50).to(torch.int8) for n in (128, 2))
    caches = [f32(3, 4, 1, n).mul(50).to(torch.int8) for n in (128, 2)]
    on_chip = [with_gaps(cache) for cache in caches]
    scatter(key=keys, key_cache=on_chip[0], value=scales, value_cache=on_chip[1])
    for rows, cache, got in zip((keys, scales), caches, on_chip, strict=True):
        if not torch.equal(got.cpu(), stored(rows, cache)):
            problems.append(f"scatter_pa_kv_cache: a cache {cache.shape[-1]} wide of two")


alone()
both()
