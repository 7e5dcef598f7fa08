"""A scheduler over the fake engine: continuous batches of requests that come, are cut into chunks,
preempted, cancelled, continued from common prefixes and drafted for, as engines do it.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from fake_engine import FakeEngine, Ran, Work
from fake_engine import Request as Blocks


class Wanted(NamedTuple):
    """A prompt, the greedy text that has to follow it, and drafts per step."""

    prompt: list[int]
    text: list[int]
    drafts: int


@dataclass
class Live:
    """A request: the ids that are decided, its blocks, and drafts that nobody has verified."""

    wanted: Wanted
    known: list[int]
    blocks: Blocks
    drafts: list[int] = field(default_factory=list)

    @property
    def missing(self) -> int:
        return len(self.wanted.prompt) + len(self.wanted.text) - len(self.known)


@dataclass
class Server:
    """Serves requests; `texts` are those of the ones that were not cancelled, by number."""

    engine: FakeEngine
    rng: random.Random
    step_tokens: int
    upset: float = 0.0
    texts: dict[int, list[int]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    _prefixes: list[tuple[list[int], Blocks]] = field(default_factory=list)

    def serve(self, requests: list[Wanted]) -> dict[int, list[int]]:
        """The texts of all requests that nobody cancelled."""
        waiting, live = list(enumerate(requests)), {}
        while waiting or live:
            while waiting and (not live or self.rng.random() < 0.5):
                number, wanted = waiting.pop(0)
                live[number] = Live(wanted, list(wanted.prompt), self.engine.new_request())
                self._start(live[number])
            self._upset(live)
            if live:
                self._step([one for one in live.values() if self.rng.random() < 0.9][:4])
            for number in [n for n, one in live.items() if not one.missing]:
                done = live.pop(number)
                self.texts[number] = done.known[len(done.wanted.prompt) :]
                self.engine.release(done.blocks)
        return self.texts

    def _start(self, one: Live) -> None:
        fitting = [p for p in self._prefixes if p[0] == one.known[:-1][: len(p[0])]]
        if fitting:
            self.counts["hits"] += 1
            one.blocks = self.engine.new_request(max(fitting, key=lambda p: len(p[0]))[1])

    def _upset(self, live: dict[int, Live]) -> None:
        """Preempt or cancel a request: the first begins again with all that it knows."""
        if not live or self.rng.random() >= self.upset:
            return
        number = self.rng.choice(list(live))
        self.engine.release(live[number].blocks)
        if self.rng.random() < 0.3:
            self.counts["cancelled"] += 1
            del live[number]
            return
        self.counts["preempted"] += 1
        live[number].blocks, live[number].drafts = self.engine.new_request(), []
        self._start(live[number])

    def _chunk(self, one: Live) -> Work:
        at = one.blocks.computed
        whole = one.known[at:] + one.drafts
        size = min(len(whole), self.rng.choice([self.step_tokens, self.rng.randint(1, 9)]))
        if at + size < len(one.known):
            boundary = -at % self.engine.granularity
            size = boundary if 0 < boundary <= self.step_tokens and boundary < size else size
        one.drafts = whole[:size][len(one.known) - at :]
        return Work(one.blocks, whole[:size], [])

    def _step(self, some: list[Live]) -> None:
        if not some:
            return
        work = [self._chunk(one) for one in some]
        ahead = max(one.wanted.drafts for one in some)
        ran = self.engine.run(work, ahead)
        with torch.inference_mode():
            logits = self.engine.model.network.logits(ran.batch.own_rows(ran.streams))
        best = logits.argmax(-1).tolist()
        ended, rows, next_ids, start = [], [], [], 0
        for one, item in zip(some, work, strict=True):
            at, size = one.blocks.computed, len(item.ids)
            true = best[start : start + size]
            reached, rejected = at + size >= len(one.known), 0
            if reached:
                rejected = self._decide(one, true[len(one.known) - at - 1 :])
                ended.append(one)
                rows.append(start + size - rejected - 1)
            one.blocks.computed += size - rejected
            follow = one.known[at + 1 : at + 1 + size]
            next_ids += follow + [0] * (size - len(follow))
            start += size
            self._publish(one)
        self.counts.update(steps=1)
        if ahead:
            self._draft(ended, rows, ran, next_ids)

    def _decide(self, one: Live, true: list[int]) -> int:
        """Take what the layers agree with, and one more; how many drafts were wrong."""
        agreed = 0
        while agreed < len(one.drafts) and one.drafts[agreed] == true[agreed]:
            agreed += 1
        rejected = len(one.drafts) - agreed
        self.counts.update(accepted=agreed, rejected=rejected)
        one.known += true[: min(agreed + 1, one.missing)]
        one.drafts = []
        return rejected

    def _publish(self, one: Live) -> None:
        ids = one.known[: one.blocks.computed]
        shareable = len(ids) == one.blocks.computed and self.engine.shareable(len(ids))
        if shareable and ids not in [known for known, _ in self._prefixes]:
            self._prefixes.append((ids, self.engine.prefix_of(one.blocks)))

    def _draft(self, ended: list[Live], rows: list[int], ran: Ran, next_ids: list[int]) -> None:
        """MTP over the whole step, then again for every further draft."""
        network = self.engine.model.network
        streams = self.engine.draft(ran, next_ids)[rows]
        for number in range(max((one.wanted.drafts for one in ended), default=0)):
            with torch.inference_mode():
                guesses = network.logits(streams, depth=0).argmax(-1).tolist()
            for one, guess in zip(ended, guesses, strict=True):
                if number < one.wanted.drafts:
                    one.drafts.append(guess)
            lengths = [one.blocks.computed + number + 1 for one in ended]
            if number + 1 < max(one.wanted.drafts for one in ended):
                chained = self.engine.chained([one.blocks for one in ended], lengths, streams)
                streams = self.engine.draft(chained, guesses)[: len(ended)]
