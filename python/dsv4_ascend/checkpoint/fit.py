"""Whether stored tensors are those of a layout: one line for each that is missing,
surplus or of another form.
"""

from __future__ import annotations

from collections.abc import Iterator

from dsv4_ascend.checkpoint.layout import Entry, Layout
from dsv4_ascend.checkpoint.sources import Source, Sources


def misfits(sources: Sources, entries: Layout, complete: bool) -> Iterator[str]:
    """Missing (only if every shard could be read: else it would bury the cause),
    mis-typed, mis-shaped, surplus.
    """
    for name, entry in entries.items():
        source = sources.get(name)
        if source is not None:
            yield from _misfit(name, source, entry.dtypes, entry.stored_shape(source.dtype))
            yield from _scale_misfit(name, source, entry, sources, complete)
        elif complete:
            yield f"tensor '{name}' is missing: expected {' or '.join(entry.dtypes)} {entry.shape}"
    yield from _mixed_experts(sources, entries)
    yield from _surplus(sources, entries)


def _scale_misfit(
    name: str, weight: Source, entry: Entry, sources: Sources, complete: bool
) -> Iterator[str]:
    shape = entry.scale_shape(weight.dtype) if weight.dtype in entry.dtypes else None
    if shape is None or entry.scale_name is None:
        return
    scale = sources.get(entry.scale_name)
    if scale is not None:
        yield from _misfit(entry.scale_name, scale, entry.scale_dtypes, shape)
    elif complete:
        yield (
            f"{weight.describe(name)}: found {weight.dtype} "
            f"without its scale '{entry.scale_name}' {shape}"
        )


def _mixed_experts(sources: Sources, entries: Layout) -> Iterator[str]:
    """The experts of one layer run as one grouped product, so they share a format."""
    formats: dict[str, set[str]] = {}
    for name, entry in entries.items():
        if ".ffn.experts." in name and name in sources and sources[name].dtype in entry.dtypes:
            form = entry.form(sources[name].dtype)
            formats.setdefault(name.split(".experts.")[0], set()).add(form)
    for layer, dtypes in formats.items():
        if len(dtypes) > 1:
            yield (
                f"{layer}.experts: found {' and '.join(sorted(dtypes))} mixed, expected one format "
                "per layer"
            )


def _surplus(sources: Sources, entries: Layout) -> Iterator[str]:
    # The scale of a float weight has no meaning; that of a missing or mis-typed weight is not one
    # more problem.
    scales = {
        entry.scale_name
        for name, entry in entries.items()
        if name not in sources
        or sources[name].dtype not in entry.dtypes
        or entry.scale_shape(sources[name].dtype)
    }
    for name, source in sources.items():
        if name not in entries and name not in scales:
            yield f"{source.describe(name)}: surplus: the configuration has no such tensor"


def _misfit(
    name: str, source: Source, dtypes: tuple[str, ...], shape: tuple[int, ...]
) -> Iterator[str]:
    if source.dtype not in dtypes:
        yield f"{source.describe(name)}: found dtype {source.dtype}, expected {' or '.join(dtypes)}"
    elif source.shape != shape:
        yield (
            f"{source.describe(name)}: found shape {source.shape}, "
            f"expected {shape} for {source.dtype}"
        )
