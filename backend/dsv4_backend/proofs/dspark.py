"""Proof of DSpark's Markov head (spec/v4.md 13.1): cases, oracle, named faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from dsv4_backend.contract import Case, Draw
from dsv4_backend.mutants import EDITS, add_output_faults
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


add_output_faults(markov_bias, *EDITS)


def _wrong_arguments(name: str, edit: Callable[..., tuple[torch.Tensor, ...]]) -> None:
    """A fault: markov_bias of other arguments; edit maps (logits, previous, w1, w2) to them."""
    markov_bias.fault(name)(lambda *args: markov_bias.reference(*edit(*args)))


_wrong_arguments("weights exchanged", lambda x, before, w1, w2: (x, before, w2, w1))
_wrong_arguments("one weight for both", lambda x, before, w1, w2: (x, before, w1, w1))
_wrong_arguments("token of the row itself", lambda x, before, *w: (x, before.roll(-1, 0), *w))
_wrong_arguments(
    "first token's bias for the whole block",
    lambda x, before, *w: (x, before[:1].expand_as(before), *w),
)
_wrong_arguments("ids cut to 16 bits", lambda x, before, *w: (x, before % 65536, *w))
_wrong_arguments("w1 rounded to bf16", lambda x, before, w1, w2: (x, before, w1.bfloat16(), w2))
_wrong_arguments("w2 rounded to bf16", lambda x, before, w1, w2: (x, before, w1, w2.bfloat16()))
_wrong_arguments("last rank left out", lambda x, before, *w: (x, before, *(f[:, :-1] for f in w)))


def _wrong_sum(name: str, add: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """A fault: logits and a right bias, added in a wrong way."""

    def fault(logits: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return add(logits, markov_bias.reference(torch.zeros_like(logits), *rest))

    markov_bias.fault(name)(fault)


_wrong_sum("base logits left out", lambda logits, bias: bias)
_wrong_sum("bias subtracted", lambda logits, bias: logits - bias)
_wrong_sum("bias summed along the block", lambda logits, bias: logits + bias.cumsum(0))
_wrong_sum("bias rounded to bf16", lambda logits, bias: logits + bias.bfloat16())
_wrong_sum("sum rounded to bf16", lambda logits, bias: (logits + bias).bfloat16().to(logits.dtype))
