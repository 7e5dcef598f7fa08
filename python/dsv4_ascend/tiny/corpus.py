"""Text that every machine has:
the sources and documentation strings of the Python standard library.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
SPECIAL_TOKENS = (BOS, EOS, "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "｜DSML｜")
_LEFT_OUT = {
    "site-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "encodings",
    "ensurepip",
    "__pycache__",
}
_HELD_OUT_ONE_IN = 20


@dataclass(frozen=True)
class Corpus:
    """Documents by path; `train` and `held_out` are disjoint files."""

    train: list[str]
    held_out: list[str]
    digest: str


def read_corpus() -> Corpus:
    """The standard library's .py files,
    split by a hash of their path: one file in 20 is held out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    train: list[str] = []
    held_out: list[str] = []
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _LEFT_OUT & set(relative.parts):
            continue
        text = path.read_text(encoding="utf-8", errors="strict") if _is_utf8(path) else ""
        digest.update(text.encode())
        fate = int(hashlib.sha256(relative.as_posix().encode()).hexdigest(), 16) % _HELD_OUT_ONE_IN
        (held_out if fate == 0 else train).append(text)
    return Corpus([t for t in train if t], [t for t in held_out if t], digest.hexdigest())


def _is_utf8(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True


def train_tokenizer(documents: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE whose first ids are the special tokens (bos 0, eos 1, as in the release)."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode_documents(tokenizer: tokenizers.Tokenizer, documents: list[str]) -> torch.Tensor:
    """All documents as one int64 stream, each starting with bos."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(documents, add_special_tokens=False):
        ids += [0, *encoding.ids]
    return torch.tensor(ids)


def ngram_perplexities(
    train: torch.Tensor, held_out: torch.Tensor, vocab_size: int
) -> tuple[float, float]:
    """Held-out perplexity per token of a unigram and of an interpolated bigram model,
    both counted on `train`.
    """
    unigram = torch.bincount(train, minlength=vocab_size).double() + 1
    unigram /= unigram.sum()
    pairs = torch.bincount(train[:-1] * vocab_size + train[1:], minlength=vocab_size**2).double()
    pairs = pairs.view(vocab_size, vocab_size)
    weight = 0.9 * (pairs.sum(1, keepdim=True) > 0)
    bigram = weight * pairs / pairs.sum(1, keepdim=True).clamp(min=1) + (1 - weight) * unigram
    return (
        float(torch.exp(-unigram[held_out[1:]].log().mean())),
        float(torch.exp(-bigram[held_out[:-1], held_out[1:]].log().mean())),
    )
