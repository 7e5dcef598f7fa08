"""What a conversion costs: errors of weights, and perplexity before and after."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from dsv4_ascend.chat.tokenizer import FILE as TOKENIZER
from dsv4_ascend.checkpoint.folder import open_checkpoint
from dsv4_ascend.checkpoint.writing import as_json
from dsv4_ascend.convert.comparison import Comparison, Errors, compare
from dsv4_ascend.convert.folders import QUALITY, refused, write_file
from dsv4_ascend.model.model import load
from dsv4_ascend.tiny.corpus import encode_documents, read_corpus
from dsv4_ascend.tiny.release import WINDOW, perplexity
from dsv4_backend.errors import ArgumentError

TOKENS = 40960
"""Held-out tokens of the standard library's text, as in the README's table."""
_WORST = 5
_COPIES = 3
"""Bytes that loading and running a folder may take, as a multiple of its weights'."""


@dataclass(frozen=True)
class Perplexities:
    """Held-out perplexity per token of the source and of the result, in their own profiles."""

    tokens: int
    before: float
    before_profile: str
    after: float
    after_profile: str


@dataclass(frozen=True)
class Quality:
    """Errors of the result's weights against the source's, and perplexities, or why not."""

    compared: Comparison
    perplexities: Perplexities | None
    without: str = ""

    def as_json(self) -> dict[str, object]:
        """What is saved beside the result; tensors that are not named have the same values."""
        return {
            "errors": {name: e.as_json() for name, e in self.compared.by_class.items()},
            "worst": {name: e.as_json() for name, e in self.worst()},
            "tensors": {name: e.as_json() for name, e in self.compared.other_values.items()},
            "perplexity": vars(self.perplexities) if self.perplexities else self.without,
        }

    def worst(self) -> list[tuple[str, Errors]]:
        """The tensors with the largest relative rms errors, the worst first."""
        listed = sorted(self.compared.other_values.items(), key=lambda pair: -pair[1].rms)
        return listed[:_WORST]


def quality(
    source: Path, folder: Path, profile: str | None = None, tokens: int = TOKENS
) -> Quality:
    """Compare a finished conversion with its source, and save what was found in it.

    profile: in which the result runs, its own if None. tokens: how many the perplexities are over,
    0 for none. CheckpointError if a folder does not open, or the disk refuses.
    """
    compared = compare(source, folder)
    without = _not_wanted(tokens) or _cannot_run(source, folder)
    found = None if without else _perplexities(source, folder, profile, tokens)
    result = Quality(compared, found, without)
    try:
        write_file(folder / QUALITY, as_json(result.as_json()))
    except OSError as error:
        raise refused(folder, error) from None
    return result


def _not_wanted(tokens: int) -> str:
    if tokens == 0:
        return "not wanted"
    few = f"{tokens} tokens wanted, expected 0 or at least a window of {WINDOW}"
    return few if tokens < WINDOW else ""


def _cannot_run(source: Path, folder: Path) -> str:
    """Why perplexity cannot be had here, "" if it can."""
    if not (folder / TOKENIZER).is_file():
        return f"no {TOKENIZER}"
    needed = _COPIES * max(open_checkpoint(path).nbytes for path in (source, folder))
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free:
        return f"{needed / 1e9:.1f} GB of memory needed, {free / 1e9:.1f} GB free"
    return ""


def _perplexities(source: Path, folder: Path, profile: str | None, tokens: int) -> Perplexities:
    before, after = load(source), load(folder, profile=profile)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER))
    stream = encode_documents(tokenizer, read_corpus().held_out)
    stream = stream[: tokens // WINDOW * WINDOW + 1]
    if len(stream) <= WINDOW:
        raise ArgumentError(f"the held-out text has {len(stream)} tokens of this model")
    return Perplexities(
        len(stream) - 1,
        perplexity(before, stream),
        before.profile.name,
        perplexity(after, stream),
        after.profile.name,
    )
