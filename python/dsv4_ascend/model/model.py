"""The model as users hold it: `load` a checkpoint,
then `forward` for logits or `generate` for tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsv4_ascend.arguments import (
    MAX_SEED,
    MAX_SIZE,
    MIN_SEED,
    as_list,
    folder_of,
    ids_of,
    integer,
    number,
    sequences_of,
)
from dsv4_ascend.chat.tokenizer import FILE as TOKENIZER
from dsv4_ascend.chat.tokenizer import Tokenizer
from dsv4_ascend.checkpoint.config import V4Config
from dsv4_ascend.checkpoint.folder import open_checkpoint
from dsv4_ascend.checkpoint.kinds import Kinds, declared_kinds
from dsv4_ascend.model.cache import PagedCache
from dsv4_ascend.model.captured import DecodeGraphs
from dsv4_ascend.model.generation import Generator, Sampling, useful_drafts
from dsv4_ascend.model.parallel import ALONE, Parallel
from dsv4_ascend.model.profile import PROFILES, Profile, profile_for, profile_named
from dsv4_ascend.model.prompts import all_results, check_agreement, own_number, own_prompts
from dsv4_ascend.model.sharding import Sharding
from dsv4_ascend.model.step import make_step
from dsv4_ascend.model.transformer import Transformer
from dsv4_ascend.model.weights import assign_all
from dsv4_backend.errors import ArgumentError, EnvironmentFault
from dsv4_backend.support import npu_count, npu_fault

PREFILL_CHUNK = 512
Progress = Callable[[int, int], None]
TokenIds = Sequence[Sequence[int]] | Sequence[int] | torch.Tensor | np.ndarray
"""One sequence of ids or several: lists, integer arrays or tensors [T] or [B, T],
or lists of those.
"""


class Model:
    """A loaded DeepSeek V4.

    `profile` says what is rounded (spec/v4.md 0.4); `dtype` is that of its streams.
    `notes`: what was ignored, set aside or corrected when the checkpoint was opened, one line each.
    """

    def __init__(
        self, network: Transformer, *, device: torch.device, folder: Path | None = None
    ) -> None:
        self.network, self.device, self.folder = network, device, folder
        self.notes: tuple[str, ...] = ()
        self._tokenizer: Tokenizer | None = None
        self.draft_acceptance: float | None = None

    @property
    def config(self) -> V4Config:
        """The checkpoint's configuration."""
        return self.network.config

    @property
    def profile(self) -> Profile:
        """What the network rounds."""
        return self.network.profile

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of streams and activations: torch.float32 in profile `ideal`,
        else torch.bfloat16.
        """
        return self.profile.dtype

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer; CheckpointError if its folder has none."""
        if self._tokenizer is None:
            if self.folder is None:
                raise ArgumentError(
                    "this model was not loaded from a folder, so it has no tokenizer"
                )
            self._tokenizer = Tokenizer.from_folder(self.folder, self.config.bos_token_id)
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        """Whether the checkpoint's folder has a tokenizer;
        without one the model takes and gives token ids.
        """
        return self._tokenizer is not None or (
            self.folder is not None and (self.folder / TOKENIZER).is_file()
        )

    def new_cache(
        self, *, max_sequences: int, max_tokens: int, max_step_tokens: int, block_size: int = 64
    ) -> PagedCache:
        """Paged caches for this model's layers, dtype and device."""
        return PagedCache(
            self.network.share,
            max_sequences=max_sequences,
            max_tokens=max_tokens,
            max_step_tokens=max_step_tokens,
            dtype=self.dtype,
            device=self.device,
            block_size=block_size,
            formats=self.profile.caches,
            joined=self.profile.latents.joined,
        )

    def _check_length(self, tokens: int) -> None:
        limit = self.config.max_position_embeddings
        if tokens > limit:
            raise ArgumentError(
                f"a sequence of {tokens} tokens; this model's max_position_embeddings is {limit}"
            )

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

        input_ids: see `TokenIds`; sequences may differ in length. chunk: length of the prefill
        pieces (default 512).
        decode_from: from that position on, one token at a time. The result does not depend on
        these beyond rounding. ArgumentError for what is no id in [0, vocab_size), and for options
        out of range.
        """
        given = sequences_of("input_ids", input_ids, self.config.vocab_size)
        data = self.network.parallel.data
        prompts = own_prompts(given, data)
        longest = max((len(p) for p in prompts), default=0)
        chunk = None if chunk is None else integer("chunk", chunk, 1)
        decode_from = None if decode_from is None else integer("decode_from", decode_from, 0)
        self._check_length(max((len(p) for p in given), default=0))
        check_agreement((given, chunk, decode_from), self.network.parallel, self.device)
        step = max(1, min(chunk or PREFILL_CHUNK, longest))
        cache = self.new_cache(
            max_sequences=len(prompts),
            max_tokens=max(1, longest),
            max_step_tokens=step,
            block_size=block_size,
        )
        sequences = [cache.new_sequence() for _ in prompts]
        pieces: list[list[torch.Tensor]] = [[] for _ in prompts]
        start = 0
        while start < longest:
            size = step
            if decode_from is not None:
                size = 1 if start >= decode_from else min(step, decode_from - start)
            parts = [p[start : start + size] for p in prompts]
            streams = self.network.run_layers(*make_step(cache, sequences, parts))
            logits = self.network.logits(streams)
            for kept, part in zip(pieces, logits.split([len(p) for p in parts]), strict=True):
                kept.append(part)
            start += size
        self.network.finish()
        empty = torch.zeros(0, self.config.vocab_size, device=self.device)
        if data.size > 1:
            results = [torch.cat([empty, *kept]) for kept in pieces]
            pieces = [[r] for r in all_results(results, len(given), data, empty)]
        return torch.cat([empty, *(part for kept in pieces for part in kept)])

    def stream(
        self,
        prompts: TokenIds,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        draft_tokens: int = 0,
        stop_ids: Collection[int] | None = None,
        eager: bool = False,
    ) -> Iterator[tuple[int, int]]:
        """Yield (prompt number, token id) as they are decided;
        the last one of a prompt is its stop token, if any.

        prompts: see `TokenIds`. temperature 0 is greedy; top_p keeps the smallest set of tokens
        with that probability.
        draft_tokens: drafted per step by the MTP block, as far as max_new_tokens leaves room for
        them (greedy only; the tokens are the same, `draft_acceptance` says how well it went). seed,
        of 64 bits, fixes the noise of each prompt, whatever its mates; in bf16 logits still move
        with the shapes of a batch, by roundings, and a text with them. stop_ids default to the
        config's eos tokens. On an NPU a decode step whose operators all have launchers is captured
        as a graph, with its drafts, one per number of sequences, and replayed, unless there are
        other ranks or `eager`. A rank yields the tokens of its data group's prompts, and reads them
        all: other ranks wait for it. ArgumentError at once names a value that is none of these.
        """
        ids = sequences_of("input_ids", prompts, self.config.vocab_size)
        sampling = Sampling(
            number("temperature", temperature),
            number("top_p", top_p, above=0, high=1),
            integer("seed", seed, MIN_SEED, MAX_SEED),
        )
        max_new_tokens = integer("max_new_tokens", max_new_tokens, 0)
        draft_tokens = integer("draft_tokens", draft_tokens, 0, MAX_SIZE)
        stops = (
            self.config.eos_token_ids
            if stop_ids is None
            else ids_of("stop_ids", stop_ids, self.config.vocab_size)
        )
        return self._stream(ids, sampling, max_new_tokens, draft_tokens, frozenset(stops), eager)

    @torch.inference_mode()
    def _stream(
        self,
        ids: list[list[int]],
        sampling: Sampling,
        max_new_tokens: int,
        draft_tokens: int,
        stops: frozenset[int],
        eager: bool,
    ) -> Iterator[tuple[int, int]]:
        self.draft_acceptance = None
        self._check_length(max((len(p) for p in ids), default=0) + max_new_tokens)
        parallel = self.network.parallel
        options = sampling, max_new_tokens, draft_tokens, sorted(stops)
        check_agreement((ids, options), parallel, self.device)
        ids = own_prompts(ids, parallel.data)
        longest = max((len(p) for p in ids), default=0)
        drafts = useful_drafts(draft_tokens, max_new_tokens)
        cache = self.new_cache(
            max_sequences=len(ids),
            # The last step may verify and draft past the end.
            max_tokens=longest + max_new_tokens + 2 * drafts,
            max_step_tokens=max(1, min(PREFILL_CHUNK, longest), drafts + 1),
        )
        alone = parallel.layout.world == 1
        captured = self.device.type == "npu" and alone and not eager
        generator = Generator(
            self.network,
            cache,
            sampling,
            max_new_tokens=max_new_tokens,
            stop_ids=stops,
            draft_tokens=draft_tokens,
            decoder=DecodeGraphs(self.network, cache) if captured else None,
        )
        for position, token in generator.run(ids):
            yield own_number(position, parallel.data), token
        self.network.finish()
        if generator.drafted:
            self.draft_acceptance = generator.accepted / generator.drafted

    def generate(self, prompts: TokenIds | Sequence[str] | str, **options: Any) -> list[list[int]]:
        """New token ids per prompt, on every rank all of them; options as in `stream`.

        Texts are tokenised with a leading bos, and what they spell is text: give `encode_messages`'
        result, or ids from `tokenizer.encode(text, control=True)`, where control tokens are wanted.
        """
        listed = [prompts] if isinstance(prompts, str) else as_list(prompts)
        if isinstance(listed, list):
            listed = [
                self.tokenizer.encode(p, bos=True) if isinstance(p, str) else p for p in listed
            ]
        ids = sequences_of("input_ids", listed, self.config.vocab_size)
        results: list[list[int]] = [[] for _ in ids]
        for i, token in self.stream(ids, **options):
            results[i].append(token)
        data = self.network.parallel.data
        own = [
            torch.tensor(r, dtype=torch.int64, device=self.device)
            for r in own_prompts(results, data)
        ]
        none = torch.zeros(0, dtype=torch.int64, device=self.device)
        return [r.tolist() for r in all_results(own, len(ids), data, none)]


def chosen_profile(folder: Path, kinds: Kinds, profile: object, dtype: object) -> Profile:
    """The profile of that name, or the one that `dtype` names, or the folder's own, which declares
    `kinds`; ArgumentError if they disagree or are unknown, or do not run what the folder stores.
    """
    stored = set(kinds.values())
    if profile is None and dtype is None:
        return profile_for(stored)
    chosen = _named_profile(profile, dtype)
    if stored and (chosen.storage is None or not chosen.storage.reads(stored)):
        names = " and ".join(sorted(kind.name for kind in stored))
        raise ArgumentError(
            f"profile: found {chosen.name}, but {folder} was converted to {names}, expected "
            f"{profile_for(stored).name} or none; other profiles need the official folder"
        )
    return chosen


def _named_profile(profile: object, dtype: object) -> Profile:
    if dtype is None:
        return profile_named(profile)
    by_dtype = {torch.bfloat16: PROFILES["official"], torch.float32: PROFILES["ideal"]}
    if dtype not in by_dtype:
        raise ArgumentError(
            f"dtype: found {dtype!r}, expected torch.bfloat16 (official) or torch.float32 (ideal)"
        )
    chosen = by_dtype[dtype] if profile is None else profile_named(profile)
    if chosen.dtype != dtype:
        raise ArgumentError(
            f"dtype: found {dtype}, expected {chosen.dtype} or none for profile {chosen.name!r}"
        )
    return chosen


def usable_device(device: str | torch.device, argument: str = "device") -> torch.device:
    """The device, if this process can use it.
    ArgumentError for what is neither cpu nor npu, else EnvironmentFault.

    argument: how messages name it.
    """
    named = re.fullmatch(r"(cpu|npu)(?::(\d{1,4}))?", str(device))
    if named is None:
        raise ArgumentError(
            f"{argument}: found {str(device)!r:.40}, expected cpu or npu, or one by number as npu:0"
        )
    if named[1] == "npu" and 0 < npu_count() <= int(named[2] or 0):
        raise EnvironmentFault(
            f"{argument}: found {device}, expected one of {npu_count()} devices, from npu:0 on"
        )
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise EnvironmentFault(
            f"{argument} {device}: {npu_fault() or str(error).splitlines()[0]}"
        ) from error
    return where


def chip_of(device: torch.device) -> str:
    """The name of an NPU, "" for a CPU."""
    return torch.npu.get_device_name(device) if device.type == "npu" else ""  # type: ignore[attr-defined]


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    profile: str | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    allow_unknown: Collection[str] = (),
    parallel: Parallel = ALONE,
) -> Model:
    """Open a checkpoint folder (official, transformers' or converted) without copying its weights.

    device: where it runs. profile: what is rounded; if neither it nor dtype is given, the one that
    a converted folder is for, `official` for others; dtype names it too: torch.bfloat16 is
    `official`, torch.float32 is `ideal`. `a2a3-int8`, `a2a3-w4a8` and `a5-mx` emulate Ascend
    deployments: official weights are quantised again while loading, one after the other; `bf16`
    widens them instead. progress(bytes done, bytes in all) is called per tensor.
    allow_unknown: fields of the configuration to ignore though they may change what the model
    computes. parallel: the rank's share (`ranks.connected`), of which alone it reads. The model's
    `notes` say what was ignored. CheckpointError and ConfigError list everything that does not fit;
    ArgumentError for another profile or dtype, or a layout in which the model does not run,
    EnvironmentFault for a device that this process does not have.
    """
    folder = folder_of("path", path)
    chosen = chosen_profile(folder, declared_kinds(folder), profile, dtype)
    if not (progress is None or callable(progress)):
        raise ArgumentError(f"progress: found {progress!r:.40}, expected a function or None")
    where = usable_device(device)
    sharding = Sharding(parallel.layout, parallel.rank, chosen, chip_of(where))
    checkpoint = open_checkpoint(folder, allow_unknown=allow_unknown, owner=sharding.owner)
    tensors = sharding.tensors(checkpoint, progress)
    network = Transformer(checkpoint.config, chosen, parallel)
    assign_all(network, tensors, where, checkpoint.kinds)
    model = Model(network, device=where, folder=folder)
    model.notes = checkpoint.notes
    return model
