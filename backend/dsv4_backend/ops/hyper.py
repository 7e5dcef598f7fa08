"""Manifold-constrained hyper-connections (spec/v4.md 2.2 to 2.4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dsv4_backend.contract import Tolerance, compute, operator
from dsv4_backend.relations import require

_MOST_ROUNDS = 1000
MIX_REASON = (
    "fp32 sums over n*d channels in any order move a mix of order 1 by less than 1e-5, which "
    "sigmoid shrinks and Sinkhorn does not grow; the one cast of y to bf16 may land on the other "
    "neighbour (2^-7)"
)

_EPSILONS = {"norm_eps": "a number >= 0", "hc_eps": "a number >= 0"}
MIX_ARGUMENTS = {
    "hc_pre": {
        "x": "float [T, n, d]",
        "fn": "f32 [n*(n+2), n*d]",
        "base": "f32 [n*(n+2)]",
        "scale": "f32 [3]",
        "sinkhorn_iters": f"1 to {_MOST_ROUNDS}",
        **_EPSILONS,
    },
    "hc_head": {
        "x": "float [T, n, d]",
        "fn": "f32 [n, n*d]",
        "base": "f32 [n]",
        "scale": "f32 [1]",
        **_EPSILONS,
    },
}
"""Specification lines of the operators that mix streams, here and in HF32."""
MIX_RELATIONS = (
    require("x", "n * d >= 1", "shape {sizes(x)}", "at least one stream and one channel"),
)


def _mixes(x: torch.Tensor, fn: torch.Tensor, norm_eps: float) -> torch.Tensor:
    """`(fn . flatten(x)) * rsqrt(mean(flatten(x)^2) + norm_eps)`: the norm scales the product,
    [T, m].
    """
    flat = compute(x).flatten(1)  # [T, n*d], stream-major
    scale = torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    return F.linear(flat, fn.to(flat.dtype)) * scale


def _collapse(x: torch.Tensor, pre: torch.Tensor) -> torch.Tensor:
    """`sum_j pre[j] * x[j]` in the accumulation dtype, one cast to x's: [T, d]."""
    return (pre.unsqueeze(-1) * compute(x)).sum(1).to(x.dtype)


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
    """Nearly doubly stochastic matrices from logits [..., n, n]:
    `iterations` row and as many column passes.

    The first row pass is a softmax to which eps is added; every later pass divides by (sum + eps);
    columns come last. Source: spec/v4.md 2.3 [OFF-K].
    """
    comb = torch.softmax(logits, -1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return comb


@operator(
    "hc_pre(Tensor x, Tensor fn, Tensor base, Tensor scale, int sinkhorn_iters, float norm_eps, "
    "float hc_eps) -> (Tensor y, Tensor post, Tensor comb)",
    rows=(2,),
    arguments=MIX_ARGUMENTS["hc_pre"],
    relations=MIX_RELATIONS,
    tolerance=Tolerance(reason=MIX_REASON, ideal=(1e-5, 2e-5), official=(1e-5, 2**-7)),
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
    sinkhorn_iters: 1 to 1000, 20 in V4; norm_eps: >= 0, added to the mean square over all n*d
    channels;
    hc_eps: >= 0, added to pre and inside Sinkhorn.
    With mix = (fn . flatten(x)) / sqrt(mean(x^2) + norm_eps), stream-major:
        pre[j]    = sigmoid(mix[j] * scale[0] + base[j]) + hc_eps
        post[j]   = 2 * sigmoid(mix[n+j] * scale[1] + base[n+j])
        comb[j,k] = sinkhorn(mix[2n+n*j+k] * scale[2] + base[2n+n*j+k])
    Returns y = sum_j pre[j] * x[j], [T, d] in x's dtype (fp32 sum, one cast); post fp32 [T, n];
    comb fp32 [T, n, n]. T = 0 gives empty results. Source: spec/v4.md 2.2, 2.3 [OFF-M, OFF-K].
    """
    pre, post, logits = _mixing_weights(x, _mixes(x, fn, norm_eps), base, scale, hc_eps)
    return _collapse(x, pre), post, sinkhorn(logits, sinkhorn_iters, hc_eps)


@operator(
    "hc_post(Tensor z, Tensor x, Tensor post, Tensor comb) -> Tensor",
    rows=(3,),
    arguments={
        "z": "float like x [T, d]",
        "x": "float [T, n, d]",
        "post": "f32 [T, n]",
        "comb": "f32 [T, n, n]",
    },
    tolerance=Tolerance(
        reason="fp32 sums of n + 1 products in any order; the one cast to bf16 may land on the "
        "other neighbour (2^-7)",
        ideal=(1e-5, 1e-6),
        official=(1e-5, 2**-7),
    ),
)
def hc_post(
    z: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor
) -> torch.Tensor:
    """New residual streams `x'[k] = post[k] * z + sum_j comb[j, k] * x[j]`:
    the sum runs over comb's first index.

    z: [T, d] float, the sub-block's output; x: [T, n, d] of the same dtype, the streams that hc_pre
    saw;
    post: fp32 [T, n]; comb: fp32 [T, n, n].
    Returns [T, n, d] in x's dtype: fp32 inside, one cast at the end. T = 0 gives an empty result.
    Source: spec/v4.md 2.4 [OFF-M].
    """
    wide = compute(x)
    mixed = torch.matmul(comb.to(wide.dtype).mT, wide)
    return (post.to(wide.dtype).unsqueeze(-1) * z.to(wide.dtype).unsqueeze(1) + mixed).to(x.dtype)


@operator(
    "hc_head(Tensor x, Tensor fn, Tensor base, Tensor scale, float norm_eps, float hc_eps)"
    " -> Tensor",
    rows=(4,),
    arguments=MIX_ARGUMENTS["hc_head"],
    relations=MIX_RELATIONS,
    tolerance=Tolerance(reason=MIX_REASON, ideal=(1e-5, 2e-5), official=(1e-5, 2**-7)),
)
def hc_head(
    x: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
) -> torch.Tensor:
    """The n residual streams collapsed into one, before the final norm.

    x: [T, n, d] float; fn: fp32 [n, n*d]; base: fp32 [n]; scale: fp32 [1]; norm_eps, hc_eps: >= 0
    as in hc_pre. Returns sum_j pre[j] * x[j] with pre = sigmoid(mix * scale + base) + hc_eps and
    mix as in hc_pre: [T, d] in x's dtype (fp32 sum, one cast). T = 0 gives an empty result. Source:
    spec/v4.md 2.4 [OFF-M].
    """
    mix = _mixes(x, fn, norm_eps)
    return _collapse(x, torch.sigmoid(mix * scale.to(mix.dtype) + base.to(mix.dtype)) + hc_eps)
