"""Attention of one layer: sliding window, plus compressed entries (CSA, HCA),
plus the indexer (CSA). spec/v4.md 4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from dsv4_ascend.checkpoint.config import V4Config
from dsv4_ascend.model.batch import Batch
from dsv4_ascend.model.paged import LayerCache, Paged, write_both
from dsv4_ascend.model.parallel import ALONE, Parallel
from dsv4_ascend.model.profile import Profile
from dsv4_ascend.model.rotary import Rotation, layer_frequencies
from dsv4_ascend.model.rows import Ahead, Codes, IndexerParts, Qkv
from dsv4_ascend.model.sharding import attention_share
from dsv4_ascend.weights.activations import UNQUANTISED
from dsv4_ascend.weights.linear import Linear, NormedRows, RMSNormWeight, empty_parameter
from dsv4_backend.ops.attention import AttentionCall
from dsv4_backend.ops.compressor import compress_pool
from dsv4_backend.ops.indexer import IndexerCall
from dsv4_backend.ops.indexer_topk import indexer_topk
from dsv4_backend.ops.rope import apply_rope

UNBOUNDED = (1 << 31) - 1
"""What lengths int32 are at most."""


class Compressor(nn.Module):
    """Pools `ratio` tokens (with overlap: and the `ratio` before them) into one entry
    of `head_dim` channels (4.3).
    """

    def __init__(self, config: V4Config, ratio: int, head_dim: int, overlap: bool) -> None:
        super().__init__()
        width = head_dim * (2 if overlap else 1)
        self.wkv, self.wgate = (Linear(width, config.hidden_size, UNQUANTISED) for _ in range(2))
        self.ape = empty_parameter(ratio, width)
        self.norm = RMSNormWeight(head_dim)
        self.head_dim = head_dim

    def forward(self, x: torch.Tensor, state: Paged, batch: Batch) -> torch.Tensor:
        """X [T, d] -> the entries that close in this step [rows, head_dim], before their norm;
        updates `state` in place.
        """
        return compress_pool(
            x,
            self.wkv.weight,
            self.wgate.weight,
            self.ape,
            *state.read(),
            batch.query_start_loc,
            batch.seq_lens,
            UNBOUNDED if batch.max_seq_len is None else batch.max_seq_len,
            self.head_dim,
        )


class IndexerInput(NamedTuple):
    """Of one layer's step: x [T, d], qr [T, q_lora], frequencies, caches and batch."""

    x: torch.Tensor
    qr: NormedRows
    inv_freq: torch.Tensor
    cache: LayerCache
    batch: Batch


class Indexer(nn.Module):
    """Scores compressed entries per query; the best index_topk are attended (4.5)."""

    def __init__(self, config: V4Config, ratio: int, profile: Profile) -> None:
        super().__init__()
        self.form = profile.index
        self.heads, self.dim = config.index_n_heads, config.index_head_dim
        self.topk, self.ratio, self.eps = config.index_topk, ratio, config.rms_norm_eps
        self.wq_b = Linear(self.heads * self.dim, config.q_lora_rank, profile.activations)
        self.weights_proj = Linear(self.heads, config.hidden_size, profile.activations)
        self.compressor = Compressor(config, ratio, self.dim, overlap=True)

    def scored(self, given: IndexerInput) -> IndexerCall:
        """What is scored in floats; writes the new keys."""
        (q, _), weights, keys = self._prepare(given)
        pages, table = keys.read()
        starts, ends = given.batch.query_start_loc, given.batch.seq_lens
        return IndexerCall(q, pages, weights, table, starts, ends, self.ratio)

    def choose(self, given: IndexerInput, ahead: Ahead | None = None) -> torch.Tensor:
        """The entries that each token attends to: int32 [T, at most topk], then -1;
        writes the new keys, but those made `ahead`.
        """
        if self.form.select is None:
            return indexer_topk(*self.scored(given), self.topk)
        if ahead is None:
            q, weights, keys = self._prepare(given)
        else:
            q, weights, keys = ahead.q, ahead.weights, self._keys(given)
        return self.form.select(q, weights, keys, given.batch.lengths, self.ratio, self.topk)

    def ahead(self, given: IndexerInput, wq_b: Linear) -> Ahead | None:
        """What is made in one step with attention's queries of weight `wq_b`, if anything is."""
        return None if self.form.ahead is None else self.form.ahead(self._parts(given), wq_b)

    def _parts(self, given: IndexerInput) -> IndexerParts:
        x, qr, inv_freq, cache, batch = given
        assert cache.index_state is not None
        return IndexerParts(
            x,
            qr,
            self.compressor(x, cache.index_state, batch),
            self.compressor.norm.weight,
            self.eps,
            self.wq_b,
            self.weights_proj,
            batch.rotation(self.ratio, inv_freq),
            batch.entry_rotation(self.ratio, inv_freq),
        )

    def _prepare(self, given: IndexerInput) -> tuple[Codes, torch.Tensor, Paged]:
        """Queries, weights [T, HI] and all keys, the new ones written."""
        cache, batch = given.cache, given.batch
        assert self.form.prepare is not None
        assert cache.index_keys is not None
        slots = batch.entry_slots(cache.index_keys, self.ratio)
        q, weights = self.form.prepare(self._parts(given), slots, cache.index_keys)
        return q, weights, self._keys(given)

    def _keys(self, given: IndexerInput) -> Paged:
        """All keys, as far as there can be any."""
        assert given.cache.index_keys is not None
        return given.batch.reachable(given.cache.index_keys, self.ratio)


class Attention(nn.Module):
    """One layer's attention of a kind ("swa", "csa", "hca")
    and a compression ratio (0 for window only).

    All heads, or those of a rank: then wo_b's product is one of a part of its inputs, rounded on
    each rank and added over ranks in fp32, in another order and with other roundings than one
    rank's (v4.md 10). All else that a rank computes has the bits of one rank.
    """

    inv_freq: torch.Tensor

    def __init__(
        self,
        config: V4Config,
        kind: str,
        ratio: int,
        profile: Profile,
        parallel: Parallel = ALONE,
    ) -> None:
        super().__init__()
        config = attention_share(config, parallel.layout)
        self.profile, activations = profile, profile.activations
        self.kind, self.ratio, self.ranks = kind, ratio, parallel.tensor
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.window = config.sliding_window
        self.nope_dim = config.head_dim - config.qk_rope_head_dim
        self.groups, self.eps = config.o_groups, config.rms_norm_eps
        group_width = self.heads * self.head_dim // self.groups
        self.wq_a = Linear(config.q_lora_rank, config.hidden_size, activations)
        self.q_norm = RMSNormWeight(config.q_lora_rank)
        self.wq_b = Linear(self.heads * self.head_dim, config.q_lora_rank, activations)
        self.wkv = Linear(self.head_dim, config.hidden_size, activations)
        self.kv_norm = RMSNormWeight(self.head_dim)
        self.wo_a = Linear(self.groups * config.o_lora_rank, group_width, activations)
        self.wo_b = Linear(config.hidden_size, self.groups * config.o_lora_rank, activations)
        self.attn_sink = empty_parameter(self.heads)
        if kind != "swa":
            self.compressor = Compressor(config, ratio, self.head_dim, overlap=kind == "csa")
        if kind == "csa":
            self.indexer = Indexer(config, ratio, profile)
        self.register_buffer("inv_freq", layer_frequencies(config, ratio), persistent=False)

    def _write(self, given: IndexerInput, kv: torch.Tensor, ahead: Ahead | None) -> torch.Tensor:
        """Write this step's keys kv [T, D] and entries; the queries [T, H, D]."""
        x, qr, inv_freq, cache, batch = given
        product = qr.times(self.wq_b) if ahead is None else ahead.product
        q = product.unflatten(-1, (self.heads, self.head_dim))
        rows = Qkv(q, kv, None, self.kv_norm.weight, None, self.eps, self._turns(batch), None)
        if cache.state is not None:
            rows = rows._replace(
                entries=self.compressor(x, cache.state, batch),
                entry_norm=self.compressor.norm.weight,
                entry_turns=batch.entry_rotation(self.ratio, inv_freq),
            )
        q, kv, entries = self.profile.latents.norm_rope(rows)
        kv = self.profile.latent(kv, self.nope_dim)
        cache.window.write(kv, batch.token_slots(cache.window))
        if entries is not None and cache.entries is not None:
            slots = batch.entry_slots(cache.entries, self.ratio)
            entries = self.profile.latent(entries, self.nope_dim)
            if ahead is None or cache.index_keys is None:
                cache.entries.write(entries, slots)
            else:
                of_keys = batch.entry_slots(cache.index_keys, self.ratio)
                keys = cache.index_keys, ahead.keys, of_keys
                write_both((cache.entries, entries, slots), keys)
        return q

    def _turns(self, batch: Batch) -> Rotation:
        return batch.rotation(self.ratio, self.inv_freq)

    def _entries(
        self, given: IndexerInput, ahead: Ahead | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """(pages, table, which of them) of entries, each None where there is none.

        Without the indexer's choice all visible ones are attended.
        """
        cache = given.cache
        if cache.entries is None:
            return None, None, None
        pages, table = given.batch.reachable(cache.entries, self.ratio).read()
        if self.kind != "csa":
            return pages, table, None
        return pages, table, self.indexer.choose(given, ahead)

    def forward(self, x: torch.Tensor, cache: LayerCache, batch: Batch) -> torch.Tensor:
        """X [T, d] (normed) -> [T, d]; writes this step's rows into `cache` first (4.9)."""
        latent, kv = self.profile.latents.project(x, self.wq_a, self.wkv)
        qr = NormedRows(latent, self.q_norm.weight, self.eps)
        given = IndexerInput(x, qr, self.inv_freq, cache, batch)
        ahead = self.indexer.ahead(given, self.wq_b) if self.kind == "csa" else None
        q = self._write(given, kv, ahead)
        entries, entry_table, chosen = self._entries(given, ahead)
        window, window_table = batch.window(cache.window, self.window)
        call = AttentionCall(
            q,
            self.attn_sink,
            window,
            window_table,
            entries,
            entry_table,
            chosen,
            batch.query_start_loc,
            batch.seq_lens,
            self.window,
            self.ratio,
        )
        o = self.profile.attend(call, batch.max_seq_len, self.head_dim - self.nope_dim)
        turns = self._turns(batch)
        apply_rope(o, turns.cos, turns.back)
        joined: torch.Tensor = self.wo_b(self.wo_a.stored().project(o, self.groups))
        return self.ranks.all_reduce(joined)
