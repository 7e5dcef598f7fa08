"""What lies between projections and caches of a layer, as profiles take it (v4.md 4.2, 4.5)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dsv4_ascend.model.rotary import Rotation
from dsv4_ascend.weights.linear import Linear, NormedRows
from dsv4_backend.ops.norm import head_rms_norm, rms_norm
from dsv4_backend.ops.rope import apply_rope

Codes = tuple[torch.Tensor, torch.Tensor | None]
"""Queries [T, HI, DI] with a scale each [T, HI], or as they are and None."""


class Qkv(NamedTuple):
    """Queries [T, H, D], keys [T, D] and the pooled entries [M, D] of a step, None without, before
    their norms: weights [D], eps, and what they are turned by.
    """

    q: torch.Tensor
    kv: torch.Tensor
    entries: torch.Tensor | None
    kv_norm: torch.Tensor
    entry_norm: torch.Tensor | None
    eps: float
    turns: Rotation
    entry_turns: Rotation | None


def project(x: torch.Tensor, wq_a: Linear, wkv: Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """The products of x [T, d] with both weights."""
    return wq_a(x), wkv(x)


def turned(x: torch.Tensor, norm: torch.Tensor, eps: float, turns: Rotation) -> torch.Tensor:
    """Rows [N, D] normed, then rotated."""
    rows = rms_norm(x, norm, eps)
    apply_rope(rows, turns.cos, turns.sin)
    return rows


def norm_rope(rows: Qkv) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Queries (by heads, each step rounded: 3.1), keys and entries, normed and rotated."""
    q = head_rms_norm(rows.q, rows.eps)
    apply_rope(q, rows.turns.cos, rows.turns.sin)
    kv = turned(rows.kv, rows.kv_norm, rows.eps, rows.turns)
    if rows.entries is None or rows.entry_norm is None or rows.entry_turns is None:
        return q, kv, None
    return q, kv, turned(rows.entries, rows.entry_norm, rows.eps, rows.entry_turns)


class IndexerParts(NamedTuple):
    """Of an indexer's step: x [T, d], the normed latent queries, pooled keys [M, DI] with the
    weight of their norm, weights, and what both sides are turned by.
    """

    x: torch.Tensor
    qr: NormedRows
    pooled: torch.Tensor
    norm: torch.Tensor
    eps: float
    wq_b: Linear
    weights_proj: Linear
    turns: Rotation
    entry_turns: Rotation

    def keys(self) -> torch.Tensor:
        """New keys [M, DI], normed and rotated."""
        return turned(self.pooled, self.norm, self.eps, self.entry_turns)

    def queries(self) -> torch.Tensor:
        """Queries [T, HI, DI], rotated."""
        q: torch.Tensor = self.qr.times(self.wq_b).unflatten(-1, (-1, self.pooled.shape[1]))
        apply_rope(q, self.turns.cos, self.turns.sin)
        return q

    def weights(self) -> torch.Tensor:
        """Weights [T, HI] of heads, with the factor of 4.5 item 4."""
        weights: torch.Tensor = self.weights_proj(self.x)
        heads, width = weights.shape[1], self.pooled.shape[1]
        factor: float = width**-0.5 * heads**-0.5
        return weights * factor


class Ahead(NamedTuple):
    """What an indexer's prolog makes before attention's queries are there: their product [T, H*D],
    its own queries and weights [T, HI], and the new keys [M, DI], which it does not write.
    """

    product: torch.Tensor
    q: Codes
    weights: torch.Tensor
    keys: torch.Tensor
