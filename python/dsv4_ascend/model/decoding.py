"""One decode step at a time: logits of new tokens, then drafts after those that were kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol

import torch

from dsv4_ascend.model.cache import CachedSequence, PagedCache
from dsv4_ascend.model.step import Step, make_step
from dsv4_ascend.model.transformer import Transformer


class Decoder(Protocol):
    """What runs decode steps over a cache."""

    def logits(
        self, sequences: Sequence[CachedSequence], tokens: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """Logits fp32 [T, V] of new tokens of every sequence, which grows by them."""

    def drafts(
        self,
        sequences: Sequence[CachedSequence],
        next_ids: Sequence[int],
        rows: Sequence[int],
        count: int,
    ) -> list[list[int]]:
        """`count` drafts per sequence after the step that `logits` ran last.

        next_ids: T ids, of the token after each of the step's tokens. rows: the row of the last
        token that each sequence keeps; it is rolled back to that one already, and is as long
        afterwards.
        """


class EagerDecoder:
    """Decode steps operator by operator."""

    def __init__(self, network: Transformer, cache: PagedCache) -> None:
        self._network, self._cache = network, cache
        self._step: Step | None = None

    def logits(
        self, sequences: Sequence[CachedSequence], tokens: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """See `Decoder`."""
        self._step = make_step(self._cache, sequences, tokens)
        self._streams = self._network.run_layers(*self._step)
        return self._network.logits(self._streams)

    def drafts(
        self,
        sequences: Sequence[CachedSequence],
        next_ids: Sequence[int],
        rows: Sequence[int],
        count: int,
    ) -> list[list[int]]:
        """See `Decoder`."""
        assert self._step is not None
        step, streams = self._step, self._streams
        return drafts_after(
            self._network, self._cache, sequences, step, streams, next_ids, rows, count
        )


def drafts_after(
    network: Transformer,
    cache: PagedCache,
    sequences: Sequence[CachedSequence],
    step: Step,
    streams: torch.Tensor,
    next_ids: Sequence[int],
    rows: Sequence[int],
    count: int,
) -> list[list[int]]:
    """`Decoder.drafts` after a step that gave `streams`, operator by operator."""
    ids, kept = (torch.tensor(given, device=streams.device) for given in (next_ids, rows))
    chained = chained_steps(cache, sequences, count, partial(make_step, cache, sequences))
    guesses: list[list[int]] = guess(network, step, streams, ids, kept, chained).tolist()
    return guesses


def chained_steps(
    cache: PagedCache,
    sequences: Sequence[CachedSequence],
    count: int,
    make: Callable[[list[torch.Tensor]], Step],
) -> list[Step]:
    """The steps of one token each in which the drafts after the first are made; sequences are as
    long afterwards as before. Their ids are those of drafts, which nobody knows yet: 0.

    make: the step of new tokens of every sequence, which grows by them.
    """
    unknown = [torch.zeros(1, dtype=torch.int64)] * len(sequences)
    steps = [make(unknown) for _ in range(count - 1)]
    for sequence in sequences:
        cache.rollback(sequence, count - 1)
    return steps


def guess(
    network: Transformer,
    step: Step,
    streams: torch.Tensor,
    next_ids: torch.Tensor,
    rows: torch.Tensor,
    chained: Iterable[Step],
) -> torch.Tensor:
    """Drafts int64 [R, 1 + steps of `chained`]; nothing is read on the host.

    streams [T, n, d] of `step`, next_ids int64 [T] after its tokens, rows int64 [R] to draft after.
    """
    streams = network.run_mtp(0, next_ids, streams, *step).index_select(0, rows)
    guesses = [network.logits(streams, depth=0).argmax(-1)]
    for one in chained:
        streams = network.run_mtp(0, guesses[-1], streams, *one)
        guesses.append(network.logits(streams, depth=0).argmax(-1))
    return torch.stack(guesses, 1)
