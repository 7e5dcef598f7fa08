"""Teaches an indexer to rank entries as its layer's attention weighs them;
top-k itself passes no gradient.
"""

from __future__ import annotations

import torch

from dsv4_ascend.model.attention import Attention, Indexer, IndexerInput
from dsv4_ascend.model.batch import Batch
from dsv4_ascend.model.paged import LayerCache
from dsv4_ascend.model.rows import Ahead
from dsv4_ascend.model.transformer import Transformer
from dsv4_ascend.weights.linear import NormedRows
from dsv4_backend import ragged
from dsv4_backend.ops.attention import visible_entries
from dsv4_backend.ops.indexer import indexer_scores, topk_indices
from dsv4_backend.ops.norm import head_rms_norm
from dsv4_backend.ops.rope import apply_rope


class AlignedIndexer(Indexer):
    """An indexer that leaves the loss of its last call in `loss`:
    cross entropy against the attention of all heads.

    Only the indexer's own weights learn from it: its inputs are cut off from the network.
    """

    loss: torch.Tensor
    teacher: tuple[Attention]  # in a tuple, so that it does not become a submodule

    def choose(self, given: IndexerInput, ahead: Ahead | None = None) -> torch.Tensor:
        """As `Indexer` in floats; also sets `loss`."""
        own = given._replace(x=given.x.detach(), qr=given.qr.detached())
        scores = indexer_scores(*self.scored(own))
        target = self._attention(given.qr, given.cache, given.batch)
        log_probabilities = scores.log_softmax(-1).masked_fill(scores.isinf(), 0)
        self.loss = -(target * log_probabilities).sum(-1).mean()
        visible = visible_entries(given.batch.positions, self.ratio)
        return topk_indices(scores.detach(), visible, self.topk)

    @torch.no_grad()
    def _attention(self, qr: NormedRows, cache: LayerCache, batch: Batch) -> torch.Tensor:
        """Mean over heads of the softmax over all visible entries, [T, entries];
        0 where none is visible.
        """
        assert cache.entries is not None
        layer = self.teacher[0]
        heads = qr.times(layer.wq_b).unflatten(-1, (layer.heads, layer.head_dim))
        q = head_rms_norm(heads, layer.eps)
        turns = batch.rotation(self.ratio, layer.inv_freq)
        apply_rope(q, turns.cos, turns.sin)
        owners = ragged.token_sequences(batch.query_start_loc, q.shape[0])
        pages, table = batch.reachable(cache.entries, self.ratio).read()
        entries = pages[table.long()].flatten(1, 2)
        dots = torch.stack([q[owners == s] @ rows.T for s, rows in enumerate(entries)]).flatten(
            0, 1
        )
        visible = visible_entries(batch.positions, self.ratio)
        hidden = torch.arange(entries.shape[1], device=q.device) >= visible[:, None]
        dots = (dots * q.shape[-1] ** -0.5).masked_fill(hidden[:, None], -torch.inf)
        attention: torch.Tensor = dots.softmax(-1).nan_to_num(0).mean(1)
        return attention


def align_indexers(network: Transformer) -> list[AlignedIndexer]:
    """Turn every indexer of the network into an aligned one, in place."""
    aligned = []
    for module in network.modules():
        if isinstance(module, Attention) and module.kind == "csa":
            module.indexer.__class__ = AlignedIndexer
            assert isinstance(module.indexer, AlignedIndexer)
            module.indexer.teacher = (module,)
            aligned.append(module.indexer)
    return aligned
