"""Tiles of a long call: what grows with tokens times keys is made for a few tokens at a time,
whatever the length.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

BUDGET = 64 << 20
"""Bytes of temporaries that a tile of tokens may take. A single token may need more."""


def spans(length: int, step: int) -> list[slice]:
    """0 .. length in pieces of `step`; one piece for an empty length."""
    if length <= step:  # no loop over a length that a tracer holds as a symbol
        return [slice(None)]
    return [slice(start, start + step) for start in range(0, length, step)]


def by_tokens(
    function: Callable[[slice], torch.Tensor], tokens: int, bytes_per_token: int
) -> torch.Tensor:
    """`function(slice of tokens)` for all `tokens` [T, ...], in tiles within the budget.

    bytes_per_token: of the temporaries of `function`. The result has the same bits for any budget
    if `function` computes every token by operations whose shapes, but for the number of tokens, do
    not change.
    """
    parts = [function(span) for span in spans(tokens, max(1, BUDGET // max(1, bytes_per_token)))]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
