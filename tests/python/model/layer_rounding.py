"""The rounding points of spec/v4.md section 10, column "Official", by name.

Rows that say fp32 have no point to remove: at the positions of a test fp32 is too near the oracle's
float64 for any limit. That they round to nothing narrower is what OTHERS is for.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dsv4_backend.proofs.numerics import (
    BF16,
    Array,
    dequantise,
    fp8_quantised,
    quantise_fp4,
    round_to,
)

LINEAR_BLOCK, KV_BLOCK, INDEX_BLOCK = 128, 64, 32


def _each(names: str, *steps: str) -> tuple[str, ...]:
    return tuple(f"{name} {step}" for name in names.split(", ") for step in steps)


POINTS: dict[str, tuple[str, ...]] = {
    "hc_post": ("attn hc_post", "ffn hc_post"),
    "hc_pre": ("attn hc_pre", "ffn hc_pre"),
    "RMSNorm": ("attn_norm", "ffn_norm", "q_norm", "kv_norm"),
    "per-head q norm": _each("head norm", "square", "mean", "eps", "root", "product"),
    "RoPE product": _each("q, kv, output, index q", "rope"),
    "window kv QDQ": ("window QDQ",),
    "pooled entry": _each("entry, index key", "pooled", "norm", "rope"),
    "compressed kv QDQ": ("entry QDQ",),
    "indexer Hadamard": ("Hadamard", *_each("index q, index key", "Hadamard cast")),
    "indexer q/k quantisation": _each("index q, index key", "QDQ"),
    "index score": (
        *_each("index weight", "product", "scale"),
        *_each("index score", "dot", "term", "sum"),
    ),
    "QK, softmax, PV": ("probabilities", "running maximum", "attention output"),
    "linears": _each("wq_a, wkv, wq_b, index wq_b, wo_b", "input", "output"),
    "wo_a": ("wo_a output", "wo_a weight"),
    "expert input quantisation": _each("expert, shared", "input", "hidden QDQ"),
    "SwiGLU": _each("expert, shared", "gate", "up", "hidden"),
    "routing weight": ("weight before w2",),
    "routed sum": ("expert output", "shared output", "MoE sum"),
    "MTP input": ("enorm", "hnorm", *_each("e_proj, h_proj", "input", "output"), "MTP sum"),
}
"""Row of section 10 (linears: 6.3, MTP input: 8.1) -> names of its points."""

EXACT = {"wo_a weight": "an e4m3 value times a power of two is a bf16 value"}
"""Points whose removal no input can show, and why."""

OTHERS: dict[str, str] = {
    "hc mix": "HF32 or TF32 elsewhere",
    "hc comb": "transformers",
    "cos and sin": "transformers",
    "compressor projections": "transformers, vLLM",
    "compressor softmax": "transformers",
    "QK scores": "transformers",
    "wo_a input": "vLLM: FP8 blocks of 128",
    "gate logits": "transformers",
    "silu": "transformers",
    "routed sum": "transformers",
}
"""Where other implementations round and the official one keeps fp32 (or bf16: wo_a)."""


@dataclass(frozen=True)
class Rounding:
    """What rounds: every point but those in `without`, and those of OTHERS in `added`.

    asked: every name that a forward came by.
    """

    without: frozenset[str] = frozenset()
    added: frozenset[str] = frozenset()
    asked: set[str] = field(default_factory=set, compare=False)

    def has(self, point: str) -> bool:
        """Whether a point of POINTS is there."""
        self.asked.add(point)
        return point not in self.without

    def adds(self, other: str) -> bool:
        """Whether a rounding of OTHERS is there."""
        self.asked.add(other)
        return other in self.added

    def bf16(self, point: str, x: Array) -> Array:
        """`x` float64, rounded to bf16."""
        return round_to(BF16, x) if self.has(point) else x

    def kept(self, other: str, x: Array) -> Array:
        """`x` as it is, where only others round to bf16."""
        return round_to(BF16, x) if self.adds(other) else x

    def fp8(self, point: str, x: Array, block: int = LINEAR_BLOCK) -> Array:
        """`x` through e4m3 and back, blocks of the last dimension sharing a scale (6.1)."""
        return fp8_quantised(x, block) if self.has(point) else x

    def fp4(self, point: str, x: Array) -> Array:
        """`x` through e2m1 and back in blocks of 32 (6.2)."""
        if not self.has(point):
            return x
        return dequantise(*quantise_fp4(x, INDEX_BLOCK), INDEX_BLOCK)

    def kv(self, point: str, x: Array, nope: int) -> Array:
        """FP8 on the channels without RoPE, the others as they are (4.1 step 3)."""
        return np.concatenate([self.fp8(point, x[..., :nope], KV_BLOCK), x[..., nope:]], -1)
