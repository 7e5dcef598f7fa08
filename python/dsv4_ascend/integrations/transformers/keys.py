"""`sparse_attention` over contiguous keys of B sequences, as transformers' caches hold them.

A sequence is one block of a paged cache, and a block table that repeats it has columns for any
position that the operator may ask for.
"""

from __future__ import annotations

import torch

from dsv4_backend.ops.attention import sparse_attention


def lengths(
    batch: int, new: int, total: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(query_start_loc [B+1], seq_lens [B]) of B sequences of `new` tokens, the last of `total`."""
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * new
    return starts, torch.full((batch,), total, dtype=torch.int32, device=device)


def block_table(batch: int, block_size: int, rows: int, device: torch.device) -> torch.Tensor:
    """Int32 [B, columns]: block b of `block_size` rows is all of sequence b, for `rows` rows."""
    blocks = torch.arange(batch, dtype=torch.int32, device=device)
    return blocks[:, None].expand(batch, max(1, -(-rows // block_size)))


def listed(
    q: torch.Tensor, sinks: torch.Tensor, keys: torch.Tensor, lists: torch.Tensor
) -> torch.Tensor:
    """Attention of q [B, S, H, D] to the keys (which are the values) named by a list per token.

    keys: [B, K, D]; lists: int32 [B, S, N] in [0, K), -1 for none; sinks: [H]. Returns
    [B, S, H, D].
    """
    (batch, new), held = q.shape[:2], keys.shape[1]
    total = held + new  # every token's position is at least K, so that it may name any key
    table = block_table(batch, held, total, q.device)
    starts, ends = lengths(batch, new, total, q.device)
    flat, chosen = q.flatten(0, 1), lists.flatten(0, 1)
    out = sparse_attention(
        flat, sinks.float(), keys, table, keys, table, chosen, starts, ends, 0, 1
    )
    return out.view(q.shape)


def windowed(
    q: torch.Tensor,
    sinks: torch.Tensor,
    near: torch.Tensor,
    window: int,
    entries: torch.Tensor | None,
    chosen: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of the last S of K tokens to the window before each, and to its chosen entries.

    q: [B, S, H, D]; near: keys [B, K, D], every token there is, or at least window - 1 before the
    last S; entries: [B, n, D] with chosen int32 [B, S, N] in [0, n), -1 for none; where there are
    fewer tokens before, the token of row i of K chooses none behind i. Returns [B, S, H, D].
    """
    (batch, new), held, device = q.shape[:2], near.shape[1], q.device
    total = held
    if entries is not None and held - new >= window - 1:
        # Whole turns of a ring of K rows, so that no entry lies behind the first token.
        total += -(-max(0, entries.shape[1] - 1 - (held - new)) // held) * held
    starts, ends = lengths(batch, new, total, device)
    far = None if entries is None else block_table(batch, entries.shape[1], total, device)
    out = sparse_attention(
        q.flatten(0, 1),
        sinks.float(),
        near,
        block_table(batch, held, held, device),
        entries,
        far,
        None if chosen is None else chosen.flatten(0, 1),
        starts,
        ends,
        window,
        0 if entries is None else 1,
    )
    return out.view(q.shape)
