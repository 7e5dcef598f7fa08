"""What the parts of a layer's cache keep: the geometry that our own cache and engines share.

Source: spec/v4.md 4.8, 4.3.1 (position-addressed state).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from dsv4_ascend.checkpoint.config import V4Config
from dsv4_ascend.model.paged import ByteRows, CacheFormats


class PartRows(NamedTuple):
    """One part. name: the field of `LayerCache`. tokens: per row. kept: how many tokens it keeps,
    the newest among them; None: all. width, dtype: of a row, bytes of uint8 if `rows` says what
    they hold, in blocks of one row.
    """

    name: str
    tokens: int
    kept: int | None
    width: int
    dtype: torch.dtype
    rows: ByteRows | None = None


def state_tokens(kind: str, ratio: int) -> int:
    """Tokens that a compressor's state keeps: those of the open entry, with overlap of the one
    before it too.
    """
    return (2 if kind == "csa" else 1) * ratio


def layer_parts(
    kind: str, ratio: int, config: V4Config, formats: CacheFormats, dtype: torch.dtype
) -> Iterator[PartRows]:
    """The parts of a layer. dtype: of rows as they are read; formats: in which bytes they are kept.

    config: as this rank's attention has it; caches are whole on every rank.
    """

    def stored(name: str, tokens: int, kept: int | None) -> PartRows:
        keys = name == "index_keys"
        form = formats.index_keys if keys else formats.latent
        channels = config.index_head_dim if keys else config.head_dim
        if form is None:
            return PartRows(name, tokens, kept, channels, dtype)
        rope, read_as = (
            (0, torch.float32) if keys else (config.qk_rope_head_dim, formats.latent_dtype(dtype))
        )
        rows = ByteRows(form, 1, channels, rope, read_as)
        return PartRows(name, tokens, kept, rows.layout.page_bytes(1), torch.uint8, rows)

    yield stored("window", 1, config.sliding_window)
    if kind == "swa":
        return
    kept = state_tokens(kind, ratio)
    width = 2 * kept // ratio * config.head_dim
    yield stored("entries", ratio, None)
    yield PartRows("state", 1, kept, width, torch.float32)
    if kind == "csa":
        yield stored("index_keys", ratio, None)
        yield PartRows("index_state", 1, kept, 4 * config.index_head_dim, torch.float32)
