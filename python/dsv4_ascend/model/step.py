"""One step over our own cache. What follows from lengths and tables alone is computed on the host
and sent to the device in one copy per dtype, so that a device computes nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch.nn.functional import pad

from dsv4_ascend.model.batch import Batch, Compressed, build_batch
from dsv4_ascend.model.cache import CachedSequence, PagedCache
from dsv4_ascend.model.joined import Buffer, Joined
from dsv4_ascend.model.paged import LayerCache
from dsv4_ascend.model.rotary import Rotation
from dsv4_backend.dispatch import Derived

Values = Mapping[str, torch.Tensor]
_T = TypeVar("_T")
_ALIGNED = 128  # 512 bytes, as the device's allocator aligns tensors
_DTYPES = torch.int64, torch.int32, torch.float32


class Step(NamedTuple):
    """A step over a `PagedCache`: its batch, and the caches of all blocks, MTP blocks last."""

    batch: Batch
    layers: list[LayerCache]


def make_step(
    cache: PagedCache,
    sequences: Sequence[CachedSequence],
    tokens: Sequence[Sequence[int]] | Sequence[torch.Tensor],
) -> Step:
    """Grow every sequence by its tokens (possibly none). Nothing is written to the cache tensors.

    tokens: per sequence the new token ids. ArgumentError (from the cache) when there is no room.
    """
    ids = [torch.as_tensor(t, dtype=torch.int64, device="cpu") for t in tokens]
    grow(cache, sequences, ids)
    longest = max([0, *(s.length for s in sequences)])
    host = host_step(cache, sequences, ids, longest)
    return host if cache.device.type == "cpu" else FixedStep(cache, host).step


def grow(
    cache: PagedCache, sequences: Sequence[CachedSequence], tokens: Sequence[torch.Tensor]
) -> None:
    """Make room for the new tokens of every sequence."""
    for sequence, new in zip(sequences, tokens, strict=True):
        cache.grow(sequence, len(new))


def host_step(
    cache: PagedCache,
    sequences: Sequence[CachedSequence],
    tokens: Sequence[torch.Tensor],
    max_seq_len: int,
) -> Step:
    """The step of sequences that hold these tokens already, on the host but for the pages.

    max_seq_len: what lengths are at most; tables reach it.
    """
    lengths = torch.tensor([0, *(len(new) for new in tokens)])
    batch = build_batch(
        torch.cat([*tokens, torch.zeros(0, dtype=torch.int64)]),
        lengths.cumsum(0).int(),
        torch.tensor([s.length for s in sequences], dtype=torch.int32),
        num_actual_tokens=int(lengths.sum()),
        max_query_len=int(lengths.max()),
        max_seq_len=max_seq_len,
    )
    return Step(batch, cache.layers(cache.block_tables(sequences, max_seq_len)))


class FixedStep:
    """A step on the cache's device, in buffers that other steps of the same shapes can be put into.

    step: what the network takes; `put` changes what it says, not where it is.
    """

    def __init__(self, cache: PagedCache, host: Step) -> None:
        self._cache = cache
        values = _values(cache, host)
        self._buffers = {of: _packed(values, of).to(cache.device) for of in _DTYPES}
        views = _views(self._buffers, values)
        self.step = self._on_device(host.batch, views)
        rope, turns = cache.config.qk_rope_head_dim, self._buffers[torch.float32]
        if cache.joined and _ALIGNED % rope == 0:
            joined = Joined(_joined_buffers(cache), views, turns.view(-1, rope))
            self.step.batch.know_derived(joined.derived)

    def put(self, host: Step) -> None:
        """Have the values of another step of the same shapes."""
        values = _values(self._cache, host)
        for of, buffer in self._buffers.items():
            buffer.copy_(_packed(values, of))

    def _on_device(self, host: Batch, values: Values) -> Step:
        of_batch: dict[str, Any] = {name: values[name] for name in _OF_BATCH}
        batch = replace(host, **of_batch)
        for ratio in _one_of_each_kind(self._cache):
            batch.know_rotation(ratio, _fields(Rotation, values, str(ratio)))
        batch.know_derived(lambda: _derived_lengths(self._cache, values))
        layers = self._cache.layers({name: values[f"table {name}"] for name in self._cache.groups})
        for name, part in self._cache.parts_by_group(layers).items():
            group = self._cache.groups[name]
            if group.ring_rows is None:
                batch.know_entry_rotation(group.ratio, _fields(Rotation, values, name))
                entries = _fields(Compressed, values, name)
                batch.know_entries(part, group.ratio, values[f"slots {name}"], entries)
            elif f"slots {name}" in values:
                batch.know_tokens(part, values[f"slots {name}"])
        return Step(batch, layers)


def _derived_lengths(
    cache: PagedCache, values: Values
) -> Iterator[tuple[Derived, list[torch.Tensor]]]:
    """Of the step's sequences, as launchers look for them."""
    lengths = values["query_start_loc"], values["seq_lens"]
    yield Derived("tokens before", lengths), [values["tokens before"]]
    count, device = values["count of all rows"], cache.device.index or 0
    yield Derived("count of all rows", (), [len(values["input_ids"]), device]), [count]
    for name, group in cache.groups.items():
        if group.ring_rows is None:
            yield Derived("slots in int32", (values[f"slots {name}"],)), [values[f"short {name}"]]
    for ratio in filter(None, cache.frequencies):
        both = [values[f"{field} {ratio}"] for field in _ENTRY_LENGTHS]
        yield Derived("entry lengths", lengths[1:], [ratio]), both


def _joined_buffers(cache: PagedCache) -> list[Buffer]:
    """Every buffer that launchers of a layer turn at once, each kind of layer once."""
    config, buffers = cache.config, []
    kinds = _one_of_each_kind(cache)
    for kind, ratio in dict.fromkeys(zip(config.layer_kinds, config.compress_ratios, strict=True)):
        alike = next(known for known in kinds if (known > 0) == (ratio > 0))
        tokens = f"cos {alike}", f"sin {alike}"
        entries = (f"cos entries:{ratio}", f"sin entries:{ratio}") if ratio else None
        heads = config.num_attention_heads
        buffers.append(Buffer("joined rotation", heads, tokens, entries, keys=True))
        if kind == "csa":
            name, heads = "joined rotation of the indexer", config.index_n_heads
            buffers.append(Buffer(name, heads, tokens, entries, keys=False))
    return buffers


_ENTRY_LENGTHS = "entries held", "tokens behind"
_OF_BATCH = ("input_ids", "query_start_loc", "seq_lens", "owners", "positions")


def _values(cache: PagedCache, host: Step) -> Values:
    """All index values of a step by name, on the host."""
    batch = host.batch
    values = {name: getattr(batch, name) for name in _OF_BATCH}
    values["tokens before"] = batch.seq_lens - batch.query_start_loc.diff()
    values["count of all rows"] = torch.tensor([len(batch.input_ids)])
    for ratio in filter(None, cache.frequencies):
        both = batch.seq_lens // ratio, batch.seq_lens % ratio
        values |= {f"{field} {ratio}": v for field, v in zip(_ENTRY_LENGTHS, both, strict=True)}
    for ratio in _one_of_each_kind(cache):
        turns = batch.rotation(ratio, cache.frequencies[ratio])._asdict()
        values |= {f"{field} {ratio}": rows for field, rows in turns.items()}
    for name, part in cache.parts_by_group(host.layers).items():
        group = cache.groups[name]
        values[f"table {name}"] = part.table
        if group.ring_rows is None:
            values[f"slots {name}"] = batch.entry_slots(part, group.ratio)
            values[f"short {name}"] = values[f"slots {name}"].int()
            entries = batch.compressed(group.ratio)._asdict()
            turns = batch.entry_rotation(group.ratio, cache.frequencies[group.ratio])._asdict()
            values |= {f"{field} {name}": value for field, value in (entries | turns).items()}
        elif part is host.layers[0].window:
            values[f"slots {name}"] = batch.token_slots(part)
    return values


def _one_of_each_kind(cache: PagedCache) -> list[int]:
    """A ratio of layers with entries, which rotate alike, and 0 where there are layers without."""
    return list({ratio > 0: ratio for ratio in cache.frequencies}.values())


def _fields(of: type[_T], values: Values, owner: str) -> _T:
    """A tuple of tensors whose fields were named "field owner"."""
    return of(*(values[f"{field} {owner}"] for field in of._fields))  # type: ignore[attr-defined]


def _packed(values: Values, of: torch.dtype) -> torch.Tensor:
    """All values of one dtype behind each other, each from a multiple of `_ALIGNED` elements on."""
    parts = (pad(v.flatten(), (0, -v.numel() % _ALIGNED)) for v in _of(values, of).values())
    return torch.cat([torch.zeros(0, dtype=of), *parts])


def _views(buffers: Mapping[torch.dtype, torch.Tensor], values: Values) -> Values:
    """The places in the buffers where `_packed` puts the values."""
    views: dict[str, torch.Tensor] = {}
    for of, buffer in buffers.items():
        named = _of(values, of)
        start = 0
        for name, value in named.items():
            views[name] = buffer[start : start + value.numel()].view(value.shape)
            start += value.numel() + -value.numel() % _ALIGNED
    return views


def _of(values: Values, dtype: torch.dtype) -> Values:
    return {name: value for name, value in values.items() if value.dtype == dtype}
