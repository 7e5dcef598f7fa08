"""Sizes of DeepSeek V4-Flash that operators are measured at."""

from __future__ import annotations

from dataclasses import dataclass

OTHERS = 4 << 30
"""Bytes that suite `ops` takes beside its experts: 3 GB seen with caches of 32 MiB."""


@dataclass(frozen=True)
class Dimensions:
    """Flash (spec/v4.md 1), but for the number of experts, which memory decides.

    many, few, rows: numbers of tokens of products and attention, of calls over long contexts,
    and of operators on rows.
    """

    hidden: int = 4096
    intermediate: int = 2048
    experts: int = 32
    chosen: int = 6
    heads: int = 64
    head_dim: int = 512
    rope: int = 64
    groups: int = 8
    rank: int = 1024
    window: int = 128
    selected: int = 512
    index_heads: int = 64
    index_dim: int = 128
    index_keys: int = 250_000
    context: int = 1 << 20
    csa_ratio: int = 4
    hca_ratio: int = 128
    streams: int = 4
    sinkhorn: int = 20
    chunk: int = 512
    block: int = 64
    many: tuple[int, ...] = (1, 8, 64, 512)
    few: tuple[int, ...] = (1, 8)
    rows: tuple[int, ...] = (1, 512)

    @property
    def suite_bytes(self) -> int:
        """Memory that suite `ops` takes: w1 of all experts as FP4 with its scales, and as the bf16
        and fp32 of torch's products; `OTHERS` for the rest.
        """
        values = self.experts * self.intermediate * self.hidden
        return OTHERS + values // 2 + values // 32 + 2 * values + 4 * values

    @property
    def beside_bytes(self) -> int:
        """Memory that it takes beside another engine: w1, w3 and w2 as FP4, ours and the engine's,
        which packs them once more; `OTHERS` for the rest of either.
        """
        values = 3 * self.experts * self.intermediate * self.hidden
        return 2 * OTHERS + 3 * (values // 2 + values // 32)
