"""Manifold-constrained hyper-connections (spec/v4.md 2.2 to 2.4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from dsv4_backend.contract import Case, Draw, Operator, Tolerance, compute, operator
from dsv4_backend.mutants import add_output_faults

_DTYPES = {"ideal": torch.float32, "official": torch.bfloat16}
_SHAPES = ((0, 4, 64), (1, 1, 1), (3, 2, 7), (5, 4, 33), (17, 4, 16), (2, 4, 4096))
_NORM_EPS, _HC_EPS, _MOST_ROUNDS = 1e-6, 1e-6, 1000
Step = Callable[..., torch.Tensor]
_GENERIC = ("last token zero", "stale tail of channels", "one NaN", "tokens shifted by one")
_REASON = (
    "fp32 sums over n*d channels in any order move a mix of order 1 by less than 1e-5, which sigmoid shrinks and "
    "Sinkhorn does not grow; the one cast of y to bf16 may land on the other neighbour (2^-7)"
)


def _mixes(x: torch.Tensor, fn: torch.Tensor, norm_eps: float) -> torch.Tensor:
    """`(fn . flatten(x)) * rsqrt(mean(flatten(x)^2) + norm_eps)`: the norm scales the product, [T, m]."""
    flat = compute(x).flatten(1)  # [T, n*d], stream-major
    scale = torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    return F.linear(flat, fn.to(flat.dtype)) * scale


def _collapse(x: torch.Tensor, pre: torch.Tensor) -> torch.Tensor:
    """`sum_j pre[j] * x[j]` in the accumulation dtype, one cast to x's: [T, d]."""
    return (pre.unsqueeze(-1) * compute(x)).sum(1).to(x.dtype)


def _check_epsilons(contract: Operator, norm_eps: float, hc_eps: float) -> None:
    for name, value in (("norm_eps", norm_eps), ("hc_eps", hc_eps)):
        if not value >= 0:
            raise contract.reject(name, value, "a number >= 0")


def _mixing_weights(
    x: torch.Tensor, mix: torch.Tensor, base: torch.Tensor, scale: torch.Tensor, hc_eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pre [T, n], post [T, n] and the Sinkhorn logits [T, n, n] from mixes [T, n*(n+2)]."""
    n = x.shape[1]
    base, scale = base.to(mix.dtype), scale.to(mix.dtype)
    pre = torch.sigmoid(mix[:, :n] * scale[0] + base[:n]) + hc_eps
    post = 2 * torch.sigmoid(mix[:, n : 2 * n] * scale[1] + base[n : 2 * n])
    return pre, post, (mix[:, 2 * n :] * scale[2] + base[2 * n :]).unflatten(-1, (n, n))


def sinkhorn(logits: torch.Tensor, iterations: int, eps: float) -> torch.Tensor:
    """Nearly doubly stochastic matrices from logits [..., n, n]: `iterations` row and as many column passes.

    The first row pass is a softmax to which eps is added; every later pass divides by (sum + eps); columns come last.
    Source: spec/v4.md 2.3 [OFF-K].
    """
    comb = torch.softmax(logits, -1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return comb


@operator(
    "hc_pre(Tensor x, Tensor fn, Tensor base, Tensor scale, int sinkhorn_iters, float norm_eps, float hc_eps)"
    " -> (Tensor y, Tensor post, Tensor comb)",
    rows=(2,),
    arguments={"x": "float [T, n, d]", "fn": "f32 [m, n*d]", "base": "f32 [m]", "scale": "f32 [3]"},
    tolerance=Tolerance(reason=_REASON, ideal=(1e-5, 2e-5), official=(1e-5, 2**-7)),
)
def hc_pre(
    x: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    sinkhorn_iters: int,
    norm_eps: float,
    hc_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input of a sub-block from the n residual streams, and the weights that mix its output back.

    x: [T, n, d] float; fn: fp32 [n*(n+2), n*d]; base: fp32 [n*(n+2)]; scale: fp32 [3];
    sinkhorn_iters: 1 to 1000, 20 in V4; norm_eps: >= 0, added to the mean square over all n*d channels;
    hc_eps: >= 0, added to pre and inside Sinkhorn.
    With mix = (fn . flatten(x)) / sqrt(mean(x^2) + norm_eps), stream-major:
        pre[j]    = sigmoid(mix[j] * scale[0] + base[j]) + hc_eps
        post[j]   = 2 * sigmoid(mix[n+j] * scale[1] + base[n+j])
        comb[j,k] = sinkhorn(mix[2n+n*j+k] * scale[2] + base[2n+n*j+k])
    Returns y = sum_j pre[j] * x[j], [T, d] in x's dtype (fp32 sum, one cast); post fp32 [T, n]; comb fp32 [T, n, n].
    T = 0 gives empty results. Source: spec/v4.md 2.2, 2.3 [OFF-M, OFF-K].
    """
    pre, post, logits = _mixing_weights(x, _mixes(x, fn, norm_eps), base, scale, hc_eps)
    return _collapse(x, pre), post, sinkhorn(logits, sinkhorn_iters, hc_eps)


@hc_pre.shapes
def _(
    x: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    sinkhorn_iters: int,
    norm_eps: float,
    hc_eps: float,
) -> None:
    n = x.shape[1]
    if n * x.shape[2] == 0:
        raise hc_pre.reject("x", f"shape {tuple(x.shape)}", "at least one stream and one channel")
    if fn.shape[0] != n * (n + 2):
        raise hc_pre.reject("fn", f"shape {tuple(fn.shape)}", f"{n * (n + 2)} rows, n*(n+2) for n = {n} streams")
    if not 1 <= sinkhorn_iters <= _MOST_ROUNDS:
        raise hc_pre.reject("sinkhorn_iters", sinkhorn_iters, f"1 to {_MOST_ROUNDS}")
    _check_epsilons(hc_pre, norm_eps, hc_eps)


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


def _extreme_pre_cases(draw: Draw, profile: str, dtype: torch.dtype) -> Iterator[Case]:
    fn, base = _mixers(draw, 4, 24, 24)
    scale = draw.normal(3)
    settings = 3, _NORM_EPS, _HC_EPS
    x = draw.normal(12, 4, 48, dtype=dtype)[::3, :, ::2]
    yield Case("strided", profile, (x, draw.normal(24, 192, scale=0.1)[:, ::2], base, scale, *settings))
    for name, logits in (
        ("slow to converge", torch.tensor([4.0, 0, 0, 0, 8, 0, 4, 0, 0, 4, 0, 0, 8, 0, 0, 4])),
        ("one stream shut off", torch.tensor([-30.0, 0, 1, 2]).repeat(4)),
        ("logits beyond the range of exp", torch.tensor([120.0, 118, 0, 60]).repeat(4)),
    ):
        x = draw.normal(3, 4, 24, dtype=dtype)
        yield Case(name, profile, (x, fn, torch.cat((base[:8], logits)), scale, 20, _NORM_EPS, _HC_EPS))
    special = draw.normal(4, 4, 24, dtype=dtype)
    special[0, 1, 3], special[1, 2, 5], special[2] = float("nan"), float("inf"), 0.0
    yield Case("NaN, infinity, zero row", profile, (special, fn, base, scale, *settings))


add_output_faults(hc_pre, *_GENERIC)


def _exponentials_to_comb(comb: torch.Tensor, iterations: int, row_eps: float, column_eps: float) -> torch.Tensor:
    """Sinkhorn from its second pass on, with an epsilon for each direction."""
    comb = comb / (comb.sum(-2, keepdim=True) + column_eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + row_eps)
        comb = comb / (comb.sum(-2, keepdim=True) + column_eps)
    return comb


def _arguments_fault(name: str, edit: Callable[..., tuple[Any, ...]]) -> None:
    """hc_pre of other arguments: edit maps (x, fn, base, scale, sinkhorn_iters, norm_eps, hc_eps) to such."""
    hc_pre.fault(name)(lambda *args: hc_pre.reference(*edit(*args)))


def _results_fault(name: str, edit: Callable[..., tuple[torch.Tensor, ...]]) -> None:
    """hc_pre with other results: edit maps (y, post, comb, hc_eps) to (y, post, comb)."""
    hc_pre.fault(name)(lambda *args: edit(*hc_pre.reference(*args), args[-1]))


def _steps_fault(name: str, mixes: Step = _mixes, passes: Step = sinkhorn) -> None:
    """hc_pre with another way from (x, fn, norm_eps) to its mixes, or from (logits, sinkhorn_iters, hc_eps) to comb."""

    @hc_pre.fault(name)
    def _(x: torch.Tensor, fn: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
        base, scale, rounds, norm_eps, hc_eps = rest
        pre, post, logits = _mixing_weights(x, mixes(x, fn, norm_eps), base, scale, hc_eps)
        return _collapse(x, pre), post, passes(logits, rounds, hc_eps)


def _norm_each_stream(x: torch.Tensor, fn: torch.Tensor, eps: float) -> torch.Tensor:
    wide = compute(x)
    return F.linear((wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).flatten(1), fn)


def _channel_major(x: torch.Tensor, fn: torch.Tensor, eps: float) -> torch.Tensor:
    return _mixes(x.mT.reshape(x.shape), fn, eps)


def _without_last_stream(x: torch.Tensor, fn: torch.Tensor, eps: float) -> torch.Tensor:
    return _mixes(x, fn * (torch.arange(fn.shape[1]) < fn.shape[1] - x.shape[2]), eps)


def _exchange_pre_and_post(fn: torch.Tensor, n: int) -> torch.Tensor:
    return torch.cat((fn[n : 2 * n], fn[:n], fn[2 * n :]))


_arguments_fault("norm epsilon left out", lambda *args: (*args[:5], 0.0, args[6]))
_arguments_fault("fn rounded to bf16", lambda x, fn, *rest: (x, fn.bfloat16().float(), *rest))
_arguments_fault("one scale for all", lambda x, fn, base, scale, *rest: (x, fn, base, scale[:1].expand(3), *rest))
_arguments_fault("base left out", lambda x, fn, base, *rest: (x, fn, torch.zeros_like(base), *rest))
_arguments_fault("one Sinkhorn round too few", lambda *args: (*args[:4], args[4] - 1, *args[5:]))
_arguments_fault("pre and post exchanged", lambda x, fn, *rest: (x, _exchange_pre_and_post(fn, x.shape[1]), *rest))
_steps_fault("norm left out", mixes=lambda x, fn, eps: F.linear(compute(x).flatten(1), fn))
_steps_fault("norm of each stream alone", mixes=_norm_each_stream)
_steps_fault("channel-major flattening", mixes=_channel_major)
_steps_fault("last stream not mixed", mixes=_without_last_stream)
_steps_fault("softmax without epsilon", passes=lambda c, k, eps: _exponentials_to_comb(c.softmax(-1), k, eps, eps))
_steps_fault(
    "row passes without epsilon", passes=lambda c, k, eps: _exponentials_to_comb(c.softmax(-1) + eps, k, 0.0, eps)
)
_steps_fault(
    "column passes without epsilon", passes=lambda c, k, eps: _exponentials_to_comb(c.softmax(-1) + eps, k, eps, 0.0)
)
_steps_fault(
    "exp without the row maximum",
    passes=lambda c, k, eps: _exponentials_to_comb(c.exp() / c.exp().sum(-1, keepdim=True) + eps, k, eps, eps),
)
_steps_fault("columns before rows", passes=lambda c, k, eps: sinkhorn(c.mT, k, eps).mT)
_steps_fault("softmax alone", passes=lambda c, k, eps: c.softmax(-1))
_results_fault("a row pass too many", lambda y, post, comb, eps: (y, post, comb / (comb.sum(-1, keepdim=True) + eps)))
_results_fault("comb transposed", lambda y, post, comb, eps: (y, post, comb.mT))
_results_fault("comb of the previous token", lambda y, post, comb, eps: (y, post, comb.roll(1, 0)))
_results_fault("post without its factor 2", lambda y, post, comb, eps: (y, post / 2, comb))
_results_fault("post with epsilon", lambda y, post, comb, eps: (y, post + eps, comb))


@hc_pre.fault("pre without epsilon")
def _(x: torch.Tensor, fn: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    base, scale, _, norm_eps, hc_eps = rest
    _, post, comb = hc_pre.reference(x, fn, *rest)
    pre, _, _ = _mixing_weights(x, _mixes(x, fn, norm_eps), base, scale, hc_eps)
    return _collapse(x, pre - hc_eps), post, comb


@operator(
    "hc_post(Tensor z, Tensor x, Tensor post, Tensor comb) -> Tensor",
    rows=(3,),
    arguments={"z": "float [T, d]", "x": "float [T, n, d]", "post": "f32 [T, n]", "comb": "f32 [T, n, n]"},
    tolerance=Tolerance(
        reason="fp32 sums of n + 1 products in any order; the one cast to bf16 may land on the other neighbour (2^-7)",
        ideal=(1e-5, 1e-6),
        official=(1e-5, 2**-7),
    ),
)
def hc_post(z: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    """New residual streams `x'[k] = post[k] * z + sum_j comb[j, k] * x[j]`: the sum runs over comb's first index.

    z: [T, d] float, the sub-block's output; x: [T, n, d] of the same dtype, the streams that hc_pre saw;
    post: fp32 [T, n]; comb: fp32 [T, n, n].
    Returns [T, n, d] in x's dtype: fp32 inside, one cast at the end. T = 0 gives an empty result.
    Source: spec/v4.md 2.4 [OFF-M].
    """
    wide = compute(x)
    mixed = torch.matmul(comb.to(wide.dtype).mT, wide)
    return (post.to(wide.dtype).unsqueeze(-1) * z.to(wide.dtype).unsqueeze(1) + mixed).to(x.dtype)


@hc_post.shapes
def _(z: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> None:
    if z.dtype != x.dtype:
        raise hc_post.reject("z", str(z.dtype), f"{x.dtype} like x")


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
            "NaN, infinity, zero row", profile, (z, x, draw.uniform(4, 4, low=0.1), draw.uniform(4, 4, 4, low=0.1))
        )


add_output_faults(hc_post, *_GENERIC)


def _post_fault(name: str, edit: Callable[..., tuple[torch.Tensor, ...]]) -> None:
    """hc_post of other arguments: edit maps (z, x, post, comb) to such."""
    hc_post.fault(name)(lambda *args: hc_post.reference(*edit(*args)))


_post_fault("comb untransposed", lambda z, x, post, comb: (z, x, post, comb.mT))
_post_fault("comb rounded to bf16", lambda z, x, post, comb: (z, x, post, comb.bfloat16()))
_post_fault("comb left out", lambda z, x, post, comb: (z, x, post, torch.eye(x.shape[1]).expand_as(comb)))
_post_fault("post rounded to bf16", lambda z, x, post, comb: (z, x, post.bfloat16(), comb))
_post_fault("post left out", lambda z, x, post, comb: (z, x, torch.ones_like(post), comb))
_post_fault("output left out", lambda z, x, post, comb: (torch.zeros_like(z), x, post, comb))
_post_fault("streams left out", lambda z, x, post, comb: (z, torch.zeros_like(x), post, comb))
_post_fault("last stream not mixed in", lambda z, x, post, comb: (z, F.pad(x[:, :-1], (0, 0, 0, 1)), post, comb))
_post_fault("streams reversed", lambda z, x, post, comb: (z, x, post.flip(-1), comb.flip(-1)))


@hc_post.fault("mix rounded to bf16 before the sum")
def _(z: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    mixed = torch.matmul(comb.mT, compute(x)).bfloat16()
    return (post.unsqueeze(-1) * compute(z).unsqueeze(1) + mixed).to(x.dtype)


@operator(
    "hc_head(Tensor x, Tensor fn, Tensor base, Tensor scale, float norm_eps, float hc_eps) -> Tensor",
    rows=(4,),
    arguments={"x": "float [T, n, d]", "fn": "f32 [n, n*d]", "base": "f32 [n]", "scale": "f32 [1]"},
    tolerance=Tolerance(reason=_REASON, ideal=(1e-5, 2e-5), official=(1e-5, 2**-7)),
)
def hc_head(
    x: torch.Tensor, fn: torch.Tensor, base: torch.Tensor, scale: torch.Tensor, norm_eps: float, hc_eps: float
) -> torch.Tensor:
    """The n residual streams collapsed into one, before the final norm.

    x: [T, n, d] float; fn: fp32 [n, n*d]; base: fp32 [n]; scale: fp32 [1]; norm_eps, hc_eps: >= 0 as in hc_pre.
    Returns sum_j pre[j] * x[j] with pre = sigmoid(mix * scale + base) + hc_eps and mix as in hc_pre: [T, d] in x's
    dtype (fp32 sum, one cast). T = 0 gives an empty result. Source: spec/v4.md 2.4 [OFF-M].
    """
    mix = _mixes(x, fn, norm_eps)
    return _collapse(x, torch.sigmoid(mix * scale.to(mix.dtype) + base.to(mix.dtype)) + hc_eps)


@hc_head.shapes
def _(
    x: torch.Tensor, fn: torch.Tensor, base: torch.Tensor, scale: torch.Tensor, norm_eps: float, hc_eps: float
) -> None:
    if x.shape[1] * x.shape[2] == 0:
        raise hc_head.reject("x", f"shape {tuple(x.shape)}", "at least one stream and one channel")
    _check_epsilons(hc_head, norm_eps, hc_eps)


@hc_head.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in _DTYPES.items():
        for tokens, n, d in _SHAPES:
            mixers = *_mixers(draw, n, d, n), draw.normal(1)
            yield Case(
                f"{tokens}x{n}x{d}", profile, (draw.normal(tokens, n, d, dtype=dtype), *mixers, _NORM_EPS, _HC_EPS)
            )
        mixers = *_mixers(draw, 4, 24, 4), draw.normal(1)
        settings = _NORM_EPS, _HC_EPS
        yield Case("large hc_eps", profile, (draw.normal(4, 4, 24, dtype=dtype), *mixers, _NORM_EPS, 0.03))
        tiny = draw.normal(4, 4, 24, dtype=dtype, scale=1e-3)
        yield Case("norm epsilon matters", profile, (tiny, *mixers, *settings))
        yield Case("strided", profile, (draw.normal(12, 4, 48, dtype=dtype)[::3, :, ::2], *mixers, *settings))
        special = draw.normal(4, 4, 24, dtype=dtype)
        special[0, 1, 3], special[1, 2, 5], special[2] = float("nan"), float("inf"), 0.0
        yield Case("NaN, infinity, zero row", profile, (special, *mixers, *settings))


add_output_faults(hc_head, *_GENERIC)


def _head_fault(name: str, edit: Callable[..., tuple[Any, ...]]) -> None:
    """hc_head of other arguments: edit maps (x, fn, base, scale, norm_eps, hc_eps) to such."""
    hc_head.fault(name)(lambda *args: hc_head.reference(*edit(*args)))


def _normed_streams(x: torch.Tensor, *rest: Any) -> tuple[Any, ...]:
    flat = compute(x).flatten(1)
    normed = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + rest[-2])
    return normed.view(x.shape).to(x.dtype), *rest


_head_fault("epsilon of pre left out", lambda *args: (*args[:5], 0.0))
_head_fault("norm epsilon left out", lambda *args: (*args[:4], 0.0, args[5]))
_head_fault("base left out", lambda x, fn, base, *rest: (x, fn, torch.zeros_like(base), *rest))
_head_fault("scale left out", lambda x, fn, base, scale, *rest: (x, fn, base, torch.ones_like(scale), *rest))
_head_fault("streams reversed", lambda x, *rest: (x.flip(1), *rest))
_head_fault("fn rounded to bf16", lambda x, fn, *rest: (x, fn.bfloat16().float(), *rest))
_head_fault("normalised streams collapsed", _normed_streams)
hc_head.fault("mean of the streams")(lambda x, *rest: compute(x).mean(1).to(x.dtype))
hc_head.fault("sum of the streams")(lambda x, *rest: compute(x).sum(1).to(x.dtype))
hc_head.fault("first stream only")(lambda x, *rest: x[:, 0])
hc_head.fault("factor 2 of post")(lambda *args: hc_head.reference(*args) * 2)


@hc_head.fault("norm left out")
def _(x: torch.Tensor, fn: torch.Tensor, base: torch.Tensor, scale: torch.Tensor, *eps: float) -> torch.Tensor:
    return _collapse(x, torch.sigmoid(F.linear(compute(x).flatten(1), fn) * scale + base) + eps[1])


@hc_head.fault("softmax instead of sigmoid")
def _(x: torch.Tensor, fn: torch.Tensor, base: torch.Tensor, scale: torch.Tensor, *eps: float) -> torch.Tensor:
    return _collapse(x, torch.softmax(_mixes(x, fn, eps[0]) * scale + base, -1) + eps[1])
