"""Operators on rows of activations at Flash dimensions: mixes, norms, rotations, compressor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from dsv4_ascend.bench.dimensions import Dimensions
from dsv4_ascend.bench.products import bf16
from dsv4_ascend.bench.work import REFERENCE, Work, cold, plain, ran, rotating, size_of
from dsv4_backend.ops.rope import rope_frequencies

_EPS = 1e-6


def _beside_reference(
    name: str,
    what: str,
    sets: list[tuple[Any, ...]],
    flops: int,
    peers: dict[str, Callable[..., Any]] | None = None,
) -> Work:
    """Work of one operator, whose traffic is its arguments and results once."""
    op, arguments = getattr(torch.ops.dsv4, name), sets[0]
    results = op(*arguments)
    parts = results if isinstance(results, tuple) else (results,)
    given = [a for a in arguments if isinstance(a, torch.Tensor)]
    formulations = {REFERENCE: plain(name), **(peers or {})}
    return Work(
        name,
        f"{name}, {what}",
        given[0].shape[0],
        size_of(*given, *parts),
        flops,
        ran(name, *arguments),
        rotating(lambda a: op(*a), sets),
        {peer: rotating(lambda a, f=f: f(*a), sets) for peer, f in formulations.items()},
    )


def hc_pre(of: Dimensions) -> Iterator[Work]:
    """The mixes of another site every call."""
    n, width = of.streams, of.streams * of.hidden
    mixes = n * (n + 2)
    weights = cold(lambda: torch.randn(mixes, width) * width**-0.5, 4 * mixes * width)
    for tokens in of.rows:
        x = bf16(tokens, n, of.hidden)
        rest = torch.zeros(mixes), torch.ones(3), of.sinkhorn, _EPS, _EPS
        sets = [(x, fn, *rest) for fn in weights]
        what = f"{n} streams of {of.hidden}, {of.sinkhorn} Sinkhorn rounds"
        yield _beside_reference("hc_pre", what, sets, 2 * tokens * width * (mixes + 2))


def hc_post(of: Dimensions) -> Iterator[Work]:
    """Streams mixed back."""
    n, d = of.streams, of.hidden
    for tokens in of.rows:
        z, x = bf16(tokens, d), bf16(tokens, n, d)
        mix = torch.rand(tokens, n), torch.rand(tokens, n, n)
        flops = 2 * tokens * d * n * (n + 1)
        yield _beside_reference("hc_post", f"{n} streams of {d}", [(z, x, *mix)], flops)


def act_quant(of: Dimensions) -> Iterator[Work]:
    """The input of an FP8 product."""
    for tokens in of.rows:
        sets = [(bf16(tokens, of.hidden), 128)]
        what = f"{of.hidden} channels, blocks of 128"
        yield _beside_reference("act_quant", what, sets, 2 * tokens * of.hidden)


def rms_norm(of: Dimensions) -> Iterator[Work]:
    """A norm of the hidden state."""
    for tokens in of.rows:
        sets = [(bf16(tokens, of.hidden), bf16(of.hidden), _EPS)]
        own = {"torch rms_norm": lambda x, w, eps: F.rms_norm(x, w.shape, w, eps)}
        what = f"{of.hidden} channels"
        yield _beside_reference("rms_norm", what, sets, 4 * tokens * of.hidden, own)


def rope(of: Dimensions) -> Iterator[Work]:
    """Queries of all heads."""
    frequencies = rope_frequencies(of.rope, 10000.0)
    for tokens in of.rows:
        x = bf16(tokens, of.heads, of.head_dim)
        sets = [(x, torch.arange(tokens), frequencies)]
        what = f"{of.heads} heads of {of.head_dim}, the last {of.rope}"
        yield _beside_reference("rope", what, sets, 3 * tokens * of.heads * of.rope)


def compressor(of: Dimensions) -> Iterator[Work]:
    """CSA's compressor: a step of decode that closes a block, and a chunk; weights cold."""
    width = 2 * of.head_dim
    weights = cold(lambda: (bf16(width, of.hidden), bf16(width, of.hidden)), 4 * width * of.hidden)
    ape = torch.zeros(of.csa_ratio, width)
    for tokens in of.rows:
        columns = -(-(tokens + 2 * of.csa_ratio) // of.block) + 1
        state = torch.zeros(columns + 1, of.block, 2 * width)
        table = torch.arange(1, columns + 1, dtype=torch.int32)[None]
        length = of.context // of.csa_ratio * of.csa_ratio
        lengths = torch.tensor([0, tokens], dtype=torch.int32), torch.tensor([length]).int()
        x = bf16(tokens, of.hidden)
        sets = [(x, *w, ape, state, table, *lengths, of.context, of.head_dim) for w in weights]
        moved = size_of(x, *weights[0], ape) + tokens * 8 * width
        arguments = sets[0]
        yield Work(
            "compress_pool",
            f"CSA compressor, ratio {of.csa_ratio}, {of.hidden} -> 2 x {of.head_dim}",
            tokens,
            moved,
            4 * tokens * width * of.hidden,
            ran("compress_pool", *arguments),
            rotating(lambda a: torch.ops.dsv4.compress_pool(*a), sets),
            {REFERENCE: rotating(lambda a: plain("compress_pool")(*a), sets)},
        )
