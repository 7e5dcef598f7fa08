"""One layer of DeepSeek V4 in NumPy, a whole sequence at once, from spec/v4.md 2 to 6 and 8.1.

Every value is float64 and rounds only where `Rounding` says so. What a token sees follows from
positions and the visibility rule (4.2) alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from layer_rounding import Rounding

from dsv4_ascend.checkpoint.config import V4Config
from dsv4_ascend.checkpoint.folder import Checkpoint
from dsv4_ascend.parity.arrays import to_array
from dsv4_backend.proofs.numerics import Array, fp4_values, per_channel, tile_values, wide

TILE = 64


@dataclass(frozen=True)
class Weights:
    """The tensors of a checkpoint, float64, each with its scales multiplied in (6.3); read once."""

    checkpoint: Checkpoint
    _read: dict[str, Array] = field(default_factory=dict)

    def __call__(self, name: str) -> Array:
        if name not in self._read:
            self._read[name] = self._load(name)
        return self._read[name]

    def _load(self, name: str) -> Array:
        values = to_array(self.checkpoint.tensor(name))
        scale_name = name.removesuffix("weight") + "scale"
        if not name.endswith("weight") or scale_name not in self.checkpoint:
            return values if values.dtype == np.int64 else wide(values)
        scale = to_array(self.checkpoint.tensor(scale_name))
        if values.dtype == np.int8:
            return fp4_values(values) * per_channel(wide(scale), 32, 2 * values.shape[1])
        return tile_values(values, scale, (128, 128))


@dataclass(frozen=True)
class Given:
    """What a layer goes on with instead of its own: a near tie or a tipped bit must not spread.

    experts: ids [T, k]. rows: "window" [T, D], "entries" [T // ratio, D] and "index keys", as
    cached. chosen: entries of every token [T, K], -1 for none (CSA).
    """

    experts: Array
    rows: dict[str, Array]
    chosen: Array | None = None


def sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def plain_frequencies(dim: int, theta: float) -> Array:
    """Fp32 theta^(-2i / dim) (3.2)."""
    steps = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.asarray(np.float32(1) / np.power(np.float32(theta), steps))


def frequencies(config: V4Config, ratio: int) -> Array:
    """Fp32 RoPE frequencies of a layer (1.3): plain without compression, YaRN with."""
    dim, yarn = config.qk_rope_head_dim, config.rope_scaling
    if ratio == 0:
        return plain_frequencies(dim, config.rope_theta)
    plain = plain_frequencies(dim, config.compress_rope_theta)

    def corr(turns: float) -> float:
        length = yarn.original_max_position_embeddings / (2 * np.pi * turns)
        return float(dim * np.log(length) / (2 * np.log(config.compress_rope_theta)))

    low, high = max(np.floor(corr(yarn.beta_fast)), 0), min(np.ceil(corr(yarn.beta_slow)), dim - 1)
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return np.asarray((plain / yarn.factor * ramp + plain * (1 - ramp)).astype(np.float32))


def hadamard_matrix(size: int) -> Array:
    """Sylvester's, over the root of its size (4.5)."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.asarray(matrix / np.sqrt(size))


def sinkhorn(logits: Array, iterations: int, eps: float) -> Array:
    """[T, n, n]: softmax of rows, then columns and rows in turn, columns last (2.3)."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    matrix = powers / powers.sum(-1, keepdims=True) + eps
    for iteration in range(iterations):
        if iteration:
            matrix = matrix / (matrix.sum(-1, keepdims=True) + eps)
        matrix = matrix / (matrix.sum(-2, keepdims=True) + eps)
    return np.asarray(matrix)


@dataclass(frozen=True)
class Layer:
    """One layer, its weights below `prefix`; `kind` is "swa", "csa" or "hca".

    parts: what `run` made: streams [T, n, d], queries [T, H, D], window [T, D], entries
    [T // ratio, D], index keys, index scores, and "expert rank" [T, E], whose largest k are chosen.
    """

    config: V4Config
    weights: Weights
    prefix: str
    kind: str
    ratio: int
    hashed: bool
    r: Rounding
    parts: dict[str, Array] = field(default_factory=dict)

    def w(self, name: str) -> Array:
        """A weight of this layer."""
        return self.weights(f"{self.prefix}.{name}")

    @cached_property
    def freq(self) -> Array:
        """RoPE frequencies of this layer."""
        return frequencies(self.config, self.ratio)

    @property
    def nope(self) -> int:
        """Channels of a head without RoPE."""
        return self.config.head_dim - self.config.qk_rope_head_dim

    def run(self, x: Array, ids: Array, given: Given) -> Array:
        """Streams [T, n, d] and ids [T] of the tokens 0 .. T-1 -> their new streams (2.1)."""
        x = self._sub_block("attn", x, lambda y: self._attention(y, given))
        x = self._sub_block("ffn", x, lambda y: self._moe(y, ids, given))
        self.parts["streams"] = x
        return x

    def combine(self, next_ids: Array, x: Array) -> Array:
        """Input streams of an MTP block from the next tokens and the main model's streams (8.1)."""
        e = self._norm("enorm", self.weights("embed.weight")[next_ids])
        h = self._norm("hnorm", x)
        e, h = self._linear("e_proj", e), self._linear("h_proj", h)
        return self.r.bf16("MTP sum", e[:, None] + h)

    # What both sub-blocks are made of.

    def _norm(self, point: str, x: Array, weight: str = "") -> Array:
        """RMSNorm: one cast at the end (3.1)."""
        normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + self.config.rms_norm_eps)
        return self.r.bf16(point, self.w(f"{weight or point}.weight") * normed)

    def _linear(self, point: str, x: Array, weight: str = "") -> Array:
        """A product with FP8 weights (6.3)."""
        product = self.r.fp8(f"{point} input", x) @ self.w(f"{weight or point}.weight").T
        return self.r.bf16(f"{point} output", product)

    def _rope(self, point: str, x: Array, positions: Array, sign: float = 1.0) -> Array:
        """Adjacent pairs of the last channels turn by fp32 position times frequency (3.3)."""
        angle = wide(positions.astype(np.float32)[:, None] * self.freq)
        angle = angle.reshape(len(x), *[1] * (x.ndim - 2), -1)
        cos, sin = (self.r.kept("cos and sin", turn(sign * angle)) for turn in (np.cos, np.sin))
        first, y = x.shape[-1] - 2 * len(self.freq), x.copy()
        even, odd = x[..., first::2], x[..., first + 1 :: 2]
        y[..., first::2], y[..., first + 1 :: 2] = even * cos - odd * sin, even * sin + odd * cos
        return self.r.bf16(f"{point} rope", y)

    def _sub_block(self, site: str, x: Array, inner: Callable[[Array], Array]) -> Array:
        """A sub-block and its norm under hyper-connections (2.2, 2.4)."""
        n, r = self.config.hc_mult, self.r
        fn, base, scale = (self.w(f"hc_{site}_{part}") for part in ("fn", "base", "scale"))
        flat = x.reshape(len(x), -1)
        g = 1 / np.sqrt((flat**2).mean(-1, keepdims=True) + self.config.rms_norm_eps)
        mix = r.kept("hc mix", flat @ fn.T * g)
        pre = sigmoid(mix[:, :n] * scale[0] + base[:n]) + self.config.hc_eps
        post = 2 * sigmoid(mix[:, n : 2 * n] * scale[1] + base[n : 2 * n])
        logits = mix[:, 2 * n :] * scale[2] + base[2 * n :]
        comb = sinkhorn(logits.reshape(-1, n, n), self.config.hc_sinkhorn_iters, self.config.hc_eps)
        y = r.bf16(f"{site} hc_pre", np.einsum("tj,tjd->td", pre, x))
        z = inner(self._norm(f"{site}_norm", y))
        kept = np.einsum("tjk,tjd->tkd", r.kept("hc comb", comb), x)
        return r.bf16(f"{site} hc_post", post[:, :, None] * z[:, None] + kept)

    # Attention (4).

    def _attention(self, x: Array, given: Given) -> Array:
        t = np.arange(len(x))
        qr = self._norm("q_norm", self._linear("wq_a", x, "attn.wq_a"), "attn.q_norm")
        q = self._linear("wq_b", qr, "attn.wq_b")
        q = self._head_norm(q.reshape(len(x), self.config.num_attention_heads, -1))
        q = self.parts["queries"] = self._rope("q", q, t)
        kv = self._norm("kv_norm", self._linear("wkv", x, "attn.wkv"), "attn.kv_norm")
        self.parts["window"] = self.r.kv("window QDQ", self._rope("kv", kv, t), self.nope)
        rows, listed = given.rows["window"], self._window_list(t)
        if self.kind != "swa":
            pooled = self._pool(x, "compressor", "entry")
            self.parts["entries"] = self.r.kv("entry QDQ", pooled, self.nope)
            if self.kind == "csa":
                self._index(x, qr, t, given.rows["index keys"])
            chosen = self._visible_entries(t) if given.chosen is None else given.chosen
            rows = np.concatenate([rows, given.rows["entries"]])
            listed = np.concatenate([listed, np.where(chosen >= 0, chosen + len(x), -1)], 1)
        return self._project_out(self._rope("output", self._attend(q, rows, listed), t, -1.0))

    def _head_norm(self, q: Array) -> Array:
        """Without a weight, every step a bf16 tensor (3.1)."""
        r = self.r
        square = r.bf16("head norm square", q**2)
        mean = r.bf16("head norm mean", square.mean(-1, keepdims=True))
        summed = r.bf16("head norm eps", mean + self.config.rms_norm_eps)
        return r.bf16("head norm product", q * r.bf16("head norm root", 1 / np.sqrt(summed)))

    def _window_list(self, t: Array) -> Array:
        """Positions max(t - W + 1, 0) .. t in order, -1 up to W columns (4.6)."""
        width = self.config.sliding_window
        listed = np.maximum(t - width + 1, 0)[:, None] + np.arange(width)
        return np.where(listed <= t[:, None], listed, -1)

    def _visible_entries(self, t: Array) -> Array:
        """Entries i with (i + 1) * ratio <= t + 1, else -1 (4.2): [T, entries]."""
        entry = np.arange(len(t) // self.ratio)
        return np.where((entry + 1) * self.ratio <= t[:, None] + 1, entry, -1)

    def _pool(self, x: Array, name: str, point: str) -> Array:
        """Entries of a compressor up to their RoPE (4.3)."""
        ape, hd = self.w(f"attn.{name}.ape"), len(self.w(f"attn.{name}.norm.weight"))
        count, ratio = len(x) // self.ratio, self.ratio
        both = (x[: count * ratio] @ self.w(f"attn.{name}.{m}.weight").T for m in ("wkv", "wgate"))
        u, s = (self.r.kept("compressor projections", y).reshape(count, ratio, -1) for y in both)
        s = s + ape
        if self.kind == "csa":
            u, s = _with_previous_block(u, hd, 0.0), _with_previous_block(s, hd, -np.inf)
        p = np.exp(s - s.max(1, keepdims=True))
        p = self.r.kept("compressor softmax", p / p.sum(1, keepdims=True))
        pooled = self.r.bf16(f"{point} pooled", (p * u).sum(1))
        normed = self._norm(f"{point} norm", pooled, f"attn.{name}.norm")
        return self._rope(point, normed, np.arange(count) * ratio)

    def _index_rounded(self, point: str, x: Array) -> Array:
        """Hadamard, then FP4 (4.5)."""
        if self.r.has("Hadamard"):
            x = self.r.bf16(f"{point} Hadamard cast", x @ hadamard_matrix(x.shape[-1]))
        return self.r.fp4(f"{point} QDQ", x)

    def _index(self, x: Array, qr: Array, t: Array, cached: Array) -> None:
        """Index keys; bf16 scores [T, entries] of the cached ones, -inf if not visible (4.5)."""
        r, heads, dim = self.r, self.config.index_n_heads, self.config.index_head_dim
        keys = self._pool(x, "indexer.compressor", "index key")
        self.parts["index keys"] = self._index_rounded("index key", keys)
        q = self._linear("index wq_b", qr, "attn.indexer.wq_b").reshape(len(x), heads, dim)
        q = self._index_rounded("index q", self._rope("index q", q, t))
        w = r.bf16("index weight product", x @ self.w("attn.indexer.weights_proj.weight").T)
        w = r.bf16("index weight scale", w * dim**-0.5 * heads**-0.5)
        dot = r.bf16("index score dot", q @ cached.T)
        term = r.bf16("index score term", np.maximum(dot, 0) * w[:, :, None])
        scores = r.bf16("index score sum", term.sum(1))
        self.parts["index scores"] = np.where(self._visible_entries(t) >= 0, scores, -np.inf)

    def _attend(self, q: Array, rows: Array, listed: Array) -> Array:
        """Q [T, H, D] over the rows named by `listed` [T, L], tile by tile, with the sink (4.6)."""
        r, keys = self.r, rows[listed]
        a = r.kept("QK scores", q @ keys.transpose(0, 2, 1) * q.shape[-1] ** -0.5)
        a = np.where(listed[:, None] >= 0, a, -np.inf)
        largest = a.max(-1, keepdims=True)
        peak, total, values = (
            np.full_like(largest, -np.inf),
            np.zeros_like(largest),
            np.zeros_like(q),
        )
        for start in range(0, listed.shape[1], TILE):
            tile = a[..., start : start + TILE]
            raised = np.maximum(peak, tile.max(-1, keepdims=True))
            new = raised if r.has("running maximum") else largest
            p, left = np.exp(tile - new), np.exp(peak - new)
            total = total * left + p.sum(-1, keepdims=True)
            values = values * left + r.bf16("probabilities", p) @ keys[:, start : start + TILE]
            peak = new
        sink = self.w("attn.attn_sink")[:, None]
        return r.bf16("attention output", values / (total + np.exp(sink - peak)))

    def _project_out(self, o: Array) -> Array:
        """Groups of heads through wo_a, all of them through wo_b (4.7)."""
        o = o.reshape(len(o), self.config.o_groups, -1)
        if self.r.adds("wo_a input"):
            o = Rounding().fp8("wo_a input", o)
        wo_a = self.r.bf16("wo_a weight", self.w("attn.wo_a.weight"))
        z = np.einsum("tgi,gri->tgr", o, wo_a.reshape(o.shape[1], -1, o.shape[2]))
        return self._linear("wo_b", self.r.bf16("wo_a output", z.reshape(len(o), -1)), "attn.wo_b")

    # Mixture of experts (5).

    def _moe(self, x: Array, ids: Array, given: Given) -> Array:
        """Routed experts weighted by the gate, and the shared expert (5.1, 5.3)."""
        s = np.sqrt(np.logaddexp(0, self.r.kept("gate logits", x @ self.w("ffn.gate.weight").T)))
        self.parts["expert rank"] = self._rank(s, ids)
        share = np.take_along_axis(s, given.experts, 1)
        share = share / share.sum(1, keepdims=True) * self.config.routed_scaling_factor
        total = np.zeros_like(x)
        for e in np.unique(given.experts):
            token, slot = np.nonzero(given.experts == e)
            own = share[token, slot, None]
            total[token] += self._expert(x[token], f"experts.{e}", "expert", own)
        shared = self._expert(x, "shared_experts", "shared", None)
        return self.r.bf16("MoE sum", self.r.kept("routed sum", total) + shared)

    def _rank(self, s: Array, ids: Array) -> Array:
        """Whose k largest are chosen; in a hash layer 1 for the experts of the token's id (5.1)."""
        if not self.hashed:
            return s + self.w("ffn.gate.bias")
        rank = np.zeros_like(s)
        np.put_along_axis(rank, self.w("ffn.gate.tid2eid")[ids], 1.0, 1)
        return rank

    def _expert(self, x: Array, stored: str, kind: str, share: Array | None) -> Array:
        """SwiGLU with both clamps; the routing weight multiplies before w2 (5.2)."""
        r, limit = self.r, self.config.swiglu_limit
        w1, w3, w2 = (self.w(f"ffn.{stored}.{name}.weight") for name in ("w1", "w3", "w2"))
        x = r.fp8(f"{kind} input", x)
        g, u = r.bf16(f"{kind} gate", x @ w1.T), r.bf16(f"{kind} up", x @ w3.T)
        g, u = np.minimum(g, limit), np.clip(u, -limit, limit)
        h = r.kept("silu", g * sigmoid(g)) * u
        before = share is not None and r.has("weight before w2")
        h = r.bf16(f"{kind} hidden", h * share if before else h)
        y = r.bf16(f"{kind} output", r.fp8(f"{kind} hidden QDQ", h) @ w2.T)
        return y if share is None or before else y * share


def _with_previous_block(slots: Array, hd: int, absent: float) -> Array:
    """[blocks, r, 2 hd] -> [blocks, 2 r, hd]: first half of the block before, second of its own."""
    before = np.concatenate([np.full_like(slots[:1, :, :hd], absent), slots[:-1, :, :hd]])
    return np.concatenate([before, slots[:, :, hd:]], 1)
