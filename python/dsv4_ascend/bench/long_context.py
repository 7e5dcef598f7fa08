"""Suite `long-context`: attention operators of one CSA and one HCA layer against the context."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dsv4_ascend.bench.contexts import (
    Pages,
    Queries,
    attention,
    index_arguments,
    index_queries,
    queries,
    window_pages,
)
from dsv4_ascend.bench.dimensions import Dimensions
from dsv4_ascend.bench.machine import memory
from dsv4_ascend.bench.sections import Section, seconds
from dsv4_ascend.bench.timing import Timing, interleaved

CONTEXTS = tuple(n << 10 for n in (1, 16, 64, 256, 1024))
_PARTS = "indexer", "csa", "hca"
_STATUS, _REFERENCES = "/proc/self/status", Path("/proc/self/clear_refs")
_FORGET_PEAK = "5"
"""What resets VmHWM, by proc(5)."""


@dataclass(frozen=True)
class Growth:
    """One context. Timings of one token; growth: to the shortest context in the same run.

    csa_peak, hca_peak: bytes that a chunk of tokens takes beyond weights, caches and queries; None
    where the system does not tell.
    """

    context: int
    indexer: Timing
    csa: Timing
    hca: Timing
    csa_growth: float
    hca_growth: float
    csa_peak: int | None
    hca_peak: int | None


class _Layers:
    """Caches of the longest context, of which shorter ones see the first rows."""

    def __init__(self, of: Dimensions, longest: int) -> None:
        last = longest + of.chunk
        self.of, self.window = of, window_pages(of, of.chunk)
        self.keys = Pages.random(last // of.csa_ratio, of.index_dim, of.block)
        self.entries = Pages.random(last // of.csa_ratio, of.head_dim, of.block)
        self.pooled = Pages.random(last // of.hca_ratio, of.head_dim, of.block)
        self.q = queries(of, of.chunk, longest).q
        index, self.weights = index_queries(of, of.chunk, longest)
        self.index_q = index.q

    def indexer(self, tokens: int, context: int) -> Callable[[], torch.Tensor]:
        """Scores and choice of the last tokens."""
        q, ratio = Queries(self.index_q[:tokens], context), self.of.csa_ratio
        arguments = index_arguments(q, self.weights[:tokens], self.keys, ratio)
        choose = torch.ops.dsv4.indexer_topk
        return lambda: choose(*arguments, self.of.selected)

    def attend(self, tokens: int, context: int, chosen: torch.Tensor | None) -> Any:
        """CSA over chosen entries, HCA over all."""
        q = Queries(self.q[:tokens], context)
        entries = self.pooled if chosen is None else self.entries
        return torch.ops.dsv4.sparse_attention(*attention(q, self.window, entries, chosen, self.of))


def long_context(
    rounds: int, of: Dimensions | None = None, contexts: tuple[int, ...] = CONTEXTS
) -> list[Growth]:
    """Peak memory of a chunk for every context; then one token, all in one interleaved run."""
    of = of or Dimensions()
    torch.manual_seed(0)
    with torch.inference_mode():
        layers = _Layers(of, max(contexts))
        peaks = _peaks(layers, contexts)
        calls: dict[tuple[int, str], Callable[[], object]] = {}
        for context in contexts:
            calls[context, "indexer"] = index = layers.indexer(1, context)
            chosen = index()
            calls[context, "csa"] = partial(layers.attend, 1, context, chosen)
            calls[context, "hca"] = partial(layers.attend, 1, context, None)
        timings = interleaved(calls, rounds)

    def growth(context: int) -> Growth:
        index, csa, hca = (timings[context, part] for part in _PARTS)
        first = {part: timings[contexts[0], part].median for part in _PARTS}
        csa_growth = (index.median + csa.median) / (first["indexer"] + first["csa"])
        hca_growth = hca.median / first["hca"]
        return Growth(context, index, csa, hca, csa_growth, hca_growth, *peaks[context])

    return [growth(context) for context in contexts]


def _peaks(layers: _Layers, contexts: tuple[int, ...]) -> dict[int, tuple[int | None, int | None]]:
    """Of CSA and HCA, the shortest context first: what kernels keep counts for longer ones too."""
    tokens = layers.of.chunk
    layers.attend(1, contexts[0], layers.indexer(1, contexts[0])())  # code and threads are there
    _give_back()
    before = memory("VmRSS", _STATUS)

    def csa(context: int) -> None:
        layers.attend(tokens, context, layers.indexer(tokens, context)())

    def hca(context: int) -> None:
        layers.attend(tokens, context, None)

    return {
        context: (_peak(partial(csa, context), before), _peak(partial(hca, context), before))
        for context in contexts
    }


def _peak(run: Callable[[], object], before: int) -> int | None:
    """Bytes of memory that a call had at once beyond `before`."""
    _give_back()
    try:
        _REFERENCES.write_text(_FORGET_PEAK)
    except OSError:
        before = 0
    run()
    most = memory("VmHWM", _STATUS)
    return max(0, most - before) if before and most else None


def _give_back() -> None:
    """Return memory that nobody holds to the system: calls would be given it unseen."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def section(rows: list[Growth]) -> Section:
    """The table."""
    return Section(
        "Long context: attention operators of one layer at Flash dimensions",
        (
            "context",
            "indexer",
            "CSA attention",
            "CSA growth",
            "HCA attention",
            "HCA growth",
            "CSA peak",
            "HCA peak",
        ),
        [
            [
                f"{row.context >> 10}k" if row.context < 1 << 20 else f"{row.context >> 20}M",
                seconds(row.indexer.median),
                seconds(row.csa.median),
                f"{row.csa_growth:.1f}",
                seconds(row.hca.median),
                f"{row.hca_growth:.1f}",
                _megabytes(row.csa_peak),
                _megabytes(row.hca_peak),
            ]
            for row in rows
        ],
        (
            "times of one token, medians; growth: to the shortest context in the same run, of CSA"
            " that of indexer and attention together; caches are warm where they fit",
            f"peak: resident memory of a chunk of {Dimensions.chunk} tokens beyond weights, caches"
            " and queries (scores, results and scratch), - where the system does not tell",
        ),
    )


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:,.0f} MB"
