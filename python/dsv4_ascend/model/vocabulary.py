"""Embedding and head: of the whole vocabulary, or of this rank's rows of it."""

from __future__ import annotations

import torch

from dsv4_ascend.model.parallel import Group, Parallel
from dsv4_backend.ops.embedding import embed_streams, lm_head


class Vocabulary:
    """All rows are here."""

    def embed(self, ids: torch.Tensor, weight: torch.Tensor, streams: int) -> torch.Tensor:
        """Ids [T] -> [T, streams, d] in weight's dtype."""
        return embed_streams(ids, weight, streams)

    def logits(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """X [T, d] -> fp32 [T, V]."""
        return lm_head(x, weight)


class DividedVocabulary(Vocabulary):
    """Every rank of a group has an equal run of rows; each value is computed by one of them."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def embed(self, ids: torch.Tensor, weight: torch.Tensor, streams: int) -> torch.Tensor:
        """See `Vocabulary`; other ranks' rows are zeros before they are summed."""
        local = ids.long() - self._group.rank * len(weight)
        foreign = (local < 0) | (local >= len(weight))
        own = embed_streams(local.masked_fill(foreign, 0), weight, 1)
        own = own.masked_fill(foreign[:, None, None], 0)
        return self._group.all_reduce(own).repeat(1, streams, 1)

    def logits(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See `Vocabulary`."""
        return self._group.all_gather(lm_head(x, weight), 1)


def vocabulary_of(parallel: Parallel) -> Vocabulary:
    """The vocabulary as that rank has it."""
    return Vocabulary() if parallel.layout.tp == 1 else DividedVocabulary(parallel.tensor)
