"""Norms and rotations between the projections of attention and its caches (spec/v4.md 4.2, 4.3)."""

from __future__ import annotations

import torch

from dsv4_backend.contract import Tolerance, operator
from dsv4_backend.ops.norm import rms_norm
from dsv4_backend.ops.rope import apply_rope
from dsv4_backend.relations import Relation, given_if, require

TURNED = require(
    "cos",
    "r % 2 == 0 and 2 <= r <= D",
    "{r} channels",
    "an even number of channels, 2 to D = {D}",
)
"""Of cosines [T, r] that turn the last r of D channels."""
Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _with_entries(argument: str) -> list[Relation]:
    return list(given_if(argument, "given(entries)", "{}, as entries are"))


def norm_rope(
    x: torch.Tensor, weight: torch.Tensor, eps: float, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Rows [N, .., D] after `rms_norm` and `apply_rope`."""
    rows = rms_norm.reference(x, weight, eps)
    apply_rope.reference(rows, cos, sin)
    return rows


@operator(
    "qkv_norm_rope(Tensor q, Tensor kv, Tensor? entries, Tensor q_weight, Tensor kv_weight, "
    "Tensor? entry_weight, float eps, Tensor cos, Tensor sin, Tensor? entry_cos, "
    "Tensor? entry_sin) -> (Tensor, Tensor, Tensor)",
    rows=(5, 6),
    arguments={
        "q": "float [T, H, D]",
        "kv": "float like q [T, D]",
        "entries": "float like q [M, D]",
        "q_weight": "float [D]",
        "kv_weight": "float [D]",
        "entry_weight": "float [D]",
        "eps": "a number >= 0",
        "cos": "f32 [T, r]",
        "sin": "f32 [T, r]",
        "entry_cos": "f32 [M, r]",
        "entry_sin": "f32 [M, r]",
    },
    relations=(
        *(_with_entries("entry_weight")),
        *(_with_entries("entry_cos")),
        *(_with_entries("entry_sin")),
        TURNED,
    ),
    tolerance=Tolerance(
        reason="fp32 sums of squares in any order stay within 4e-6; the bf16 cases keep every "
        "value away from the middle of two neighbours, so that the two roundings decide every bit",
        ideal=(4e-6, 4e-6),
    ),
)
def qkv_norm_rope(
    q: torch.Tensor,
    kv: torch.Tensor,
    entries: torch.Tensor | None,
    q_weight: torch.Tensor,
    kv_weight: torch.Tensor,
    entry_weight: torch.Tensor | None,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    entry_cos: torch.Tensor | None,
    entry_sin: torch.Tensor | None,
) -> Rows:
    """`rms_norm`, then `apply_rope`, of queries, window keys and the entries that close in a step.

    q: [T, H, D] float, every head normed by itself with q_weight [D]; kv: [T, D] with kv_weight;
    entries: [M, D] as `compress_pool` gives them with entry_weight, or None, and then all three of
    the entries' arguments are None; eps: added to the mean squares; cos, sin: fp32 [T, r],
    entry_cos, entry_sin: fp32 [M, r], as `rotation_rows` gives them, for the last r channels.
    Returns new tensors of the shapes and the dtype of q, kv and entries, [0, D] without entries;
    fp32 inside, one cast after the norm and one after RoPE. Zero tokens give empty results. Source:
    spec/v4.md 3.1, 3.3, 4.2, 4.3 [OFF-M], with the head norm as aclnnRmsNorm rounds it.
    """
    queries = norm_rope(q, q_weight, eps, cos, sin)
    keys = norm_rope(kv, kv_weight, eps, cos, sin)
    if entries is None or entry_weight is None or entry_cos is None or entry_sin is None:
        return queries, keys, kv.new_empty(0, kv.shape[1])
    return queries, keys, norm_rope(entries, entry_weight, eps, entry_cos, entry_sin)
