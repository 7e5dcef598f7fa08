"""Proof of hyper-connections (spec/v4.md 2.2 to 2.4): cases, oracles, named faults."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dsv4_backend.contract import Case, Draw, compute
from dsv4_backend.ops.hyper import (
    _collapse,
    _mixes,
    _mixing_weights,
    hc_head,
    hc_post,
    hc_pre,
    sinkhorn,
)
from dsv4_backend.proofs.numerics import Array, cast, wide
from dsv4_backend.proofs.rounding_rows import WHOLE, whole

_NORM_EPS, _HC_EPS = 1e-6, 1e-6


def _sigmoid(x: Array) -> Array:
    result: Array = 1 / (1 + np.exp(-x))
    return result


def _mix(x: Array, fn: Array, norm_eps: float) -> Array:
    """Fn times each token's streams end to end,
    over their common length: [T, m] (spec 2.2 items 1 to 3).
    """
    tokens, streams, channels = x.shape
    flat = wide(x).reshape(tokens, streams * channels)
    length = np.sqrt((flat**2).mean(1) + norm_eps)
    mix: Array = flat @ wide(fn).T / length[:, None]
    return mix


def _weighted_streams(x: Array, pre: Array) -> Array:
    return cast(x.dtype, np.einsum("tj,tjd->td", pre, wide(x)))


def _doubly_stochastic(logits: Array, rounds: int, eps: float) -> Array:
    """One token's [n, n] matrix, by the passes of spec 2.3 in their order."""
    powers: Array = np.exp(logits - logits.max(1, keepdims=True))
    matrix: Array = powers / powers.sum(1, keepdims=True) + eps
    matrix = matrix / (matrix.sum(0) + eps)
    for _ in range(rounds - 1):
        matrix = matrix / (matrix.sum(1, keepdims=True) + eps)
        matrix = matrix / (matrix.sum(0) + eps)
    return matrix


@hc_pre.oracle
def _(
    x: Array, fn: Array, base: Array, scale: Array, rounds: int, norm_eps: float, hc_eps: float
) -> tuple[Array, Array, Array]:
    tokens, n, _channels = x.shape
    mix = _mix(x, fn, norm_eps)
    pre = _sigmoid(mix[:, :n] * scale[0] + base[:n]) + hc_eps
    post = 2 * _sigmoid(mix[:, n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = np.empty((tokens, n, n))
    for t in range(tokens):
        logits = mix[t, 2 * n :] * scale[2] + base[2 * n :]
        comb[t] = _doubly_stochastic(logits.reshape(n, n), rounds, hc_eps)
    return _weighted_streams(x, pre), post, comb


@hc_post.oracle
def _(z: Array, x: Array, post: Array, comb: Array) -> Array:
    new = np.empty(x.shape)
    for k in range(x.shape[1]):
        new[:, k] = post[:, k, None] * wide(z)
        for j in range(x.shape[1]):
            new[:, k] += comb[:, j, k, None] * wide(x[:, j])
    return cast(x.dtype, new)


@hc_head.oracle
def _(x: Array, fn: Array, base: Array, scale: Array, norm_eps: float, hc_eps: float) -> Array:
    return _weighted_streams(x, _sigmoid(_mix(x, fn, norm_eps) * scale[0] + base) + hc_eps)


_DTYPES = {"ideal": torch.float32, "official": torch.bfloat16}
_SHAPES = ((0, 4, 64), (1, 1, 1), (3, 2, 7), (5, 4, 33), (17, 4, 16), (2, 4, 4096))


def _mixers(draw: Draw, n: int, d: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights fn and base that give mixes and logits of order 1."""
    return draw.normal(rows, n * d, scale=(n * d) ** -0.5), draw.normal(rows)


@hc_pre.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in _DTYPES.items():
        for tokens, n, d in _SHAPES:
            mixers = *_mixers(draw, n, d, n * (n + 2)), draw.normal(3)
            x = draw.normal(tokens, n, d, dtype=dtype)
            rounds = 20 if tokens in (2, 17) else 3
            yield Case(f"{tokens}x{n}x{d}", profile, (x, *mixers, rounds, _NORM_EPS, _HC_EPS))
        mixers = *_mixers(draw, 4, 24, 24), draw.normal(3)
        for rounds in (1, 2, 5):
            x = draw.normal(4, 4, 24, dtype=dtype)
            yield Case(f"{rounds} rounds", profile, (x, *mixers, rounds, _NORM_EPS, _HC_EPS))
        x = draw.normal(4, 4, 24, dtype=dtype)
        yield Case("large hc_eps", profile, (x, *mixers, 4, _NORM_EPS, 0.03))
        x = draw.normal(4, 4, 24, dtype=dtype, scale=1e-3)
        yield Case("norm epsilon matters", profile, (x, *mixers, 3, _NORM_EPS, _HC_EPS))
        yield from _extreme_pre_cases(draw, profile, dtype)
    x, mixers = draw.normal(3, 4, 24).double(), (*_mixers(draw, 4, 24, 24), draw.normal(3))
    yield Case("fp64 streams", "ideal", (x, *mixers, 4, _NORM_EPS, _HC_EPS))
    arguments = (*halves(draw, 24, 3), 4, _NORM_EPS, 0.0)
    yield Case(HALVES, "official", arguments, decided=True)


HALVES = "halves of whole streams"


def halves(draw: Draw, rows: int, scales: int) -> tuple[torch.Tensor, ...]:
    """x, fn, base, scale of 4 streams that weigh 1/2 each, and 1/4 in comb, as nothing is mixed:
    no order of fp32 sums moves a result.
    """
    x = draw.integers(5, 4, 24, low=-100, high=101, dtype=torch.bfloat16)
    return x, draw.normal(rows, 96), torch.zeros(rows), torch.zeros(scales)


def _extreme_pre_cases(draw: Draw, profile: str, dtype: torch.dtype) -> Iterator[Case]:
    fn, base = _mixers(draw, 4, 24, 24)
    scale = draw.normal(3)
    settings = 3, _NORM_EPS, _HC_EPS
    x = draw.normal(12, 4, 48, dtype=dtype)[::3, :, ::2]
    yield Case(
        "strided", profile, (x, draw.normal(24, 192, scale=0.1)[:, ::2], base, scale, *settings)
    )
    for name, logits in (
        ("slow to converge", torch.tensor([4.0, 0, 0, 0, 8, 0, 4, 0, 0, 4, 0, 0, 8, 0, 0, 4])),
        ("one stream shut off", torch.tensor([-30.0, 0, 1, 2]).repeat(4)),
        ("logits beyond the range of exp", torch.tensor([120.0, 118, 0, 60]).repeat(4)),
    ):
        x = draw.normal(3, 4, 24, dtype=dtype)
        yield Case(
            name, profile, (x, fn, torch.cat((base[:8], logits)), scale, 20, _NORM_EPS, _HC_EPS)
        )
    special = draw.normal(4, 4, 24, dtype=dtype)
    special[0, 1, 3], special[1, 2, 5], special[2] = float("nan"), float("inf"), 0.0
    yield Case("NaN, infinity, zero row", profile, (special, fn, base, scale, *settings))


def _comb(powers: torch.Tensor, rounds: int, row_eps: float, column_eps: float) -> torch.Tensor:
    """Sinkhorn after its softmax, with an epsilon for each direction."""
    comb = powers / (powers.sum(-2, keepdim=True) + column_eps)
    for _ in range(rounds - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + row_eps)
        comb = comb / (comb.sum(-2, keepdim=True) + column_eps)
    return comb


def _unnormed(x: torch.Tensor, fn: torch.Tensor, eps: float) -> torch.Tensor:
    return F.linear(compute(x).flatten(1), fn)


def _norm_each_stream(x: torch.Tensor, fn: torch.Tensor, eps: float) -> torch.Tensor:
    wide = compute(x)
    return _unnormed(wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps), fn, eps)


def _without_last_stream(x: torch.Tensor, fn: torch.Tensor, eps: float) -> torch.Tensor:
    return _mixes(x, fn * (torch.arange(fn.shape[1]) < fn.shape[1] - x.shape[2]), eps)


def _exchange_pre_and_post(fn: torch.Tensor, n: int) -> torch.Tensor:
    return torch.cat((fn[n : 2 * n], fn[:n], fn[2 * n :]))


_WRONG_MIXES: dict[str, dict[str, Any]] = {
    "norm epsilon left out": {"norm_eps": 0.0},
    "fn rounded to bf16": {"fn": lambda fn: fn.bfloat16().float()},
    "base left out": {"base": torch.zeros_like},
}
hc_pre.wrong_arguments(
    {
        **_WRONG_MIXES,
        "one scale for all": {"scale": lambda scale: scale[:1].expand(3)},
        "one Sinkhorn round too few": {"sinkhorn_iters": lambda rounds: rounds - 1},
        "pre and post exchanged": lambda a: a._replace(
            fn=_exchange_pre_and_post(a.fn, a.x.shape[1])
        ),
    }
)
hc_pre.wrong_step(
    _mixes,
    {
        "norm left out": _unnormed,
        "norm of each stream alone": _norm_each_stream,
        "channel-major flattening": lambda x, fn, eps: _mixes(x.mT.reshape(x.shape), fn, eps),
        "last stream not mixed": _without_last_stream,
    },
)
hc_pre.wrong_step(
    sinkhorn,
    {
        "softmax without epsilon": lambda c, k, eps: _comb(c.softmax(-1), k, eps, eps),
        "row passes without epsilon": lambda c, k, eps: _comb(c.softmax(-1) + eps, k, 0.0, eps),
        "column passes without epsilon": lambda c, k, eps: _comb(c.softmax(-1) + eps, k, eps, 0.0),
        "exp without the row maximum": lambda c, k, eps: _comb(
            c.exp() / c.exp().sum(-1, keepdim=True) + eps, k, eps, eps
        ),
        "columns before rows": lambda c, k, eps: sinkhorn(c.mT, k, eps).mT,
        "softmax alone": lambda c, k, eps: c.softmax(-1),
    },
)
hc_pre.wrong_steps(
    {
        "pre without epsilon": {
            _mixing_weights: lambda x, m, b, s, eps: _mixing_weights(x, m, b, s, 0.0)
        }
    }
)
hc_pre.wrong_results(
    {
        "a row pass too many": lambda a, y, post, comb: (
            y,
            post,
            comb / (comb.sum(-1, True) + a.hc_eps),
        ),
        "comb transposed": {"comb": lambda comb: comb.mT},
        "comb of the previous token": {"comb": lambda comb: comb.roll(1, 0)},
        "post without its factor 2": {"post": lambda post: post / 2},
        "post with epsilon": lambda a, y, post, comb: (y, post + a.hc_eps, comb),
    }
)


@hc_post.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in _DTYPES.items():
        for tokens, n, d in _SHAPES:
            streams = draw.normal(tokens, d, dtype=dtype), draw.normal(tokens, n, d, dtype=dtype)
            weights = draw.uniform(tokens, n, high=2.0), draw.uniform(tokens, n, n)
            yield Case(f"{tokens}x{n}x{d}", profile, (*streams, *weights))
        z, x = draw.normal(4, 48, dtype=dtype)[:, ::2], draw.normal(8, 4, 24, dtype=dtype)[::2]
        yield Case("strided", profile, (z, x, draw.uniform(4, 8)[:, ::2], draw.uniform(4, 4, 4).mT))
        z, x = draw.normal(4, 6, dtype=dtype), draw.normal(4, 4, 6, dtype=dtype)
        z[0, 1], x[1, 2, 3], x[2] = float("nan"), float("inf"), 0.0
        yield Case(
            "NaN, infinity, zero row",
            profile,
            (z, x, draw.uniform(4, 4, low=0.1), draw.uniform(4, 4, 4, low=0.1)),
        )
    streams = draw.normal(3, 24).double(), draw.normal(3, 4, 24).double()
    yield Case("fp64 streams", "ideal", (*streams, draw.uniform(3, 4), draw.uniform(3, 4, 4)))
    streams = whole(draw, 5, 24), whole(draw, 5, 4, 24)
    mixes = (whole(draw, *shape, dtype=torch.float32) for shape in ((5, 4), (5, 4, 4)))
    yield Case(WHOLE, "official", (*streams, *mixes), decided=True)


hc_post.wrong_arguments(
    {
        "comb untransposed": {"comb": lambda comb: comb.mT},
        "comb rounded to bf16": {"comb": lambda comb: comb.bfloat16()},
        "comb left out": {"comb": lambda comb: torch.eye(comb.shape[1]).expand_as(comb)},
        "post rounded to bf16": {"post": lambda post: post.bfloat16()},
        "post left out": {"post": torch.ones_like},
        "output left out": {"z": torch.zeros_like},
        "streams left out": {"x": torch.zeros_like},
        "last stream not mixed in": {"x": lambda x: F.pad(x[:, :-1], (0, 0, 0, 1))},
        "streams reversed": dict.fromkeys(("post", "comb"), lambda weights: weights.flip(-1)),
    }
)


@hc_post.fault("mix rounded to bf16 before the sum")
def _(z: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    mixed = torch.matmul(comb.mT, compute(x)).bfloat16()
    return (post.unsqueeze(-1) * compute(z).unsqueeze(1) + mixed).to(x.dtype)


@hc_head.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in _DTYPES.items():
        for tokens, n, d in _SHAPES:
            mixers = *_mixers(draw, n, d, n), draw.normal(1)
            yield Case(
                f"{tokens}x{n}x{d}",
                profile,
                (draw.normal(tokens, n, d, dtype=dtype), *mixers, _NORM_EPS, _HC_EPS),
            )
        mixers = *_mixers(draw, 4, 24, 4), draw.normal(1)
        settings = _NORM_EPS, _HC_EPS
        yield Case(
            "large hc_eps", profile, (draw.normal(4, 4, 24, dtype=dtype), *mixers, _NORM_EPS, 0.03)
        )
        tiny = draw.normal(4, 4, 24, dtype=dtype, scale=1e-3)
        yield Case("norm epsilon matters", profile, (tiny, *mixers, *settings))
        yield Case(
            "strided",
            profile,
            (draw.normal(12, 4, 48, dtype=dtype)[::3, :, ::2], *mixers, *settings),
        )
        special = draw.normal(4, 4, 24, dtype=dtype)
        special[0, 1, 3], special[1, 2, 5], special[2] = float("nan"), float("inf"), 0.0
        yield Case("NaN, infinity, zero row", profile, (special, *mixers, *settings))
    x, mixers = draw.normal(3, 4, 24).double(), (*_mixers(draw, 4, 24, 4), draw.normal(1))
    yield Case("fp64 streams", "ideal", (x, *mixers, _NORM_EPS, _HC_EPS))
    yield Case(HALVES, "official", (*halves(draw, 4, 1), _NORM_EPS, 0.0), decided=True)


def _normed_streams(x: torch.Tensor, eps: float) -> torch.Tensor:
    flat = compute(x).flatten(1)
    return (
        (flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)).view(x.shape).to(x.dtype)
    )


hc_head.wrong_arguments(
    {
        **_WRONG_MIXES,
        "epsilon of pre left out": {"hc_eps": 0.0},
        "scale left out": {"scale": torch.ones_like},
        "streams reversed": {"x": lambda x: x.flip(1)},
        "normalised streams collapsed": lambda a: a._replace(x=_normed_streams(a.x, a.norm_eps)),
    }
)
hc_head.wrong_step(_mixes, {"norm left out": _unnormed})
hc_head.wrong_step(
    _collapse,
    {
        "mean of the streams": lambda x, pre: compute(x).mean(1).to(x.dtype),
        "sum of the streams": lambda x, pre: compute(x).sum(1).to(x.dtype),
        "first stream only": lambda x, pre: x[:, 0],
    },
)
hc_head.wrong_results({"factor 2 of post": lambda a, y: y * 2})


@hc_head.fault("softmax instead of sigmoid")
def _(
    x: torch.Tensor, fn: torch.Tensor, base: torch.Tensor, scale: torch.Tensor, *eps: float
) -> torch.Tensor:
    return _collapse(x, torch.softmax(_mixes(x, fn, eps[0]) * scale + base, -1) + eps[1])


_WIDENS = "beside a wider factor or term it widens without the cast too"
for _contract in (hc_pre, hc_head):
    _contract.equivalent("_collapse: compute(x) -> x", _WIDENS)
for _name in ("scale", "base"):
    hc_pre.equivalent(f"_mixing_weights: {_name}.to(mix.dtype) -> {_name}", _WIDENS)
    hc_head.equivalent(f"hc_head: {_name}.to(mix.dtype) -> {_name}", _WIDENS)
for _name in ("post", "z"):
    hc_post.equivalent(f"hc_post: {_name}.to(wide.dtype) -> {_name}", _WIDENS)
hc_head.equivalent("scale shifted", "there is one scale")
