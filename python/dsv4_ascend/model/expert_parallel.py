"""Routed experts on one rank, or divided among ranks that have the same tokens or different ones.

Divided, a layer is computed step by step: no operator makes all of it. With different tokens every
row is multiplied by one rank and added where its token is, in the order of its choices: the bits of
one rank. With the same tokens the sums of ranks are added in fp32: other roundings of the last bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dsv4_ascend.model.mc2 import Mc2
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


def _computed(
    experts: Experts,
    rows: torch.Tensor,
    weights: torch.Tensor,
    numbers: torch.Tensor,
    limit: float,
) -> torch.Tensor:
    """What the experts of these numbers, from the first one here on, give their rows [M, d]."""
    slots = experts.own_slots(numbers.unsqueeze(1))
    by_slot, offsets, places = sorted_rows(rows, slots, experts.count)
    y: torch.Tensor = experts(by_slot, weights[places], offsets, limit)
    return y[places.argsort()]


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

    def stand_by(self, experts: Experts, x: torch.Tensor, choices: int, limit: float) -> None:
        """Take part in a layer that other ranks have tokens for, without any: x [0, d]."""

    def begin(self, kind: int, tokens: int, device: torch.device) -> int:
        """The kind of the next run, when this rank wants one of `kind` for so many tokens: if it is
        another one, other ranks have tokens for it, and this one takes part without any.
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
    every layer, with no rows if need be, so ranks agree before each run on what it is. They travel
    by `mc2` where its limits and the weights' place for the routing weight allow.
    """

    def __init__(self, group: Group, same_tokens: Group, mc2: Mc2 | None) -> None:
        self._group, self._same, self._mc2 = group, same_tokens, mc2

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
        own = Chosen(*(t[part] for t in chosen))
        if mc2 := self._fused(experts, x, chosen.ids.shape[1]):
            moved = self._by_mc2(mc2, experts, x[part], own, lambda x: shared(x, limit), limit)
            return self._whole(moved, size)[: len(x)]
        sums = self._whole(self._routed(experts, x[part], own, limit), size)
        total: torch.Tensor = sums[: len(x)] + shared(x, limit)
        return total.to(x.dtype)

    def stand_by(self, experts: Experts, x: torch.Tensor, choices: int, limit: float) -> None:
        """See `WholeExperts`."""
        none = x.new_zeros(0, choices, dtype=torch.int32)
        chosen = Chosen(none.float(), none)
        if mc2 := self._fused(experts, x, choices):
            self._by_mc2(mc2, experts, x, chosen, torch.zeros_like, limit)
        else:
            self._routed(experts, x, chosen, limit)

    def _whole(self, part: torch.Tensor, size: int) -> torch.Tensor:
        """The rows of all ranks with the same tokens, from the part [up to size, d] of each."""
        missing = part.new_zeros(size - len(part), part.shape[1])
        return self._same.all_gather(torch.cat([part, missing]))

    def _fused(self, experts: Experts, x: torch.Tensor, choices: int) -> Mc2 | None:
        """What moves the rows of a layer in two functions; None where it cannot."""
        mc2, count = self._mc2, experts.count * self._group.size
        if mc2 is None or not experts.w1.stored().weighs_last:
            return None
        return mc2 if mc2.takes(x, choices, count) else None

    def _by_mc2(
        self,
        mc2: Mc2,
        experts: Experts,
        x: torch.Tensor,
        chosen: Chosen,
        shared: Callable[[torch.Tensor], torch.Tensor],
        limit: float,
    ) -> torch.Tensor:
        """The layer of these tokens alone [T, d], the shared expert's part in it."""
        numbers = torch.arange(experts.count, dtype=torch.int32, device=x.device)

        def compute(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
            ones = torch.ones(len(rows), device=rows.device)
            y = _computed(experts, rows, ones, numbers.repeat_interleave(counts), limit)
            return y.to(rows.dtype)

        return mc2.layer(x, *chosen, experts.count, compute, shared)

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
        y = _computed(experts, arrived, own, numbers.repeat_interleave(theirs), limit)

        back = self._group.all_to_all(y, received, sent)
        return moe_combine(back, order, ids.shape[1]) if len(x) else x.float()

    def begin(self, kind: int, tokens: int, device: torch.device) -> int:
        """See `WholeExperts`."""
        wanted = self._group.all_gather(torch.tensor([[kind, tokens]], device=device)).tolist()
        next_kind = max(kind for kind, _ in wanted)
        if self._mc2:
            most = max(tokens for kind, tokens in wanted if kind == next_kind)
            self._mc2.rows = -(-most // self._same.size)
        return int(next_kind)


def experts_of(parallel: Parallel) -> WholeExperts:
    """How that rank computes routed experts."""
    if parallel.layout.ep == 1:
        return WholeExperts()
    if parallel.layout.moves_tokens:
        return MovedTokens(parallel.experts, parallel.same_tokens, parallel.mc2)
    return SharedTokens(parallel.experts)
