"""Generation over a ragged batch: chunked prefill, decode,
and speculative decode with the MTP block. spec/v4.md 8.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from dsv4_ascend.model.cache import CachedSequence, PagedCache
from dsv4_ascend.model.decoding import Decoder, EagerDecoder, drafts_after
from dsv4_ascend.model.step import Step, make_step
from dsv4_ascend.model.transformer import Transformer
from dsv4_backend.errors import ArgumentError, UnsupportedError
from dsv4_backend.ops.sampling import sample


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_p keeps the smallest set of tokens with that probability.

    seed fixes the noise of every prompt, whatever else is in the batch. Only the noise: logits
    depend on the shapes of a batch by roundings, which in bf16 turn close choices. So equal prompts
    get equal texts in equal batches.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def useful_drafts(draft_tokens: int, max_new_tokens: int) -> int:
    """Drafts per step,
    without those that no run could keep: a step decides one token beside its drafts.
    """
    return max(0, min(draft_tokens, max_new_tokens - 1))


@dataclass
class _Request:
    """A sequence being generated: `pending` is sampled but not yet in the cache,
    `drafts` are guesses after it.
    """

    index: int
    prompt: list[int]
    cached: CachedSequence
    produced: int = 0
    pending: int = -1
    drafts: list[int] = field(default_factory=list)
    noise: torch.Generator = field(default_factory=torch.Generator)


class Generator:
    """Generates for a list of prompts in lockstep. One instance is one run over one cache.

    draft_tokens > 0 drafts that many tokens per step with the MTP block and verifies them in one
    call; greedy only, the output equals plain decoding. Drafts beyond max_new_tokens are not made.
    `accepted` and `drafted` count how well that went. decoder: what runs decode steps over the
    cache; None runs them operator by operator.
    """

    def __init__(
        self,
        network: Transformer,
        cache: PagedCache,
        sampling: Sampling,
        *,
        max_new_tokens: int,
        stop_ids: frozenset[int],
        draft_tokens: int = 0,
        decoder: Decoder | None = None,
    ) -> None:
        if draft_tokens and network.config.dspark is not None:
            raise UnsupportedError(
                "draft_tokens: drafting with DSpark is not implemented; use draft_tokens 0"
            )
        if draft_tokens and not len(network.mtp):
            raise ArgumentError("draft_tokens: this checkpoint has no MTP block to draft with")
        if draft_tokens and sampling.temperature > 0:
            raise ArgumentError("draft_tokens: speculative decoding is greedy; use temperature 0")
        self.network, self.cache, self.sampling = network, cache, sampling
        self.max_new_tokens, self.stop_ids = max_new_tokens, stop_ids
        self.draft_tokens = useful_drafts(draft_tokens, max_new_tokens)
        self.drafted = self.accepted = 0
        self._decoder = decoder or EagerDecoder(network, cache)

    def run(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
        """Yield (prompt number, token) as tokens are decided; the prefill runs before the first."""
        requests = [_Request(i, list(p), self.cache.new_sequence()) for i, p in enumerate(prompts)]
        for request in requests:
            request.noise.manual_seed(self.sampling.seed)
        if any(not r.prompt for r in requests):
            raise ArgumentError("generate: a prompt has no tokens; start it with the bos token")
        active = requests if self.max_new_tokens > 0 else []
        yield from self._emit(active, self._prefill(active))
        while active := self._keep(active):
            yield from self._emit(active, self._decode(active))

    def _keep(self, requests: list[_Request]) -> list[_Request]:
        done = [
            r for r in requests if r.produced >= self.max_new_tokens or r.pending in self.stop_ids
        ]
        for request in done:
            self.cache.free(request.cached)
        return [r for r in requests if r not in done]

    def _emit(self, requests: list[_Request], tokens: list[list[int]]) -> Iterator[tuple[int, int]]:
        for request, new in zip(requests, tokens, strict=True):
            for token in new:
                if request.produced >= self.max_new_tokens or request.pending in self.stop_ids:
                    break
                request.produced += 1
                request.pending = token
                yield request.index, token

    def _sample(self, requests: list[_Request], logits: torch.Tensor) -> list[int]:
        """One token per row; each request draws from its own noise, whatever its mates draw."""
        noise = torch.ones(logits.shape)
        if self.sampling.temperature > 0:
            for row, request in zip(noise, requests, strict=True):
                row.exponential_(generator=request.noise)
        return sample(
            logits, noise.to(logits.device), self.sampling.temperature, self.sampling.top_p
        ).tolist()

    def _step(self, requests: list[_Request], tokens: list[list[int]]) -> tuple[Step, torch.Tensor]:
        step = make_step(self.cache, [r.cached for r in requests], tokens)
        return step, self.network.run_layers(*step)

    def _prefill(self, requests: list[_Request]) -> list[list[int]]:
        """All prompts in chunks; the result is each prompt's first new token."""
        first: dict[int, int] = {}
        size = self.cache.max_step_tokens
        for start in range(0, max((len(r.prompt) for r in requests), default=0), size):
            chunk = [r for r in requests if len(r.prompt) > start]
            step, streams = self._step(chunk, [r.prompt[start : start + size] for r in chunk])
            last = step.batch.last_rows
            ended = [i for i, r in enumerate(chunk) if len(r.prompt) <= start + size]
            if ended:
                logits = self.network.logits(streams[last[ended]])
                sampled = self._sample([chunk[i] for i in ended], logits)
                first.update(
                    {chunk[i].index: token for i, token in zip(ended, sampled, strict=True)}
                )
            after = start + 1
            follow = [
                [*r.prompt[after : after + size], first.get(r.index, -1)][:size] for r in chunk
            ]
            self._draft(chunk, step, streams, follow, last.tolist())
        return [[first[r.index]] for r in requests]

    def _decode(self, requests: list[_Request]) -> list[list[int]]:
        """One step: feed pending tokens with their drafts, keep what the main model agrees with."""
        cached = [r.cached for r in requests]
        fed = [[r.pending, *r.drafts] for r in requests]
        logits = self._decoder.logits(cached, fed)
        rows = [r for r, tokens in zip(requests, fed, strict=True) for _ in tokens]
        decided = self._sample(rows, logits)
        results, kept_rows = [], []
        start = 0
        for request, tokens in zip(requests, fed, strict=True):
            true = decided[start : start + len(tokens)]
            agreed = 0
            while agreed < len(request.drafts) and request.drafts[agreed] == true[agreed]:
                agreed += 1
            self.drafted += len(request.drafts)
            self.accepted += agreed
            self.cache.rollback(request.cached, len(request.drafts) - agreed)
            results.append(true[: agreed + 1])
            kept_rows.append(start + agreed)
            start += len(tokens)
        if self.draft_tokens:
            drafts = self._decoder.drafts(cached, decided, kept_rows, self.draft_tokens)
            keep_drafts(requests, drafts)
        return results

    def _draft(
        self,
        requests: list[_Request],
        step: Step,
        streams: torch.Tensor,
        follow: list[list[int]],
        rows: list[int],
    ) -> None:
        """Run the MTP block over a step of a prefill whose rows are followed by `follow`,
        and draft after each row in `rows`.
        """
        if not self.draft_tokens:
            return
        cached, next_ids = [r.cached for r in requests], [t for tokens in follow for t in tokens]
        given = cached, step, streams, next_ids, rows, self.draft_tokens
        keep_drafts(requests, drafts_after(self.network, self.cache, *given))


def keep_drafts(requests: list[_Request], drafts: list[list[int]]) -> None:
    """Give each request its drafts, for the next step to verify."""
    for request, guesses in zip(requests, drafts, strict=True):
        request.drafts = guesses
