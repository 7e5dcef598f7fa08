"""Prompts of data groups: each runs some of them, all get all results, and all know all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import torch

from dsv4_ascend.model.parallel import Group, Parallel
from dsv4_backend.errors import ArgumentError

_T = TypeVar("_T")


def own_prompts(prompts: Sequence[_T], data: Group) -> list[_T]:
    """Those of this data group: its number, then every `size`-th one."""
    return list(prompts[data.rank :: data.size])


def own_number(position: int, data: Group) -> int:
    """The number among all prompts of one of `own_prompts`."""
    return data.rank + position * data.size


def all_results(
    results: Sequence[torch.Tensor], prompts: int, data: Group, like: torch.Tensor
) -> list[torch.Tensor]:
    """Results [n, ...] of all prompts in order, from those of this group's own.

    They may differ in n alone from each other and from `like`; they travel padded.
    """
    columns = -(-prompts // data.size)
    if data.size == 1 or columns == 0:
        return list(results)
    lengths = torch.zeros(columns, dtype=torch.int64, device=like.device)
    lengths[: len(results)] = torch.tensor([len(r) for r in results], device=like.device)
    of_all = data.all_gather(lengths).view(data.size, columns).tolist()
    longest = max(max(lengths) for lengths in of_all)
    padded = like.new_zeros(columns, longest, *like.shape[1:])
    for row, result in zip(padded, results, strict=False):
        row[: len(result)] = result
    gathered = data.all_gather(padded).unflatten(0, (data.size, columns))
    return [
        gathered[i % data.size, i // data.size, : of_all[i % data.size][i // data.size]]
        for i in range(prompts)
    ]


def check_agreement(arguments: object, parallel: Parallel, device: torch.device) -> None:
    """ArgumentError on every rank if one of them was called with other arguments: they would take
    other steps, and wait for each other.
    """
    if parallel.layout.world == 1:
        return
    digest = hashlib.sha256(repr(arguments).encode()).digest()
    own = torch.tensor([int.from_bytes(digest[:7], "little")], device=device)
    in_column = parallel.data.all_gather(own)
    if bool((parallel.same_tokens.all_gather(in_column) != own).any()):
        raise ArgumentError(
            f"rank {parallel.rank}: found prompts or options that differ between ranks, "
            "expected the same on every rank"
        )
