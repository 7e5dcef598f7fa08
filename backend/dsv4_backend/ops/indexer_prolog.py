"""What the lightning indexer scores with, W8A8 and int8 keys (spec/v4.md 4.5, deployments.md 8)."""

from __future__ import annotations

import torch

from dsv4_backend.contract import Tolerance, compute, operator
from dsv4_backend.ops.cache_bytes import WRITES
from dsv4_backend.ops.hadamard import sylvester
from dsv4_backend.ops.int8 import int8_gemm
from dsv4_backend.ops.qkv_norm_rope import norm_rope
from dsv4_backend.ops.rope import apply_rope
from dsv4_backend.ops.token_quant import int8_token_quant
from dsv4_backend.relations import require, slots_in

KEYS = WRITES["indexer_int8"]


def rotate(x: torch.Tensor) -> torch.Tensor:
    """X [.., n] times the +-1 Hadamard matrix, rounded once: a factor would choose nothing."""
    wide = compute(x)
    return (wide @ sylvester(wide)).to(x.dtype)


def head_weights(x: torch.Tensor, weights_proj: torch.Tensor) -> torch.Tensor:
    """fp16 [T, HI] of fp32 sums."""
    wide = x.float()
    return (wide @ weights_proj.to(wide.dtype).T).half()


@operator(
    "indexer_prolog_int8(Tensor x, Tensor qr, Tensor qr_scale, Tensor wq_b, Tensor wq_b_scale, "
    "Tensor weights_proj, Tensor pooled, Tensor k_norm, float eps, Tensor cos, Tensor sin, "
    "Tensor entry_cos, Tensor entry_sin, Tensor(a!) cache, Tensor slots, int block_size) -> "
    "(Tensor q, Tensor q_scale, Tensor weights)",
    rows=(11, 12, 21),
    arguments={
        "x": "bf16 [T, d]",
        "qr": "i8 [T, K]",
        "qr_scale": "f32 [T]",
        "wq_b": "i8 [N, K]",
        "wq_b_scale": "f32 [N]",
        "weights_proj": "float [HI, d]",
        "pooled": "bf16 [M, D]",
        "k_norm": "float [D]",
        "eps": "a number >= 0",
        "cos": "f32 [T, r]",
        "sin": "f32 [T, r]",
        "entry_cos": "f32 [M, r]",
        "entry_sin": "f32 [M, r]",
        "cache": "u8 [num_blocks, page]",
        "slots": "i64 [M]",
        "block_size": "at least 1",
    },
    relations=(
        require("wq_b", "N == HI * D", "{N} rows", "{HI * D}, {HI} heads of {D} channels"),
        require("pooled", "D >= 1 and (D & (D - 1)) == 0", "{D} channels", "a power of two"),
        require(
            "cos",
            "r % 2 == 0 and 2 <= r <= D",
            "{r} channels",
            "an even number of channels, 2 to D = {D}",
        ),
        require(
            "cache",
            "num_blocks >= 1 and page == block_size * (D + 2)",
            "shape {sizes(cache)}",
            "[num_blocks >= 1, {block_size * (D + 2)}] for {block_size} entries of indexer_int8",
        ),
        *slots_in("num_blocks * block_size", once=True),
    ),
    tolerance=Tolerance(
        reason="the cases keep every value away from the points where a code or a bf16 rounding "
        "would tip; scales are quotients of such values, rounded to fp16; weights are fp32 sums of "
        "up to 256 products in any order, rounded to fp16 (2^-10: its other neighbour)",
        **{"a2a3-int8": (1e-6, 2**-10)},
    ),
)
def indexer_prolog_int8(
    x: torch.Tensor,
    qr: torch.Tensor,
    qr_scale: torch.Tensor,
    wq_b: torch.Tensor,
    wq_b_scale: torch.Tensor,
    weights_proj: torch.Tensor,
    pooled: torch.Tensor,
    k_norm: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    entry_cos: torch.Tensor,
    entry_sin: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, weights and keys of the indexer: products, norm, RoPE, Hadamard, int8, cache write.

    x: bf16 [T, d]; qr: int8 [T, K] with qr_scale fp32 [T] (`rms_norm_int8` of wq_a's product);
    wq_b: int8 [HI*D, K] with wq_b_scale fp32 [HI*D]; weights_proj: float [HI, d]; pooled: bf16 [M,
    D], the keys as `compress_pool` gives them, D a power of two, with k_norm [D] and eps; cos, sin:
    fp32 [T, r] and entry_cos, entry_sin: fp32 [M, r], of the last r channels; cache: uint8
    [num_blocks, block_size * (D + 2)] in the format indexer_int8, mutated; slots: int64 [M], -1
    skips a row. Queries (`int8_gemm`) and keys (`rms_norm`) are rotated, multiplied by the +-1
    matrix with one rounding to bf16, and quantised per row: amax / 127. Returns q int8 [T, HI, D],
    q_scale fp16 [T, HI] and weights fp16 [T, HI] (fp32 sums, one cast), as `lightning_indexer_int8`
    takes them. A scale that fp16 does not hold has no promised value. ArgumentError (nothing
    written) for a slot outside the cache or given twice. Source: spec/v4.md 4.5 [OFF-M Indexer];
    aclnnRotateQuant, aclnnScatterPaKvCache; spec/deployments.md 8.
    """
    q = int8_gemm.reference(qr, qr_scale, wq_b, wq_b_scale).unflatten(-1, (-1, pooled.shape[1]))
    apply_rope.reference(q, cos, sin)
    keys = norm_rope(pooled, k_norm, eps, entry_cos, entry_sin)
    KEYS.reference(cache, rotate(keys), slots, block_size)
    codes, scale = int8_token_quant.reference(rotate(q))
    return codes, scale.half(), head_weights(x, weights_proj)
