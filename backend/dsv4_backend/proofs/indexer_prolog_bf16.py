"""Proof of the indexer's prolog in bf16 (spec/deployments.md 8): cases, oracle, named faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from dsv4_backend.contract import Case, Draw
from dsv4_backend.ops.indexer_prolog import heads_of, rotate
from dsv4_backend.ops.indexer_prolog_bf16 import indexer_prolog
from dsv4_backend.proofs.indexer_prolog import (
    SAME_TURNS,
    WRONG_ROWS,
    WRONG_TURNS,
    Sizes,
    drawn_turns,
)
from dsv4_backend.proofs.numerics import (
    BF16,
    Array,
    cast,
    decided_products,
    far_from_bf16_ties,
    rms_normed,
    round_to,
    wide,
)
from dsv4_backend.proofs.qkv_norm_rope import turned


class Floats(NamedTuple):
    """Arguments of `indexer_prolog`."""

    x: torch.Tensor
    qr: torch.Tensor
    wq_b: torch.Tensor
    beside: torch.Tensor
    weights_proj: torch.Tensor
    pooled: torch.Tensor
    k_norm: torch.Tensor
    eps: float
    cos: torch.Tensor
    sin: torch.Tensor
    entry_cos: torch.Tensor
    entry_sin: torch.Tensor


@indexer_prolog.oracle
def _(*given: Any) -> tuple[Array, Array, Array, Array]:
    """In float64, rounded to bf16 before and after RoPE."""
    a: Any = Floats(*given)
    heads, width = len(a.weights_proj), a.pooled.shape[1]
    products = (wide(a.qr) @ wide(a.wq_b).T).reshape(len(a.qr), heads, width)
    lengths = round_to(BF16, rms_normed(a.pooled, a.k_norm, a.eps))
    queries = cast(BF16, turned(round_to(BF16, products), a.cos, a.sin))
    keys = cast(BF16, turned(lengths, a.entry_cos, a.entry_sin))
    product = cast(BF16, wide(a.qr) @ wide(a.beside).T)
    return queries, keys, wide(a.x) @ wide(a.weights_proj).T, product


def _are_decided(rows: Array, turns: tuple[torch.Tensor, ...], at: int) -> bool:
    """Whether fp32 decides what RoPE makes of a row [1, .., D], rounded before and after."""
    cos, sin = (turn[at : at + 1].numpy() for turn in turns)
    return far_from_bf16_ties(turned(round_to(BF16, rows), cos, sin))


def _floats(draw: Draw, s: Sizes, eps: float = 1e-6) -> Floats:
    """Latent queries and pooled keys are drawn row by row until all of their values are decided."""
    turns, entry_turns = drawn_turns(draw, s.tokens, s.rope), drawn_turns(draw, s.entries, s.rope)
    k_norm = (1 + 0.3 * draw.normal(s.width)).bfloat16()
    wq_b, beside = (
        draw.normal(rows, s.inner, scale=s.inner**-0.5, dtype=torch.bfloat16)
        for rows in (s.heads * s.width, 2 * s.width + 1)
    )

    def queries_are_decided(row: torch.Tensor, at: int) -> bool:
        latent, weight, other = (wide(t.float().numpy()) for t in (row[None], wq_b, beside))
        heads = (latent @ weight.T).reshape(1, s.heads, s.width)
        decided = all(decided_products(latent, w).all() for w in (weight, other))
        return decided and _are_decided(heads, turns, at)

    def key_is_decided(row: torch.Tensor, at: int) -> bool:
        key = rms_normed(row[None].float().numpy(), k_norm.float().numpy(), eps)
        return far_from_bf16_ties(key) and _are_decided(key, entry_turns, at)

    def rows(count: int, channels: int, decided: Callable[[torch.Tensor, int], bool]) -> Any:
        chosen = torch.zeros(count, channels, dtype=torch.bfloat16)
        for at in range(count):
            while not decided(row := draw.normal(channels, dtype=torch.bfloat16), at):
                pass
            chosen[at] = row
        return chosen

    qr, pooled = (
        rows(s.tokens, s.inner, queries_are_decided),
        rows(s.entries, s.width, key_is_decided),
    )
    return Floats(
        draw.normal(s.tokens, s.hidden, dtype=torch.bfloat16),
        qr,
        wq_b,
        beside,
        draw.normal(s.heads, s.hidden, scale=s.hidden**-0.5, dtype=torch.bfloat16),
        pooled,
        k_norm,
        eps,
        *turns,
        *entry_turns,
    )


@indexer_prolog.cases
def _(draw: Draw) -> Iterator[Case]:
    for sizes in (
        Sizes(0, 2, 8, 4, 6, 5, 0, 1),
        Sizes(1, 1, 2, 2, 1, 1, 1, 1),
        Sizes(2, 3, 16, 6, 20, 33, 2, 1),
        Sizes(5, 2, 32, 32, 48, 64, 4, 1),
        Sizes(3, 2, 34, 10, 24, 40, 2, 1),
        Sizes(2, 2, 128, 64, 64, 256, 3, 1),
    ):
        name = "{} tokens, {} heads of {} ({} turned), {}, {} channels, {} entries".format(*sizes)
        yield Case(name, "bf16", tuple(_floats(draw, sizes)))
    yield Case(
        "epsilon matters", "bf16", tuple(_floats(draw, Sizes(2, 2, 16, 8, 8, 40, 3, 1), 0.5))
    )
    a = _floats(draw, Sizes(4, 2, 16, 8, 24, 40, 3, 1))
    strided = a._replace(
        x=torch.stack([a.x, a.x], 2)[..., 0],
        wq_b=a.wq_b.T.contiguous().T,
        beside=a.beside.T.contiguous().T,
        pooled=torch.stack([a.pooled, a.pooled], 2)[..., 0],
    )
    yield Case("strided", "bf16", tuple(strided))
    yield Case("rows of zeros", "bf16", tuple(a._replace(qr=a.qr * 0, x=a.x * 0)))


indexer_prolog.wrong_arguments(
    {
        **WRONG_ROWS,
        "channels of the next": {"wq_b": lambda w: w.roll(1, 0)},
        "channels of the next beside": {"beside": lambda w: w.roll(1, 0)},
        "product with the indexer's own weight": lambda a: a._replace(
            beside=torch.cat([a.wq_b, a.beside])[: len(a.beside)]
        ),
        "latents of the next token": {"qr": lambda q: q.roll(1, 0)},
    }
)
indexer_prolog.wrong_steps(
    {
        **WRONG_TURNS,
        "queries rotated by the +-1 matrix": {
            heads_of: lambda product, w, cos, sin: rotate(heads_of(product, w, cos, sin))
        },
    }
)
indexer_prolog.explain(SAME_TURNS)
