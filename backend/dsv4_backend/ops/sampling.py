"""Token sampling (spec/v4.md 8.2)."""

from __future__ import annotations

import torch

from dsv4_backend.contract import Tolerance, operator
from dsv4_backend.relations import finite_largest, positive, require

MIN_TEMPERATURE = 1e-5
MIN_TOP_P = torch.finfo(torch.float32).tiny


def nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Probabilities with 0 outside the nucleus:
    a token stays while the better ones hold less than top_p together.

    The best one always stays: what fp32 would take for a top_p of 0 counts as the smallest
    normal number.
    """
    best_first, order = torch.sort(probabilities, dim=-1, descending=True, stable=True)
    better = best_first.cumsum(-1) - best_first
    kept = best_first.masked_fill(better >= max(top_p, MIN_TOP_P), 0)
    return torch.zeros_like(probabilities).scatter(-1, order, kept)


@operator(
    "sample(Tensor logits, Tensor noise, float temperature, float top_p) -> Tensor",
    rows=(23,),
    arguments={
        "logits": "f32 [T, V]",
        "noise": "f32 [T, V]",
        "temperature": "a finite number >= 0 that fp32 holds",
        "top_p": "a number in (0, 1]",
    },
    relations=(
        require("logits", "V >= 1", "shape {sizes(logits)}", "at least one token id"),
        finite_largest("logits"),
        positive("noise", "positive(temperature)"),
    ),
    tolerance=Tolerance(
        reason="token ids are exact; apart from exact ties, no winner of a case changes when top_p "
        "moves by 1e-5 or a probability by 1e-4 of itself"
    ),
)
def sample(
    logits: torch.Tensor, noise: torch.Tensor, temperature: float, top_p: float
) -> torch.Tensor:
    """One token id per row,
    by the exponential race: `argmax(softmax(logits / temperature) / noise)`.

    logits: fp32 [T, V], V >= 1; -inf forbids a token; NaN, +inf and rows of nothing but -inf are
    errors.
    noise: fp32 [T, V] of Exp(1) values > 0, drawn by the caller, who thereby owns the seed.
    temperature: >= 0; 0 is plain argmax, anything else counts as at least 1e-5.
    top_p: in (0, 1]; a token is a candidate while the tokens ranked before it hold less than top_p
    of the probability; the first in rank always is one, however small top_p is. Returns int64 [T]
    ids in [0, V). Ties, in rank and in the final argmax: the smaller id. T = 0 gives an empty
    result. Source: spec/v4.md 8.2 [OFF-GEN]; top_p is the published sampling parameter.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits / max(temperature, MIN_TEMPERATURE), -1)
    if top_p < 1:
        probabilities = nucleus(probabilities, top_p)
    return (probabilities / noise).argmax(-1)
