"""The model as users hold it: `load` a checkpoint, then `forward` for logits or `generate` for tokens."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsv4_ascend.model.batch import make_batch
from dsv4_ascend.model.cache import PagedCache
from dsv4_ascend.model.checkpoint import open_checkpoint
from dsv4_ascend.model.config import V4Config
from dsv4_ascend.model.generation import Generator, Sampling
from dsv4_ascend.model.tokenizer import Tokenizer
from dsv4_ascend.model.transformer import Transformer
from dsv4_ascend.model.weights import assign_all
from dsv4_backend.errors import ArgumentError, EnvironmentFault
from dsv4_backend.support import npu_fault

PROFILE_DTYPES = {"ideal": torch.float32, "official": torch.bfloat16}
PREFILL_CHUNK = 512
Progress = Callable[[int, int], None]
TokenIds = Sequence[Sequence[int]] | Sequence[int] | torch.Tensor | np.ndarray
"""One sequence of ids or several: lists, integer arrays or tensors [T] or [B, T], or lists of those."""


class Model:
    """A loaded DeepSeek V4.

    dtype decides the conformance profile (spec/v4.md 0.4): torch.bfloat16 is `official`, torch.float32 is `ideal`.
    """

    def __init__(
        self, network: Transformer, *, device: torch.device, dtype: torch.dtype, folder: Path | None = None
    ) -> None:
        _check_dtype(dtype)
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
            self._tokenizer = Tokenizer.from_folder(self.folder, self.config.bos_token_id)
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

    def _check_length(self, tokens: int) -> None:
        limit = self.config.max_position_embeddings
        if tokens > limit:
            raise ArgumentError(f"a sequence of {tokens} tokens; this model's max_position_embeddings is {limit}")

    @torch.inference_mode()
    def forward(
        self,
        input_ids: TokenIds,
        *,
        chunk: int | None = None,
        decode_from: int | None = None,
        block_size: int = 64,
    ) -> torch.Tensor:
        """Logits of every token: fp32 `[T, vocab]`, sequences one after another (spec/v4.md 2.1).

        input_ids: see `TokenIds`; sequences may differ in length. chunk: length of the prefill pieces (default 512).
        decode_from: from that position on, one token at a time. The result does not depend on these beyond rounding.
        ArgumentError for what is no id in [0, vocab_size), and for options out of range.
        """
        prompts = _as_sequences(input_ids, self.config.vocab_size)
        longest = max((len(p) for p in prompts), default=0)
        if chunk is not None and chunk < 1:
            raise ArgumentError(f"chunk: found {chunk}, expected at least 1")
        if decode_from is not None and decode_from < 0:
            raise ArgumentError(f"decode_from: found {decode_from}, expected at least 0")
        self._check_length(longest)
        step = max(1, min(chunk or PREFILL_CHUNK, longest))
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
        prompts: TokenIds,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        draft_tokens: int = 0,
        stop_ids: frozenset[int] | None = None,
    ) -> Iterator[tuple[int, int]]:
        """Yield (prompt number, token id) as they are decided; the last one of a prompt is its stop token, if any.

        prompts: see `TokenIds`. temperature 0 is greedy; top_p keeps the smallest set of tokens with that probability.
        draft_tokens: drafted per step by the MTP block (greedy only; the tokens are the same, `draft_acceptance` says
        how well it went). seed fixes the noise of each prompt, whatever its mates; in bf16 logits still move with the
        shapes of a batch, by roundings, and a text with them. stop_ids default to the config's eos tokens.
        """
        ids = _as_sequences(prompts, self.config.vocab_size)
        self.draft_acceptance = None
        longest = max((len(p) for p in ids), default=0)
        self._check_length(longest + max_new_tokens)
        cache = self.new_cache(
            max_sequences=len(ids),
            max_tokens=longest + max_new_tokens + 2 * draft_tokens,  # the last step may verify and draft past the end
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
        yield from generator.run(ids)
        if generator.drafted:
            self.draft_acceptance = generator.accepted / generator.drafted

    def generate(self, prompts: TokenIds | Sequence[str] | str, **options: Any) -> list[list[int]]:
        """New token ids per prompt (texts are tokenised with a leading bos); options as in `stream`."""
        listed = [prompts] if isinstance(prompts, str) else _listed(prompts)
        if isinstance(listed, list):
            listed = [self.tokenizer.encode(p, bos=True) if isinstance(p, str) else p for p in listed]
        ids = _as_sequences(listed, self.config.vocab_size)
        results: list[list[int]] = [[] for _ in ids]
        for i, token in self.stream(ids, **options):
            results[i].append(token)
        return results


def _as_sequences(input_ids: object, vocab_size: int) -> list[list[int]]:
    rows = _listed(input_ids)
    if not isinstance(rows, list):
        raise ArgumentError(f"input_ids: found {rows!r:.40}, expected token ids")
    rows = [_listed(row) for row in rows]
    if rows and not any(isinstance(row, list) for row in rows):
        rows = [rows]
    for number, row in enumerate(rows):
        if not isinstance(row, list):
            raise ArgumentError(f"input_ids: found {row!r:.40} as sequence {number}, expected a list of token ids")
    return [[_token(id_, number, at, vocab_size) for at, id_ in enumerate(row)] for number, row in enumerate(rows)]


def _listed(value: Any) -> Any:
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return value.tolist()
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else value


def _token(value: Any, sequence: int, position: int, vocab_size: int) -> int:
    try:
        token = operator.index(value)
    except TypeError:
        token = -1
    if isinstance(value, bool) or not 0 <= token < vocab_size:
        where = f"in sequence {sequence} at {position}"
        raise ArgumentError(f"input_ids: found {value!r:.40} {where}, expected an id in [0, {vocab_size})")
    return token


def _check_dtype(dtype: object) -> None:
    if dtype not in PROFILE_DTYPES.values():
        raise ArgumentError(f"dtype: found {dtype!r}, expected torch.bfloat16 (official) or torch.float32 (ideal)")


def usable_device(device: str | torch.device, argument: str = "device") -> torch.device:
    """The device, if this process can use it. ArgumentError for what is neither cpu nor npu, else EnvironmentFault.

    argument: how messages name it.
    """
    if str(device).split(":")[0] not in ("cpu", "npu"):
        raise ArgumentError(f"{argument}: found {str(device)!r}, expected cpu or npu")
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise EnvironmentFault(f"{argument} {device}: {npu_fault() or str(error).splitlines()[0]}") from error
    return where


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress | None = None,
) -> Model:
    """Open a checkpoint folder (official or transformers layout) without copying its weights.

    device: where it runs. dtype: torch.bfloat16 for profile `official`, torch.float32 for `ideal`.
    progress(bytes done, bytes in all) is called per tensor. CheckpointError and ConfigError list everything that does
    not fit; ArgumentError for another dtype, EnvironmentFault for a device that this process does not have.
    """
    _check_dtype(dtype)
    where = usable_device(device)
    checkpoint = open_checkpoint(path)
    network = assign_all(Transformer(checkpoint.config), checkpoint.tensors(progress), where)
    return Model(network, device=where, dtype=dtype, folder=Path(path))
