"""V4's attention module with sparse cost, on the parameters of transformers' own."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4Attention,
    apply_rotary_pos_emb,
)

from dsv4_ascend.integrations.transformers.attention import refuse_options
from dsv4_ascend.integrations.transformers.compressed import all_entries
from dsv4_ascend.integrations.transformers.keys import block_table, listed, windowed
from dsv4_ascend.integrations.transformers.masks import check_band
from dsv4_ascend.integrations.transformers.seams import SPARSE
from dsv4_backend.ops.lightning_indexer import lightning_indexer


class Given(NamedTuple):
    """What a layer chooses entries by: x [B, S, d], the latent of its queries [B, S, q_lora],
    cos and sin of the tokens, their positions [B, S], the cache layer if there is a cache.
    """

    x: torch.Tensor
    latent: torch.Tensor
    turns: tuple[torch.Tensor, torch.Tensor]
    positions: torch.Tensor
    layer: Any


class SparseAttention(DeepseekV4Attention):
    """`DeepseekV4Attention` that never holds a score or a mask per pair of tokens.

    The compressor and the indexer inside are transformers' own modules, of which parameters and
    projections are used; their `forward` is not called. What a token sees is what eager shows it.
    """

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        config._attn_implementation = SPARSE  # so that the model makes bands, not dense masks

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: dict[str, tuple[torch.Tensor, torch.Tensor]],
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Any = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """As of the class that it replaces, but attention_mask: a band (`masks`), and no
        probabilities. ArgumentError for another mask, UnsupportedError for output_attentions and
        attention dropout.
        """
        refuse_options(SPARSE, self, options)
        batch, new, _ = hidden_states.shape
        band = check_band(attention_mask, (batch, new, self.sliding_window))
        cos, sin = position_embeddings[self.rope_layer_type]
        latent = self.q_a_norm(self.q_a_proj(hidden_states))
        q = self.q_b_norm(self.q_b_proj(latent).unflatten(-1, (self.num_heads, self.head_dim)))
        q = apply_rotary_pos_emb(q, cos, sin, unsqueeze_dim=2)
        kv = self.kv_norm(self.kv_proj(hidden_states)).unsqueeze(1)
        kv, layer = apply_rotary_pos_emb(kv, cos, sin), None
        if past_key_values is not None:
            kv = past_key_values.update(kv, kv, self.layer_idx)[0]
            layer = past_key_values.layers[self.layer_idx]
        positions = position_ids.expand(batch, -1)
        given = Given(hidden_states, latent, (cos, sin), positions, layer)
        entries, chosen = self._entries(given)
        near = kv[:, 0]
        if self._is_plain(band, near.shape[1], positions):
            out = windowed(q, self.sinks, near, self.sliding_window, entries, chosen)
        else:
            out = self._attend_listed(q, near, band, entries, chosen)
        out = apply_rotary_pos_emb(out, cos, -sin, unsqueeze_dim=2)
        grouped = self.o_a_proj(out.reshape(batch, new, self.config.o_groups, -1))
        return self.o_b_proj(grouped.flatten(2)), None

    def _entries(self, given: Given) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Entries [B, n, D] and which of them each token attends to: int32 [B, S, N], then -1;
        None where there are none.
        """
        if self.compressor is None:
            return None, None
        entries = all_entries(self.compressor, "compressor", given.x, given.layer)
        indexer = getattr(self.compressor, "indexer", None)
        keys = None if indexer is None else all_entries(indexer, "indexer", given.x, given.layer)
        held, new = entries.shape[1], given.x.shape[1]
        if not held:
            return None, None
        if keys is not None:
            return entries, best(indexer, given, keys)
        index = torch.arange(held, dtype=torch.int32, device=entries.device)
        if new == 1:  # eager masks no entry of a single token, whatever its position
            return entries, index.expand(len(entries), 1, held)
        visible = (given.positions + 1) // self.compressor.compress_rate
        return entries, torch.where(index < visible[..., None], index, -1)

    def _is_plain(self, band: torch.Tensor, held: int, positions: torch.Tensor) -> bool:
        """Whether all see their windows, and no entries but those before them (`windowed`)."""
        before = held - positions.shape[1]
        if band.shape[2] or before >= self.sliding_window - 1:
            return not band.shape[2]
        return bool((positions <= torch.arange(before, held, device=positions.device)).all())

    def _attend_listed(
        self,
        q: torch.Tensor,
        near: torch.Tensor,
        band: torch.Tensor,
        entries: torch.Tensor | None,
        chosen: torch.Tensor | None,
    ) -> torch.Tensor:
        """Of q [B, S, H, D] to the keys near [B, K, D] that the band shows, and to entries."""
        held, new = near.shape[1], q.shape[1]
        own = torch.arange(held - new, held, dtype=torch.int32, device=q.device)
        before = torch.arange(1 - self.sliding_window, 1, dtype=torch.int32, device=q.device)
        lists = (own[:, None] + before).clamp(min=-1).expand(len(q), -1, -1)
        if band.shape[2]:
            lists = torch.where(band, lists, -1)
        if entries is not None and chosen is not None:
            lists = torch.cat([lists, torch.where(chosen < 0, -1, chosen + held)], 2)
            near = torch.cat([near, entries], 1)
        return listed(q, self.sinks, near, lists)


def best(indexer: Any, given: Given, keys: torch.Tensor) -> torch.Tensor:
    """The `index_topk` visible entries of the largest scores, of keys [B, n, DI], n > 0:
    int32 [B, S, k], then -1.
    """
    (batch, held), ratio = keys.shape[:2], indexer.compress_rate
    q = indexer.q_b_proj(given.latent).unflatten(-1, (indexer.num_heads, indexer.head_dim))
    q = apply_rotary_pos_emb(q, *given.turns, unsqueeze_dim=2)
    scale = indexer.scorer.softmax_scale * indexer.scorer.weights_scaling
    weights = indexer.scorer.weights_proj(given.x).float() * scale
    longest = (held + 1) * ratio - 1  # tokens of a sequence that sees all entries, and no more
    starts, ends, owners = runs(given.positions.clamp(max=longest - 1))
    chosen = lightning_indexer(
        q.detach().flatten(0, 1),
        keys.detach(),
        weights.detach().flatten(0, 1),
        block_table(batch, held, held, keys.device)[owners],
        starts,
        ends,
        longest,
        ratio,
        min(indexer.index_topk, held),
    )
    return chosen.view(*given.positions.shape, chosen.shape[1])


def runs(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(query_start_loc, seq_lens, row) of stretches of [B, S] whose positions rise by 1: one for
    each row, but for padding and packed sequences.
    """
    first = torch.ones_like(positions, dtype=torch.bool)
    first[:, 1:] = positions.diff(dim=1) != 1
    starts = first.flatten().nonzero().flatten()
    bounds = torch.cat([starts, starts.new_tensor([positions.numel()])])
    ends = positions.flatten()[bounds[1:] - 1] + 1
    return bounds.int(), ends.int(), starts // positions.shape[1]
