"""Paged cache writes of whole rows (spec/v4.md 4.4, 6.5); byte formats are in `cache_bytes`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from dsv4_backend.contract import Case, Draw, Operator, Tolerance, operator


def write_targets(slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where to write (int64 [M+1]) and which of M+1 rows to write there, row M being what slot 0 holds already.

    A skipped row repeats the write of a row that is not skipped, or else rewrites slot 0: shapes stay static.
    """
    padded = torch.cat([slots, slots.new_full((1,), -1)])
    own = torch.arange(padded.shape[0], device=slots.device)
    pivot = padded.argmax(0, keepdim=True)
    source = torch.where(padded >= 0, own, torch.where(padded[pivot] >= 0, pivot, own[-1:]))
    return padded[source].clamp(min=0), source


def check_slots(contract: Operator, slots: torch.Tensor, capacity: int, unique: bool) -> None:
    """ArgumentError unless every slot is -1 or in [0, capacity) and, if `unique`, no slot stands twice."""
    outside = ((slots < -1) | (slots >= capacity)).nonzero()
    if len(outside):
        i = int(outside[0])
        raise contract.reject("slots", f"{slots[i].item()} at {i}", f"-1 or a slot in [0, {capacity})")
    ordered = slots[slots >= 0].sort().values
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if unique and len(repeated):
        raise contract.reject("slots", f"{repeated[0].item()} more than once", "every slot once")


@operator(
    "write_cache(Tensor(a!) cache, Tensor rows, Tensor slots) -> ()",
    rows=(21,),
    arguments={"cache": "float [num_blocks, block_size, D]", "rows": "float [M, D]", "slots": "i64 [M]"},
    tolerance=Tolerance(reason="rows are copied, nothing is computed: bit equality"),
)
def write_cache(cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> None:
    """Copy rows into a paged cache: `cache[slot // block_size, slot % block_size] = row`.

    cache: [num_blocks, block_size, D] float of any strides, at least one row, mutated; rows: [M, D], same dtype;
    slots: int64 [M], flat `block * block_size + offset`, or -1 to skip the row. Nothing else in the cache changes;
    zero rows change nothing. ArgumentError (nothing written) for a slot outside the cache or given twice.
    Gradients reach rows and the cache's former content. Source: spec/v4.md 4.4, 6.5 (rows of bf16).
    """
    target, source = write_targets(slots)
    values = torch.cat([rows, cache[0, :1]])[source]
    own = torch.arange(source.shape[0], device=source.device)
    # a repeated write must not carry its row's gradient twice
    values = torch.where((source == own).unsqueeze(-1), values, values.detach())
    cache.index_put_((target // cache.shape[1], target % cache.shape[1]), values)


@write_cache.shapes
def _(cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> None:
    if cache.shape[0] * cache.shape[1] < 1:
        raise write_cache.reject("cache", f"shape {tuple(cache.shape)}", "at least one row")
    if rows.dtype != cache.dtype:
        raise write_cache.reject("rows", str(rows.dtype), f"{cache.dtype} like the cache")


@write_cache.contents
def _(cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> None:
    check_slots(write_cache, slots, cache.shape[0] * cache.shape[1], unique=True)


def draw_slots(draw: Draw, rows: int, capacity: int, skipped: int) -> torch.Tensor:
    """Distinct slots in random order, int64 [rows], of which `skipped`, the first among them, are -1."""
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
        wide = (draw.normal(4, 64, 512, dtype=dtype), draw.spread(130, 512, dtype=dtype), draw_slots(draw, 130, 256, 9))
        yield Case("512 channels, block 64", profile, wide)
        pages = draw.normal(3, 8, 40, dtype=dtype)[:, ::2, 4:20]
        special = draw.normal(10, 16, dtype=dtype)[::2]
        special[0, 0], special[1, 1], special[2, 2] = float("nan"), float("inf"), -0.0
        yield Case("strided, NaN, infinity, -0", profile, (pages, special, torch.tensor([11, 0, 5, -1, 4])))


def _with_slots(change: Callable[[torch.Tensor, int], torch.Tensor]) -> Callable[..., None]:
    """The reference after `change(slots, capacity)`."""

    def mutant(cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> None:
        write_cache.reference(cache, rows, change(slots, cache.shape[0] * cache.shape[1]))

    return mutant


SLOT_FAULTS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "skipped rows land in slot 0": lambda slots, _: slots.clamp(min=0),
    "skipped rows wrap to the last slot": lambda slots, capacity: slots % capacity,
    "slots shifted by one": lambda slots, capacity: torch.where(slots < 0, slots, (slots + 1) % capacity),
    "slots counted from the end": lambda slots, capacity: torch.where(slots < 0, slots, capacity - 1 - slots),
    "rows in reverse": lambda slots, _: slots.flip(0),
    "last row forgotten": lambda slots, _: torch.cat([slots[:-1], slots[-1:].clamp(max=-1)]),
    "rows packed as if none were skipped": lambda slots, _: slots[slots.lt(0).to(torch.int8).argsort(stable=True)],
}
"""Wrong addressing that fits every write operator: (slots, capacity) -> slots."""

for _name, _change in SLOT_FAULTS.items():
    write_cache.fault(_name)(_with_slots(_change))


@write_cache.fault("block and offset swapped")
def _(cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> None:
    blocks, size = cache.shape[:2]
    swapped = slots % blocks * size + slots // blocks
    write_cache.reference(cache, rows, torch.where(slots < 0, slots, swapped))


@write_cache.fault("added to what was there")
def _(cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> None:
    present = cache.flatten(0, 1)[slots.clamp(min=0)]
    write_cache.reference(cache, rows + present, slots)


@write_cache.fault("rest of the cache cleared")
def _(cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> None:
    write_cache.reference(cache.zero_(), rows, slots)


@write_cache.fault("last channels not written")
def _(cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> None:
    write_cache.reference(cache[..., :-2], rows[..., :-2], slots)


@write_cache.fault("rounded to fp16")
def _(cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> None:
    write_cache.reference(cache, rows.half().to(rows.dtype), slots)


@write_cache.fault("nothing written")
def _(cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> None:
    pass
