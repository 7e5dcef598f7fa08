"""What the lightning indexer scores with, in bf16 (spec/v4.md 4.5, deployments.md 8)."""

from __future__ import annotations

import torch

from dsv4_backend.contract import Tolerance, operator
from dsv4_backend.ops.indexer_prolog import HEADS, SIDES, fp32_weights, heads_of
from dsv4_backend.ops.qkv_norm_rope import TURNED, norm_rope


@operator(
    "indexer_prolog(Tensor x, Tensor qr, Tensor wq_b, Tensor beside, Tensor weights_proj, "
    "Tensor pooled, Tensor k_norm, float eps, Tensor cos, Tensor sin, Tensor entry_cos, "
    "Tensor entry_sin) -> (Tensor q, Tensor keys, Tensor weights, Tensor product)",
    rows=(9, 11, 12),
    arguments={
        **SIDES,
        "qr": "bf16 [T, K]",
        "wq_b": "bf16 [N, K]",
        "beside": "bf16 [P, K]",
    },
    relations=(HEADS, TURNED),
    tolerance=Tolerance(
        reason="the cases keep every value away from the points where a bf16 rounding would tip; "
        "weights are fp32 sums of up to 256 products in any order",
        bf16=(2e-6, 2e-6),
    ),
)
def indexer_prolog(
    x: torch.Tensor,
    qr: torch.Tensor,
    wq_b: torch.Tensor,
    beside: torch.Tensor,
    weights_proj: torch.Tensor,
    pooled: torch.Tensor,
    k_norm: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    entry_cos: torch.Tensor,
    entry_sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and weights of the indexer in bf16: products, norm, RoPE; and attention's
    product of the same latent queries.

    x: bf16 [T, d]; qr: bf16 [T, K] (`rms_norm` of wq_a's product); wq_b: bf16 [HI*D, K]; beside:
    bf16 [P, K], attention's wq_b; weights_proj: bf16 [HI, d]; pooled: bf16 [M, D], the keys as
    `compress_pool` gives them, with k_norm bf16 [D] and eps; cos, sin: fp32 [T, r] and entry_cos,
    entry_sin: fp32 [M, r], of the last r channels. Products of qr sum in fp32 and round to bf16,
    before queries are rotated; keys are `rms_norm` of pooled, rotated. No Hadamard: it would cancel
    between unrounded rows. Returns q bf16 [T, HI, D], keys bf16 [M, D] and weights fp32 [T, HI], as
    `lightning_indexer` takes them (its factor is positive and chooses nothing), and qr's product
    with beside, bf16 [T, P]. No gradient. Source: spec/v4.md 4.2, 4.5 [OFF-M Indexer];
    aclnnGroupedMatmulV5, aclnnInplacePartialRotaryMul; spec/deployments.md 8.
    """
    wide = qr.detach().float()
    products = [(wide @ w.detach().float().T).to(qr.dtype) for w in (wq_b, beside)]
    q = heads_of(products[0], weights_proj, cos, sin)
    keys = norm_rope(pooled, k_norm, eps, entry_cos, entry_sin).detach()
    return q, keys, fp32_weights(x, weights_proj), products[1]
