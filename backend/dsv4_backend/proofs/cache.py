"""Proof of paged cache writes: cases, oracle, named faults,
and what the byte formats share with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from dsv4_backend.contract import Case, Draw
from dsv4_backend.ops.cache import write_cache, write_caches
from dsv4_backend.proofs.numerics import Array


@write_cache.oracle
def _write(cache: Array, rows: Array, slots: Array) -> None:
    for row, slot in zip(rows, slots.tolist(), strict=True):
        if slot != -1:
            cache[divmod(slot, cache.shape[1])] = row


def draw_slots(draw: Draw, rows: int, capacity: int, skipped: int) -> torch.Tensor:
    """Distinct slots in random order, int64 [rows],
    of which `skipped`, the first among them, are -1.
    """
    slots = draw.permutation(capacity)[:rows].clone()
    slots[torch.arange(skipped) * rows // max(skipped, 1)] = -1
    return slots


PAGES = ((1, 1, 1, 0), (3, 4, 7, 2), (5, 1, 3, 0), (2, 16, 32, 0), (4, 3, 5, 5), (2, 3, 0, 0))
"""(num_blocks, block_size, rows, skipped rows): odd, full, all skipped, none."""


@write_cache.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in (("ideal", torch.float32), ("official", torch.bfloat16)):
        for blocks, size, rows, skipped in PAGES:
            cache = draw.normal(blocks, size, 24, dtype=dtype)
            slots = draw_slots(draw, rows, blocks * size, skipped)
            name = f"{rows} rows to {blocks}x{size}, {skipped} skipped"
            yield Case(name, profile, (cache, draw.normal(rows, 24, dtype=dtype), slots))
        wide = (
            draw.normal(4, 64, 512, dtype=dtype),
            draw.spread(130, 512, dtype=dtype),
            draw_slots(draw, 130, 256, 9),
        )
        yield Case("512 channels, block 64", profile, wide)
        pages = draw.normal(3, 8, 40, dtype=dtype)[:, ::2, 4:20]
        special = draw.normal(10, 16, dtype=dtype)[::2]
        special[0, 0], special[1, 1], special[2, 2] = float("nan"), float("inf"), -0.0
        yield Case(
            "strided, NaN, infinity, -0", profile, (pages, special, torch.tensor([11, 0, 5, -1, 4]))
        )
    for name, dtype in (("fp16", torch.float16), ("fp64", torch.float64)):
        cache = draw.normal(2, 3, 8, dtype=dtype)
        yield Case(
            name, "official", (cache, draw.spread(4, 8, dtype=dtype), draw_slots(draw, 4, 6, 1))
        )


SLOT_FAULTS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "skipped rows land in slot 0": lambda slots, _: slots.clamp(min=0),
    "skipped rows wrap to the last slot": lambda slots, capacity: slots % capacity,
    "slots shifted by one": lambda slots, capacity: torch.where(
        slots < 0, slots, (slots + 1) % capacity
    ),
    "slots counted from the end": lambda slots, capacity: torch.where(
        slots < 0, slots, capacity - 1 - slots
    ),
    "rows in reverse": lambda slots, _: slots.flip(0),
    "last row forgotten": lambda slots, _: torch.cat([slots[:-1], slots[-1:].clamp(max=-1)]),
    "rows packed as if none were skipped": lambda slots, _: slots.take(
        slots.lt(0).to(torch.int8).argsort(stable=True)
    ),
}
"""Wrong addressing that fits every write operator: (slots, capacity) -> slots."""


def slot_faults(capacity: Callable[[Any], int]) -> dict[str, Callable[[Any], Any]]:
    """SLOT_FAULTS for `wrong_arguments`; capacity: arguments -> how many slots there are."""

    def edit(name: str) -> Callable[[Any], Any]:
        return lambda a: a._replace(slots=SLOT_FAULTS[name](a.slots, capacity(a)))

    return {name: edit(name) for name in SLOT_FAULTS}


def _swapped(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    blocks, size = cache.shape[:2]
    return torch.where(slots < 0, slots, slots % blocks * size + slots // blocks)


write_cache.wrong_arguments(
    {
        **slot_faults(lambda a: a.cache.shape[0] * a.cache.shape[1]),
        "block and offset swapped": lambda a: a._replace(slots=_swapped(a.cache, a.slots)),
        "added to what was there": lambda a: a._replace(
            rows=a.rows + a.cache.flatten(0, 1)[a.slots.clamp(min=0)]
        ),
        "rest of the cache cleared": {"cache": lambda cache: cache.zero_()},
        "last channels not written": dict.fromkeys(("cache", "rows"), lambda x: x[..., :-2]),
        "rounded to fp16": {"rows": lambda rows: rows.half().to(rows.dtype)},
        "nothing written": {"slots": lambda slots: slots.clamp(max=-1)},
    }
)
SAME_WRITES = {
    "write_targets: True -> False": "a pivot without its dimension broadcasts the same",
    "write_cache: 1 -> 2": "a row behind those that slots choose from is never chosen",
    "write_cache: source == own -> source != own": "decides gradients only, which tests check",
}
write_cache.explain(SAME_WRITES)
write_cache.equivalent("write_targets: 1 -> 2 (2)", "every negative slot is a skipped one")


@write_caches.oracle
def _(cache: Array, other: Array, rows: Array, other_rows: Array, slots: Array) -> None:
    _write(cache, rows, slots)
    _write(other, other_rows, slots)


@write_caches.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in (("ideal", torch.float32), ("official", torch.bfloat16)):
        for blocks, size, rows, skipped in PAGES:
            caches = [draw.normal(blocks, size, width, dtype=dtype) for width in (24, 8)]
            new = [draw.normal(rows, width, dtype=dtype) for width in (24, 8)]
            slots = draw_slots(draw, rows, blocks * size, skipped)
            name = f"{rows} rows to {blocks}x{size}, {skipped} skipped"
            yield Case(name, profile, (*caches, *new, slots))
        caches = [draw.normal(4, 64, width, dtype=dtype) for width in (512, 128)]
        new = [draw.spread(130, width, dtype=dtype) for width in (512, 128)]
        slots = draw_slots(draw, 130, 256, 9)
        yield Case("512 and 128 channels, block 64", profile, (*caches, *new, slots))
        strided = [draw.normal(3, 8, 40, dtype=dtype)[:, ::2, 4:20] for _ in range(2)]
        new = [draw.normal(10, 16, dtype=dtype)[::2] for _ in range(2)]
        slots = torch.tensor([11, 0, 5, -1, 4])
        yield Case("strided", profile, (*strided, *new, slots))


write_caches.wrong_arguments(
    {
        **slot_faults(lambda a: a.cache.shape[0] * a.cache.shape[1]),
        "rest of the first cleared": {"cache": lambda cache: cache.zero_()},
        "rest of the second cleared": {"other": lambda cache: cache.zero_()},
        "rows of the second by one token": {"other_rows": lambda rows: rows.roll(1, 0)},
        "nothing written to the first": {"rows": lambda rows: rows * 0},
    }
)
write_caches.explain(SAME_WRITES)
