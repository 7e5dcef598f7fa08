"""Routed experts on one rank, or divided among ranks that have the same tokens or different ones.

Divided, a layer is computed step by step: no operator makes all of it. With different tokens every
row is multiplied by one rank and added where its token is, in the order of its choices: the bits of
one rank. With the same tokens the sums of ranks are added in fp32: other roundings of the last bit.
"""

from __future__ import annotations

import torch

from dsv4_ascend.model.parallel import Group, Parallel
from dsv4_ascend.weights.experts import Experts
from dsv4_ascend.weights.formats import Chosen
from dsv4_ascend.weights.linear import SharedExpert
from dsv4_backend.ops.moe import moe_combine, moe_dispatch


def sorted_rows(
    x: torch.Tensor, ids: torch.Tensor, experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`moe_dispatch`, which launchers do not take without tokens."""
    if len(x):
        return moe_dispatch(x, ids, experts)
    none = torch.zeros(experts + 1, dtype=torch.int32, device=x.device)
    return x, none, none[:0]


class WholeExperts:
    """All experts are here."""

    def layer(
        self,
        experts: Experts,
        shared: SharedExpert,
        x: torch.Tensor,
        chosen: Chosen,
        limit: float,
    ) -> torch.Tensor:
        """Routed experts and the shared one of x [T, d] -> [T, d]; ids are numbers of experts."""
        return experts.layer(x, *chosen, shared, limit)

    def stand_by(self, experts: Experts, x: torch.Tensor, limit: float) -> None:
        """Take part in a layer that other ranks have tokens for, without any: x [0, d]."""

    def begin(self, kind: int, device: torch.device) -> int:
        """The kind of the next run, when this rank wants one of `kind`: if it is another one, other
        ranks have tokens for it, and this one takes part without any.
        """
        return kind


class SharedTokens(WholeExperts):
    """Ranks with the same tokens have experts each: what they give a token is summed."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def layer(
        self,
        experts: Experts,
        shared: SharedExpert,
        x: torch.Tensor,
        chosen: Chosen,
        limit: float,
    ) -> torch.Tensor:
        """See `WholeExperts`; rows of other ranks' experts are sorted behind all, and cut off."""
        weights, ids = chosen
        slots = experts.own_slots(ids - self._group.rank * experts.count)
        rows, offsets, order = sorted_rows(x, slots, experts.count + 1)
        own = int(offsets[experts.count])
        y = experts(rows[:own], weights.flatten()[order[:own]], offsets[:-1], limit)
        all_rows = torch.cat([y, y.new_zeros(len(rows) - own, y.shape[1])])
        sums = moe_combine(all_rows, order, ids.shape[1]) if len(x) else x.float()
        total: torch.Tensor = self._group.all_reduce(sums) + shared(x, limit)
        return total.to(x.dtype)


class MovedTokens(WholeExperts):
    """Ranks with different tokens have experts each: rows travel to their experts and back.

    `same_tokens` ranks have the same ones and send a part of them each. Every rank takes part in
    every layer, with no rows if need be, so ranks agree before each run on what it is.
    """

    def __init__(self, group: Group, same_tokens: Group) -> None:
        self._group, self._same = group, same_tokens

    def layer(
        self,
        experts: Experts,
        shared: SharedExpert,
        x: torch.Tensor,
        chosen: Chosen,
        limit: float,
    ) -> torch.Tensor:
        """See `WholeExperts`."""
        size = -(-len(x) // self._same.size)
        part = slice(self._same.rank * size, (self._same.rank + 1) * size)
        sums = self._routed(experts, x[part], Chosen(*(t[part] for t in chosen)), limit)
        missing = sums.new_zeros(size - len(sums), sums.shape[1])
        routed = self._same.all_gather(torch.cat([sums, missing]))[: len(x)]
        total: torch.Tensor = routed + shared(x, limit)
        return total.to(x.dtype)

    def stand_by(self, experts: Experts, x: torch.Tensor, limit: float) -> None:
        """See `WholeExperts`."""
        none = x.new_zeros(0, 1, dtype=torch.int32)
        self._routed(experts, x, Chosen(none.float(), none), limit)

    def _routed(
        self, experts: Experts, x: torch.Tensor, chosen: Chosen, limit: float
    ) -> torch.Tensor:
        """Sums fp32 [T, d] of what the experts of all ranks give these tokens."""
        weights, ids = chosen
        ranks, count = self._group.size, experts.count
        rows, offsets, order = sorted_rows(x, ids, ranks * count)
        counts = offsets.diff()
        theirs = self._group.all_to_all(counts, [count] * ranks, [count] * ranks)
        sent, received = (c.view(ranks, count).sum(1).tolist() for c in (counts, theirs))

        arrived = self._group.all_to_all(rows, sent, received)
        own = weights.flatten()[order].unsqueeze(1)
        own = self._group.all_to_all(own, sent, received).squeeze(1)
        numbers = torch.arange(count, dtype=torch.int32, device=x.device).repeat(ranks)
        slots = experts.own_slots(numbers.repeat_interleave(theirs).unsqueeze(1))
        rows, offsets, places = sorted_rows(arrived, slots, count)
        y = experts(rows, own[places], offsets, limit)

        back = self._group.all_to_all(y[places.argsort()], received, sent)
        return moe_combine(back, order, ids.shape[1]) if len(x) else x.float()

    def begin(self, kind: int, device: torch.device) -> int:
        """See `WholeExperts`."""
        return int(self._group.all_gather(torch.tensor([kind], device=device)).max())


def experts_of(parallel: Parallel) -> WholeExperts:
    """How that rank computes routed experts."""
    if parallel.layout.ep == 1:
        return WholeExperts()
    if parallel.layout.moves_tokens:
        return MovedTokens(parallel.experts, parallel.same_tokens)
    return SharedTokens(parallel.experts)
