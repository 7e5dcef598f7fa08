"""Decode steps on an NPU as graphs: captured once per number of sequences and of tokens of each,
then replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol, TypeVar

import torch

from dsv4_ascend.model.cache import CachedSequence, PagedCache
from dsv4_ascend.model.decoding import chained_steps, guess
from dsv4_ascend.model.step import FixedStep, Step, grow, host_step
from dsv4_ascend.model.transformer import Transformer
from dsv4_backend import dispatch
from dsv4_backend.support import queue_mode

_T = TypeVar("_T")
_Shape = tuple[int, ...]


class Run(Protocol):
    """How a function of the device is run: what is called in its place."""

    def __call__(self, function: Callable[[], _T], /) -> Callable[[], _T]:
        """For a function that reads its arguments from buffers."""


def at_once(function: Callable[[], _T]) -> Callable[[], _T]:
    """The function, to be run operator by operator."""
    return function


def captured(function: Callable[[], _T]) -> Callable[[], _T]:
    """The function as a graph; its results are overwritten by the next call."""
    graph = torch.npu.NPUGraph()  # type: ignore[attr-defined]
    with torch.npu.graph(graph):  # type: ignore[attr-defined]
        results = function()

    def replay() -> _T:
        graph.replay()
        return results

    return replay


class FixedDecode:
    """A step of new tokens of some sequences and the drafts after it, in buffers that others of the
    same shapes can be put into. Memory of the cache is written by every run.

    run: `at_once`, for this step alone, or `captured`.
    """

    def __init__(self, network: Transformer, cache: PagedCache, host: Step, run: Run) -> None:
        self._network, self._cache, self._run = network, cache, run
        self._fixed = FixedStep(cache, host)
        self._forward = run(self._layers)
        self._guess: Callable[[], torch.Tensor] | None = None

    def put(self, host: Step) -> None:
        """Have the values of another step."""
        self._fixed.put(host)

    def logits(self) -> torch.Tensor:
        """Fp32 [T, V]."""
        self._streams, logits = self._forward()
        return logits

    def drafts(
        self, next_ids: Sequence[int], rows: Sequence[int], chained: Sequence[Step]
    ) -> torch.Tensor:
        """Drafts int64 [R, 1 + steps of `chained`], as `decoding.guess`, of the step that ran last.

        chained: steps on the host.
        """
        given = torch.tensor([*next_ids, *rows])
        if self._guess is None:
            self._given = given.to(self._cache.device)
            self._chain = [FixedStep(self._cache, host) for host in chained]
            self._guess = self._run(self._guesses)
        else:
            self._given.copy_(given)
            for fixed, host in zip(self._chain, chained, strict=True):
                fixed.put(host)
        return self._guess()

    def _layers(self) -> tuple[torch.Tensor, torch.Tensor]:
        streams = self._network.run_layers(*self._fixed.step)
        return streams, self._network.logits(streams)

    def _guesses(self) -> torch.Tensor:
        ids, rows = self._given.tensor_split([len(self._streams)])
        chained = [fixed.step for fixed in self._chain]
        return guess(self._network, self._fixed.step, self._streams, ids, rows, chained)


class DecodeGraphs:
    """Decode steps (`decoding.Decoder`) captured by the tokens of each sequence in a step.

    The first step of such a shape runs operator by operator, and its drafts do. If launchers ran
    all of its operators, the second is captured; a reference may read values on the host, so such
    steps are never captured, and none is where torch_npu refuses to: with TASK_QUEUE_ENABLE=2.
    """

    def __init__(self, network: Transformer, cache: PagedCache) -> None:
        self._network, self._cache = network, cache
        self._captured: dict[_Shape, FixedDecode] = {}
        self._launched: dict[_Shape, bool] = {}
        self._shape: _Shape = ()

    def logits(
        self,
        sequences: Sequence[CachedSequence],
        tokens: Sequence[Sequence[int]] | Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """See `decoding.Decoder`; the next step overwrites them."""
        ids = [torch.as_tensor(t, dtype=torch.int64, device="cpu") for t in tokens]
        self._shape = tuple(map(len, ids))
        host = self._grown(sequences, ids)
        known = self._captured.get(self._shape)
        if known is not None:
            known.put(host)
            self._step = known
        elif self._launched.get(self._shape) and queue_mode() != "2":
            self._step = FixedDecode(self._network, self._cache, host, captured)
            self._captured[self._shape] = self._step
        else:
            self._step = FixedDecode(self._network, self._cache, host, at_once)
        with self._watched():
            return self._step.logits()

    def drafts(
        self,
        sequences: Sequence[CachedSequence],
        next_ids: Sequence[int],
        rows: Sequence[int],
        count: int,
    ) -> list[list[int]]:
        """See `decoding.Decoder`."""
        chained = chained_steps(self._cache, sequences, count, partial(self._grown, sequences))
        with self._watched():
            drafts: list[list[int]] = self._step.drafts(next_ids, rows, chained).tolist()
            return drafts

    def _grown(self, sequences: Sequence[CachedSequence], ids: Sequence[torch.Tensor]) -> Step:
        """The step of new tokens of every sequence, on the host."""
        grow(self._cache, sequences, ids)
        return host_step(self._cache, sequences, ids, self._bound(sequences))

    def _bound(self, sequences: Sequence[CachedSequence]) -> int:
        """What lengths are at most: of every step that may be captured, else of this one."""
        if self._launched.get(self._shape) is False:
            return max(sequence.length for sequence in sequences)
        return self._cache.max_tokens

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Remember of a step's shape whether launchers alone run here."""
        before = _references()
        yield
        launched = self._launched.get(self._shape, True)
        self._launched[self._shape] = launched and _references() == before


def _references() -> int:
    """How often references ran on the device so far."""
    return sum(
        times.get("reference", 0)
        for (_, device), times in dispatch.ran().items()
        if device == "npu"
    )
