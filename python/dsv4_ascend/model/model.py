"""The model as users hold it: `load` a checkpoint, then `forward` for logits or `generate` for tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dsv4_ascend.model.batch import make_batch
from dsv4_ascend.model.cache import PagedCache
from dsv4_ascend.model.checkpoint import open_checkpoint
from dsv4_ascend.model.config import V4Config
from dsv4_ascend.model.generation import Generator, Sampling
from dsv4_ascend.model.tokenizer import Tokenizer
from dsv4_ascend.model.transformer import Transformer
from dsv4_ascend.model.weights import assign_all
from dsv4_backend.errors import ArgumentError

PROFILE_DTYPES = {"ideal": torch.float32, "official": torch.bfloat16}
PREFILL_CHUNK = 512
Progress = Callable[[int, int], None]


class Model:
    """A loaded DeepSeek V4.

    dtype decides the conformance profile (spec/v4.md 0.4): torch.bfloat16 is `official`, torch.float32 is `ideal`.
    """

    def __init__(
        self, network: Transformer, *, device: torch.device, dtype: torch.dtype, folder: Path | None = None
    ) -> None:
        if dtype not in PROFILE_DTYPES.values():
            raise ArgumentError(f"dtype: found {dtype}, expected torch.bfloat16 (official) or torch.float32 (ideal)")
        self.network, self.device, self.dtype, self.folder = network, device, dtype, folder
        self._tokenizer: Tokenizer | None = None
        self.draft_acceptance: float | None = None

    @property
    def config(self) -> V4Config:
        """The checkpoint's configuration."""
        return self.network.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer; CheckpointError if its folder has none."""
        if self._tokenizer is None:
            if self.folder is None:
                raise ArgumentError("this model was not loaded from a folder, so it has no tokenizer")
            self._tokenizer = Tokenizer.from_folder(self.folder)
        return self._tokenizer

    def new_cache(
        self, *, max_sequences: int, max_tokens: int, max_step_tokens: int, block_size: int = 64
    ) -> PagedCache:
        """Paged caches for this model's layers, dtype and device."""
        return PagedCache(
            self.config,
            max_sequences=max_sequences,
            max_tokens=max_tokens,
            max_step_tokens=max_step_tokens,
            dtype=self.dtype,
            device=self.device,
            block_size=block_size,
        )

    @torch.inference_mode()
    def forward(
        self,
        input_ids: Sequence[Sequence[int]] | Sequence[int] | torch.Tensor,
        *,
        chunk: int | None = None,
        decode_from: int | None = None,
        block_size: int = 64,
    ) -> torch.Tensor:
        """Logits of every token: fp32 `[T, vocab]`, sequences one after another (spec/v4.md 2.1).

        input_ids: one sequence, or several of any lengths. chunk: prefill in pieces of that many tokens (default 512).
        decode_from: from that position on, one token at a time. The result does not depend on these beyond rounding.
        """
        prompts = _as_sequences(input_ids)
        longest = max((len(p) for p in prompts), default=0)
        step = max(1, min(chunk or PREFILL_CHUNK, longest))
        if (chunk is not None and chunk < 1) or (decode_from is not None and decode_from < 0):
            raise ArgumentError(f"chunk {chunk} must be >= 1 and decode_from {decode_from} >= 0")
        cache = self.new_cache(
            max_sequences=len(prompts), max_tokens=max(1, longest), max_step_tokens=step, block_size=block_size
        )
        sequences = [cache.new_sequence() for _ in prompts]
        pieces: list[list[torch.Tensor]] = [[] for _ in prompts]
        start = 0
        while start < longest:
            size = step
            if decode_from is not None:
                size = 1 if start >= decode_from else min(step, decode_from - start)
            parts = [p[start : start + size] for p in prompts]
            batch = make_batch(cache, sequences, parts)
            logits = self.network.logits(self.network.run_layers(batch, cache, self.dtype))
            for kept, part in zip(pieces, logits.split([len(p) for p in parts]), strict=True):
                kept.append(part)
            start += size
        empty = torch.zeros(0, self.config.vocab_size, device=self.device)
        return torch.cat([empty, *(part for kept in pieces for part in kept)])

    @torch.inference_mode()
    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        draft_tokens: int = 0,
        stop_ids: frozenset[int] | None = None,
    ) -> Iterator[tuple[int, int]]:
        """Yield (prompt number, token id) as they are decided. stop_ids default to the config's eos tokens."""
        longest = max((len(p) for p in prompts), default=0)
        cache = self.new_cache(
            max_sequences=len(prompts),
            max_tokens=longest + max_new_tokens + draft_tokens,
            max_step_tokens=max(1, min(PREFILL_CHUNK, longest), draft_tokens + 1),
        )
        generator = Generator(
            self.network,
            cache,
            self.dtype,
            Sampling(temperature, top_p, seed),
            max_new_tokens=max_new_tokens,
            stop_ids=frozenset(self.config.eos_token_ids) if stop_ids is None else stop_ids,
            draft_tokens=draft_tokens,
        )
        yield from generator.run(prompts)
        if generator.drafted:
            self.draft_acceptance = generator.accepted / generator.drafted

    def generate(self, prompts: Sequence[Sequence[int]] | Sequence[int] | str, **options: Any) -> list[list[int]]:
        """New token ids per prompt (text is tokenised with a leading bos); options as in `stream`."""
        ids = [self.tokenizer.encode(prompts, bos=True)] if isinstance(prompts, str) else _as_sequences(prompts)
        results: list[list[int]] = [[] for _ in ids]
        for i, token in self.stream(ids, **options):
            results[i].append(token)
        return results


def _as_sequences(input_ids: Sequence[Sequence[int]] | Sequence[int] | torch.Tensor) -> list[list[int]]:
    ids: list[Any] = input_ids.tolist() if isinstance(input_ids, torch.Tensor) else list(input_ids)
    return [ids] if ids and isinstance(ids[0], int) else [list(p) for p in ids]


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress | None = None,
) -> Model:
    """Open a checkpoint folder (official or transformers layout) without copying its weights.

    device: where it runs. dtype: torch.bfloat16 for profile `official`, torch.float32 for `ideal`.
    progress(done, total) is called per tensor. CheckpointError and ConfigError list everything that does not fit.
    """
    checkpoint = open_checkpoint(path)
    where = torch.device(device)
    network = assign_all(Transformer(checkpoint.config), checkpoint.tensors(progress), where)
    return Model(network, device=where, dtype=dtype, folder=Path(path))
