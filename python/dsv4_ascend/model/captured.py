"""Decode steps on an NPU as graphs: captured once per number of sequences, then replayed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dsv4_ascend.model.cache import CachedSequence, PagedCache
from dsv4_ascend.model.step import FixedStep, Step, grow, host_step, make_step
from dsv4_ascend.model.transformer import Transformer
from dsv4_backend import dispatch


class CapturedDecode:
    """A step of one token for each of some sequences. Memory of the cache is written by replays."""

    def __init__(self, network: Transformer, cache: PagedCache, host: Step) -> None:
        self._fixed = FixedStep(cache, host)
        self._graph = torch.npu.NPUGraph()  # type: ignore[attr-defined]
        with torch.npu.graph(self._graph):  # type: ignore[attr-defined]
            self._logits = network.logits(network.run_layers(*self._fixed.step))

    def run(self, host: Step) -> torch.Tensor:
        """Logits fp32 [R, V] of another step of as many sequences; the next run overwrites them."""
        self._fixed.put(host)
        self._graph.replay()
        return self._logits


class DecodeGraphs:
    """Captured decode steps by number of sequences.

    The first step of a number runs operator by operator. If launchers ran all of its operators, the
    second is captured; a reference may read values on the host, so such steps are never captured.
    """

    def __init__(self, network: Transformer, cache: PagedCache) -> None:
        self._network, self._cache = network, cache
        self._captured: dict[int, CapturedDecode] = {}
        self._launched: dict[int, bool] = {}

    def logits(
        self, sequences: Sequence[CachedSequence], tokens: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Logits fp32 [R, V] after one more token of every sequence."""
        count = len(sequences)
        if self._launched.get(count) is False:
            return self._eager(make_step(self._cache, sequences, tokens))
        grow(self._cache, sequences, tokens)
        host = host_step(self._cache, sequences, tokens, self._cache.max_tokens)
        if count not in self._launched:
            before = _references()
            logits = self._eager(FixedStep(self._cache, host).step)
            self._launched[count] = _references() == before
            return logits
        if count not in self._captured:
            self._captured[count] = CapturedDecode(self._network, self._cache, host)
        return self._captured[count].run(host)

    def _eager(self, step: Step) -> torch.Tensor:
        return self._network.logits(self._network.run_layers(*step))


def _references() -> int:
    """How often references ran on the device so far."""
    return sum(
        times.get("reference", 0)
        for (_, device), times in dispatch.ran().items()
        if device == "npu"
    )
