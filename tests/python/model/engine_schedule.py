"""Random schedules that a fake engine and our own cache run side by side, compared bit for bit."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from fake_engine import FakeEngine, Request, Work
from torch.nn.functional import pad

from dsv4_ascend.model.cache import CachedSequence, PagedCache
from dsv4_ascend.model.model import Model
from dsv4_ascend.model.step import Step, make_step


class Difference(AssertionError):
    """The engine's step gave other bits than our own cache."""


class WideCache(PagedCache):
    """Tables of entries as wide as an engine's: sums over a longer list may round otherwise."""

    def block_tables(self, sequences: list[CachedSequence], tokens: int) -> dict[str, torch.Tensor]:
        tables = super().block_tables(sequences, tokens)
        for name, group in self.groups.items():
            if group.ring_rows is None:
                missing = group.columns(self.max_tokens, self.block_size) - tables[name].shape[1]
                tables[name] = pad(tables[name], (0, missing), value=-1)
        return tables


class Twin:
    """The same steps over our own cache; a shared prefix is a copy here."""

    def __init__(self, model: Model, max_tokens: int, step_tokens: int, block_size: int) -> None:
        self.network = model.network
        self.cache = WideCache(
            model.config,
            max_sequences=40,
            max_tokens=max_tokens,
            max_step_tokens=step_tokens,
            dtype=model.dtype,
            block_size=block_size,
        )

    def copy(self, source: CachedSequence) -> CachedSequence:
        """A sequence with the same rows in blocks of its own."""
        copied, cache = self.cache.new_sequence(), self.cache
        while copied.length < source.length:
            cache.grow(copied, min(cache.max_step_tokens, source.length - copied.length))
        for pools in cache.pools:
            for group, pages, *_ in pools.values():
                count = len(copied.blocks[group])
                pages[copied.blocks[group]] = pages[source.blocks[group][:count]]
        return copied

    @torch.inference_mode()
    def step(
        self,
        sequences: list[CachedSequence],
        work: list[Work],
        empty: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Streams of the layers and of the MTP block."""
        absent = [self.cache.new_sequence() for _ in range(empty)]
        tokens = [item.ids for item in work] + [[] for _ in absent]
        batch, layers = make_step(self.cache, [*sequences, *absent], tokens)
        step = Step(replace(batch, max_seq_len=None), layers)
        streams = self.network.run_layers(*step)
        next_ids = torch.tensor([i for item in work for i in item.next_ids])
        return streams, self.network.run_mtp(0, next_ids, streams, *step)


class Prefix(NamedTuple):
    """The first tokens of a text, ready to be continued."""

    ids: list[int]
    request: Request
    own: CachedSequence


@dataclass
class Live:
    """A text on its way through both caches."""

    text: list[int]
    request: Request
    own: CachedSequence
    logits: dict[int, torch.Tensor] = field(default_factory=dict)

    def rest(self) -> int:
        return len(self.text) - 1 - self.request.computed


@dataclass
class Schedule:
    """Texts in random chunks, at most three at a time, with rejected drafts and prefix hits.

    The first text is alone until its first prefix can be shared, if blocks ever end together.
    """

    engine: FakeEngine
    twin: Twin
    rng: random.Random
    tolerance: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    prefixes: list[Prefix] = field(default_factory=list)

    def run(self, texts: list[list[int]]) -> list[Live]:
        """All texts, all tokens but the last; Difference if any step differs."""
        waiting, live, done = list(texts), [], []
        while waiting or live:
            if waiting and len(live) < 3 and (not live or self._joins()):
                live.append(self._start(waiting.pop(0)))
            some = [item for item in live if self.rng.random() < 0.8] or live[:1]
            self._step(some)
            for item in some:
                self._publish(item)
                if not item.rest():
                    live.remove(item)
                    done.append(item)
                    self.engine.release(item.request)
                    self.twin.cache.free(item.own)
        return done

    def _joins(self) -> bool:
        shared = self.prefixes or self.engine.granularity >= self.engine.max_tokens
        return bool(shared) and self.rng.random() < 0.6

    def _start(self, text: list[int]) -> Live:
        fitting = [p for p in self.prefixes if p.ids == text[:-2][: len(p.ids)]]
        if not fitting:
            return Live(text, self.engine.new_request(), self.twin.cache.new_sequence())
        best = max(fitting, key=lambda prefix: len(prefix.ids))
        self.counts["hits"] += 1
        return Live(text, self.engine.new_request(best.request), self.twin.copy(best.own))

    def _publish(self, item: Live) -> None:
        ids = item.text[: item.request.computed]
        if self.engine.shareable(len(ids)) and ids not in [prefix.ids for prefix in self.prefixes]:
            prefix = self.engine.prefix_of(item.request)
            self.prefixes.append(Prefix(ids, prefix, self.twin.copy(item.own)))

    def _chunk(self, item: Live) -> tuple[Work, int]:
        """The next tokens of a text, and how many of them are drafts that will be rejected."""
        at, most = item.request.computed, min(item.rest(), self.twin.cache.max_step_tokens)
        size, boundary = self.rng.randint(1, most), -at % self.engine.granularity
        to_boundary = 0 < boundary <= most and (not self.prefixes or self.rng.random() < 0.5)
        size = boundary if to_boundary else size
        rejected = self.rng.randrange(size) if not to_boundary and self.rng.random() < 0.4 else 0
        end = at + size - rejected
        drafts = self._drafts(rejected + 1)
        ids = item.text[at:end] + drafts[1:]
        return Work(item.request, ids, item.text[at + 1 : end + 1] + drafts[:rejected]), rejected

    def _drafts(self, count: int) -> list[int]:
        return [self.rng.randrange(self.engine.model.config.vocab_size) for _ in range(count)]

    def _step(self, items: list[Live]) -> None:
        chunks = [self._chunk(item) for item in items]
        work = [item for item, _ in chunks]
        streams, drafted, empty = self.engine.step(work)
        wanted = self.twin.step([item.own for item in items], work, empty)
        for got, want in zip((streams, drafted), wanted, strict=True):
            self._compare(got, want)
        logits = self.engine.model.network.logits(streams[: len(wanted[0])])
        self.counts.update(steps=1, rejected=sum(rejected for _, rejected in chunks))
        for item, (part, rejected) in zip(items, chunks, strict=True):
            kept = len(part.ids) - rejected
            own, logits = logits[: len(part.ids)], logits[len(part.ids) :]
            item.logits |= {item.request.computed + i: own[i] for i in range(kept)}
            item.request.computed += kept
            self.twin.cache.rollback(item.own, rejected)

    def _compare(self, got: torch.Tensor, want: torch.Tensor) -> None:
        tokens, padding = got[: len(want)], got[len(want) :]
        equal = torch.equal(tokens, want)
        if self.tolerance:
            equal = torch.allclose(tokens, want, rtol=self.tolerance, atol=self.tolerance)
        if not equal or padding.any():
            raise Difference(f"step {self.counts['steps']} of {len(want)} tokens")
