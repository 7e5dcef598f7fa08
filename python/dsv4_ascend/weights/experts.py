"""Routed experts: one tensor per projection, however names divide it (spec/v4.md 5.2, 7.1)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from dsv4_ascend.weights.activations import ActivationFormat
from dsv4_ascend.weights.formats import EXPERTS, Chosen, ExpertWeights
from dsv4_ascend.weights.linear import SharedExpert, StoredModule


class ExpertStack(StoredModule[ExpertWeights]):
    """One projection of all experts: `weight` [E, ...], `scale` [E, ...] or None."""

    def __init__(self, experts: int, n: int, k: int) -> None:
        super().__init__(EXPERTS, experts, n, k)
        self.waiting: dict[str, dict[int, torch.Tensor]] = {}

    def put(self, leaf: str, slot: int, tensor: torch.Tensor) -> None:
        """Give one expert its "weight" or "scale"; they count when all experts have theirs."""
        waiting = self.waiting.setdefault(leaf, {})
        waiting[slot] = tensor
        if len(waiting) == self.weight.shape[0]:
            parts = [waiting[i] for i in range(len(waiting))]
            del self.waiting[leaf]
            if len({part.dtype for part in parts}) > 1:
                # Fp32 scales may be narrowed, each for itself.
                parts = [part.float() for part in parts]
            setattr(self, leaf, nn.Parameter(torch.stack(parts), requires_grad=False))


class Experts(nn.Module):
    """w1 (gate), w3 (up) and w2 (down) of `count` routed experts, all of a model or a rank's.

    slots: int64 [count], at which place of the stacks an expert's matrices are; None where matrix e
    is expert e's. A file may have experts in another order (names sort 10 before 2): then they are
    used in the file's order.
    """

    slots: torch.Tensor | None

    def __init__(self, count: int, d: int, m: int, activations: ActivationFormat) -> None:
        super().__init__()
        self.count, self.activations = count, activations
        self.w1, self.w3 = ExpertStack(count, m, d), ExpertStack(count, m, d)
        self.w2 = ExpertStack(count, d, m)
        self.register_buffer("slots", None, persistent=False)

    def forward(
        self, rows: torch.Tensor, weights: torch.Tensor, expert_offsets: torch.Tensor, limit: float
    ) -> torch.Tensor:
        """Rows [M, d] sorted by slot, weights fp32 [M],
        expert_offsets int32 [count + 1] -> [M, d].
        """
        w1, w3, w2 = self.w1.stored(), self.w3.stored(), self.w2.stored()
        if not len(rows):
            return w1.of_no_rows(rows)
        return w1.mlp(w3, w2, rows, weights, expert_offsets, limit, self.activations)

    def layer(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        shared: SharedExpert,
        limit: float,
    ) -> torch.Tensor:
        """X [T, d], weights fp32 [T, k] and ids int32 [T, k] of the router -> [T, d] (5)."""
        w1, w3, w2 = self.w1.stored(), self.w3.stored(), self.w2.stored()
        chosen = Chosen(weights, self.slots_of(ids))
        return w1.layer(w3, w2, shared.stored(), x, chosen, limit, self.activations)

    def slots_of(self, ids: torch.Tensor) -> torch.Tensor:
        """Where the experts `ids` are in the stacks, of any shape."""
        return ids if self.slots is None else self.slots[ids]

    def own_slots(self, ids: torch.Tensor) -> torch.Tensor:
        """`slots_of` experts numbered from the first one here on; `count` for those of others."""
        foreign = (ids < 0) | (ids >= self.count)
        return self.slots_of(ids.masked_fill(foreign, 0)).masked_fill(foreign, self.count)

    def put(self, expert: int, projection: str, leaf: str, tensor: torch.Tensor) -> None:
        """Give one expert the "weight" or "scale" of its "w1", "w2" or "w3"."""
        slot = expert if self.slots is None else int(self.slots[expert])
        self.stacks()[projection].put(leaf, slot, tensor)

    def stacks(self) -> dict[str, ExpertStack]:
        """The three projections by name."""
        return {"w1": self.w1, "w3": self.w3, "w2": self.w2}

    def by_expert(self) -> Iterator[tuple[str, torch.Tensor]]:
        """("0.w1.weight", tensor) of every expert under its official name: views of the stacks."""
        slots = range(self.count) if self.slots is None else self.slots.tolist()
        for expert, slot in enumerate(slots):
            for projection, stack in self.stacks().items():
                for leaf, tensor in stack.named_parameters():
                    yield f"{expert}.{projection}.{leaf}", tensor[slot]
