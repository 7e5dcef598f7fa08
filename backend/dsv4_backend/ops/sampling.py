"""Token sampling (spec/v4.md 8.2)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from dsv4_backend.contract import Case, Draw, Tolerance, compute, operator
from dsv4_backend.mutants import add_output_faults

_MIN_TEMPERATURE = 1e-5


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Probabilities with 0 outside the nucleus: a token stays while the better ones hold less than top_p together."""
    best_first, order = torch.sort(probabilities, dim=-1, descending=True, stable=True)
    better = best_first.cumsum(-1) - best_first
    kept = best_first.masked_fill(better >= top_p, 0)
    return torch.zeros_like(probabilities).scatter(-1, order, kept)


@operator(
    "sample(Tensor logits, Tensor noise, float temperature, float top_p) -> Tensor",
    rows=(23,),
    arguments={"logits": "f32 [T, V]", "noise": "f32 [T, V]"},
    tolerance=Tolerance(
        reason="token ids are exact; apart from exact ties, no winner of a case changes when top_p moves by 1e-5 or "
        "a probability by 1e-4 of itself"
    ),
)
def sample(logits: torch.Tensor, noise: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """One token id per row, by the exponential race: `argmax(softmax(logits / temperature) / noise)`.

    logits: fp32 [T, V], V >= 1; -inf forbids a token; NaN, +inf and rows of nothing but -inf are errors.
    noise: fp32 [T, V] of Exp(1) values > 0, drawn by the caller, who thereby owns the seed.
    temperature: >= 0; 0 is plain argmax, anything else counts as at least 1e-5.
    top_p: in (0, 1]; a token is a candidate while the tokens ranked before it hold less than top_p of the probability.
    Returns int64 [T] ids in [0, V). Ties, in rank and in the final argmax: the smaller id. T = 0 gives an empty result.
    Source: spec/v4.md 8.2 [OFF-GEN]; top_p is the published sampling parameter.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(compute(logits) / max(temperature, _MIN_TEMPERATURE), -1)
    if top_p < 1:
        probabilities = _nucleus(probabilities, top_p)
    return (probabilities / noise).argmax(-1)


@sample.shapes
def _(logits: torch.Tensor, noise: torch.Tensor, temperature: float, top_p: float) -> None:
    if logits.shape[1] == 0:
        raise sample.reject("logits", f"shape {tuple(logits.shape)}", "at least one token id")
    if not 0 <= temperature < math.inf:
        raise sample.reject("temperature", temperature, "a finite number >= 0")
    if not 0 < top_p <= 1:
        raise sample.reject("top_p", top_p, "a number in (0, 1]")


@sample.contents
def _(logits: torch.Tensor, noise: torch.Tensor, temperature: float, top_p: float) -> None:
    best = logits.amax(-1)  # NaN wins, +inf comes next, -inf means that every id is forbidden
    for row in (~best.isfinite()).nonzero().flatten()[:1].tolist():
        found = f"largest logit {best[row].item()} in row {row}"
        raise sample.reject("logits", found, "no NaN, no +inf and a finite logit in every row")
    if temperature > 0 and not bool((noise > 0).all()):
        row, column = (~(noise > 0)).nonzero()[0].tolist()
        raise sample.reject("noise", f"{noise[row, column].item()} at [{row}, {column}]", "values > 0")


def _exponential(draw: Draw, *shape: int) -> torch.Tensor:
    return -torch.log1p(-draw.uniform(*shape, low=1e-6, high=1 - 1e-6))


@sample.cases
def _(draw: Draw) -> Iterator[Case]:
    for tokens, vocab in ((0, 7), (1, 1), (64, 33), (16, 1031), (2, 129280)):
        logits, noise = draw.normal(tokens, vocab, scale=2.0), _exponential(draw, tokens, vocab)
        for temperature, top_p in ((0.0, 1.0), (1.0, 1.0), (0.6, 0.9), (1.7, 0.3)):
            yield Case(f"{tokens}x{vocab} T {temperature} p {top_p}", "ideal", (logits, noise, temperature, top_p))
    logits, noise = draw.normal(24, 40, scale=2.0)[::2, ::2], _exponential(draw, 12, 40)[:, ::2]
    yield Case("strided", "ideal", (logits, noise, 0.8, 0.7))
    forbidden = draw.normal(20, 9).masked_fill(draw.uniform(20, 9) < 0.6, -math.inf)
    forbidden[:, 8] = -3.0
    for temperature in (0.0, 1.0):
        yield Case(f"forbidden ids T {temperature}", "ideal", (forbidden, _exponential(draw, 20, 9), temperature, 1.0))
    yield from _tie_cases(draw)


def _tie_cases(draw: Draw) -> Iterator[Case]:
    levels, equal = draw.integers(32, 50, high=4).float(), torch.ones(32, 50)
    yield Case("ties, greedy", "ideal", (levels, _exponential(draw, 32, 50), 0.0, 1.0))
    yield Case("ties of logit and noise", "ideal", (levels, equal, 1.0, 1.0))
    noise = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0], [3.0, 3.0, 1.0, 1.0]])
    yield Case("ties of rank at top_p", "ideal", (torch.zeros(3, 4), noise, 1.0, 0.5))
    close = torch.tensor([[1.0, 1.0 + 1e-6], [-2.0, -2.0 - 1e-6]])
    yield Case("greedy, nearly a tie", "ideal", (close, torch.tensor([[0.1, 8.0], [8.0, 0.1]]), 0.0, 1.0))
    cold = torch.tensor([[5.0, 4.99, -9.0], [1.0, 3.0, 2.99]])
    yield Case(
        "temperature below its floor", "ideal", (cold, torch.tensor([[9.0, 0.1, 0.1], [0.1, 9.0, 0.1]]), 1e-30, 0.5)
    )


add_output_faults(sample, "last token zero", "tokens shifted by one")


@sample.fault("temperature ignored")
def _(logits: torch.Tensor, noise: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    return sample.reference(logits, noise, 1.0 if temperature else 0.0, top_p)


@sample.fault("logits multiplied by the temperature")
def _(logits: torch.Tensor, noise: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    return sample.reference(logits, noise, 1 / temperature if temperature else 0.0, top_p)


@sample.fault("top_p ignored")
def _(logits: torch.Tensor, noise: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    return sample.reference(logits, noise, temperature, 1.0)


@sample.fault("token that crosses top_p left out")
def _(logits: torch.Tensor, noise: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    probabilities = torch.softmax(logits / max(temperature, _MIN_TEMPERATURE), -1)
    best_first, order = torch.sort(probabilities, dim=-1, descending=True, stable=True)
    outside = (best_first.cumsum(-1) > top_p) & (torch.arange(logits.shape[1]) > 0)
    dropped = torch.zeros_like(outside).scatter(-1, order, outside)
    return sample.reference(logits.masked_fill(dropped & (top_p < 1), -math.inf), noise, temperature, 1.0)


@sample.fault("top_p on probabilities before the temperature")
def _(logits: torch.Tensor, noise: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    outside = _nucleus(torch.softmax(logits, -1), top_p) == 0
    return sample.reference(logits.masked_fill(outside & (top_p < 1), -math.inf), noise, temperature, 1.0)


@sample.fault("noise left out")
def _(logits: torch.Tensor, noise: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    return sample.reference(logits, torch.ones_like(noise), temperature, top_p)


@sample.fault("multiplied by the noise")
def _(logits: torch.Tensor, noise: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    return sample.reference(logits, 1 / noise, temperature, top_p)


@sample.fault("noise of the previous token")
def _(logits: torch.Tensor, noise: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    return sample.reference(logits, noise.roll(1, 0), temperature, top_p)


@sample.fault("temperature 0 still draws")
def _(logits: torch.Tensor, noise: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    return sample.reference(logits, noise, max(temperature, _MIN_TEMPERATURE), top_p)


@sample.fault("ties to the larger id")
def _(logits: torch.Tensor, noise: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    return logits.shape[1] - 1 - sample.reference(logits.flip(-1), noise.flip(-1), temperature, top_p)


@sample.fault("last id never chosen")
def _(logits: torch.Tensor, noise: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    last = torch.arange(logits.shape[1]) == max(1, logits.shape[1] - 1)
    return sample.reference(logits.masked_fill(last, -math.inf), noise, temperature, top_p)
