"""Compressed entries of transformers' compressors, kept in the model's own cache object."""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.deepseek_v4.modeling_deepseek_v4 import apply_rotary_pos_emb


def all_entries(module: Any, name: str, x: torch.Tensor, layer: Any) -> torch.Tensor:
    """Every entry so far, those that close with x [B, S, d] among them: [B, n, D].

    module: a compressor or an indexer, whose parameters make the entries; name: its own in the
    cache layer, which keeps entries and the tokens that have not closed one. Without a cache layer
    x is the whole sequence.
    """
    kv, gate, ratio = module.kv_proj(x), module.gate_proj(x), module.compress_rate
    first = 0
    if layer is not None:
        kv, gate, first = layer.store_compression_weights(name, kv, gate)
    closed = kv.shape[1] // ratio
    new = kv.new_zeros(len(x), 0, module.head_dim)
    if closed:
        kv = kv[:, : closed * ratio].unflatten(1, (closed, ratio))
        gate = gate[:, : closed * ratio].unflatten(1, (closed, ratio)) + module.position_bias
        if kv.shape[-1] == 2 * module.head_dim:
            kv, gate = _with_earlier(module, name, kv, gate, layer)
        share = gate.softmax(2, torch.float32).to(kv.dtype)
        new = _turned(module, module.kv_norm((kv * share).sum(2)), first)
    held: torch.Tensor = new if layer is None else layer.update_compressor_states(name, new)
    return held


def _with_earlier(
    module: Any, name: str, kv: torch.Tensor, gate: torch.Tensor, layer: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, gates) [B, n, 2r, D] of entries with overlap, from [B, n, r, 2D]: the first half of
    the block before, whose gate is -inf where there is none, then the second half of the own.
    """
    width = module.head_dim
    before: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    if layer is not None:
        before = layer.update_overlap_state(name, kv, gate, width)
    both = []
    for rows, last, absent in ((kv, before[0], 0.0), (gate, before[1], -torch.inf)):
        if last is None:
            last = rows.new_full((len(rows), *rows.shape[2:3], width), absent)
        earlier = torch.cat([last[:, None].to(rows.dtype), rows[:, :-1, :, :width]], 1)
        both.append(torch.cat([earlier, rows[..., width:]], 2))
    return both[0], both[1]


def _turned(module: Any, entries: torch.Tensor, first: int) -> torch.Tensor:
    """Entries [B, n, D] with RoPE at the first position of each one's block."""
    index = torch.arange(entries.shape[1], device=entries.device)
    positions = (index * module.compress_rate + first).expand(len(entries), -1)
    cos, sin = module.rotary_emb(entries, positions, layer_type=module.rope_layer_type)
    turned: torch.Tensor = apply_rotary_pos_emb(entries.unsqueeze(1), cos, sin).squeeze(1)
    return turned
