"""Proof of DSpark's Markov head (spec/v4.md 13.1): cases, oracle, named faults."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dsv4_backend.contract import Case, Draw
from dsv4_backend.ops.dspark import markov_bias
from dsv4_backend.proofs.numerics import Array, wide

_DTYPES = {"ideal": torch.float32, "official": torch.bfloat16}
_SHAPES = ((0, 5, 3), (1, 1, 1), (3, 7, 5), (5, 131, 33), (6, 1000, 256))


@markov_bias.oracle
def _(logits: Array, previous: Array, markov_w1: Array, markov_w2: Array) -> Array:
    biased = wide(logits)
    for token, before in enumerate(previous):
        for rank in range(markov_w1.shape[1]):
            biased[token] += float(markov_w1[before, rank]) * wide(markov_w2[:, rank])
    return biased


@markov_bias.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in _DTYPES.items():
        for tokens, vocab, rank in _SHAPES:
            logits, previous = draw.normal(tokens, vocab), draw.integers(tokens, high=vocab)
            w1, w2 = _weights(draw, vocab, rank, dtype)
            yield Case(f"{tokens}x{vocab}x{rank}", profile, (logits, previous, w1, w2))
        high = torch.tensor([65535, 65536, 65540, 0])
        yield Case(
            "ids around 2^16",
            profile,
            (draw.normal(4, 65541), high, *_weights(draw, 65541, 2, dtype)),
        )
        w1, w2 = (w[:, ::2] for w in _weights(draw, 16, 24, dtype))
        logits = draw.normal(3, 32)[:, ::2]
        strided = (logits, draw.integers(6, high=16)[::2], w1, w2)
        yield Case("strided, rank 12", profile, strided)
        w1, w2 = draw.uniform(9, 4, low=0.1, dtype=dtype), draw.uniform(9, 4, low=0.1, dtype=dtype)
        logits = draw.normal(5, 9)
        w1[1, 2], w1[2, 0], w1[3], w2[8] = float("nan"), float("inf"), 0.0, 0.0
        logits[0, 4], logits[4] = float("-inf"), 0.0
        special = (logits, torch.tensor([0, 1, 2, 3, 4]), w1, w2)
        yield Case("NaN, infinity, zero rows", profile, special)
    w1, w2 = draw.normal(11, 6), draw.normal(11, 6, dtype=torch.bfloat16)
    mixed = (draw.normal(4, 11), draw.integers(4, high=11), w1, w2)
    yield Case("fp32 w1, bf16 w2", "official", mixed)
    yield Case("fp64 logits", "ideal", (mixed[0].double(), *mixed[1:]))


def _weights(draw: Draw, vocab: int, rank: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Both factors; a bias is about as large as a logit."""
    return [draw.normal(vocab, rank, dtype=dtype, scale=scale) for scale in (1, rank**-0.5)]


markov_bias.wrong_arguments(
    {
        "weights exchanged": lambda a: a._replace(markov_w1=a.markov_w2, markov_w2=a.markov_w1),
        "one weight for both": lambda a: a._replace(markov_w2=a.markov_w1),
        "token of the row itself": {"previous": lambda before: before.roll(-1, 0)},
        "first token's bias for the whole block": {"previous": lambda p: p[:1].expand_as(p)},
        "ids cut to 16 bits": {"previous": lambda before: before % 65536},
        "w1 rounded to bf16": {"markov_w1": lambda w: w.bfloat16()},
        "w2 rounded to bf16": {"markov_w2": lambda w: w.bfloat16()},
        "last rank left out": dict.fromkeys(("markov_w1", "markov_w2"), lambda w: w[:, :-1]),
        "base logits left out": {"logits": torch.zeros_like},
    }
)
markov_bias.wrong_results(
    {
        "bias subtracted": lambda a, y: 2 * a.logits - y,
        "bias summed along the block": lambda a, y: a.logits + (y - a.logits).cumsum(0),
        "bias rounded to bf16": lambda a, y: a.logits + (y - a.logits).bfloat16(),
        "sum rounded to bf16": lambda a, y: y.bfloat16().to(y.dtype),
    }
)
