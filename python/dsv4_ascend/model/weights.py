"""Putting tensors into the network by their checkpoint names, and taking them out of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from dsv4_ascend.checkpoint.experts import EXPERT
from dsv4_ascend.checkpoint.kinds import Kind, Kinds
from dsv4_ascend.checkpoint.layout import FP32_NAMES
from dsv4_ascend.model.transformer import Gate, Transformer
from dsv4_ascend.weights.deployed import PREPARED, prepared
from dsv4_ascend.weights.experts import Experts, ExpertStack
from dsv4_ascend.weights.linear import Linear, SharedExpert, StoredModule
from dsv4_ascend.weights.storage import Storage, experts_kept, experts_to_bf16, kept, to_bf16
from dsv4_backend.errors import ArgumentError

NO_KINDS: Kinds = MappingProxyType({})
"""Those of an official folder."""


def assign(network: Transformer, name: str, tensor: torch.Tensor) -> None:
    """Make `tensor` the parameter `name`; it keeps its storage, but for BF16 `FP32_NAMES`.

    Experts: `...ffn.experts.w1.weight` [E, ...] is all of a projection at once, with
    `...ffn.experts.slots` (see `Experts`) if their order is not that of their numbers. One by one,
    under their official names, they are copied into such a tensor when the last one comes.
    """
    expert = EXPERT.fullmatch(name)
    if expert:
        experts = network.get_submodule(expert[1])
        assert isinstance(experts, Experts)
        experts.put(int(expert[2]), expert[3], expert[4], tensor)
        return
    if tensor.dtype == torch.bfloat16 and name.endswith(FP32_NAMES):
        tensor = tensor.float()
    path, _, leaf = name.rpartition(".")
    module = network.get_submodule(path)
    is_buffer = leaf in module._buffers
    setattr(module, leaf, tensor if is_buffer else nn.Parameter(tensor, requires_grad=False))


def assign_all(
    network: Transformer,
    tensors: Iterable[tuple[str, torch.Tensor]],
    device: torch.device,
    kinds: Kinds = NO_KINDS,
) -> Transformer:
    """Assign (name, tensor) pairs, moved to `device`, and put the network in eval mode.

    Then the network's profile keeps its weights in other formats, if it does; those of a converted
    folder, which stores `kinds`, are in its formats already. ArgumentError if some experts of a
    projection came without the others.
    """
    for name, tensor in tensors:
        assign(network, name, tensor.to(device))
    for path, module in network.named_modules():
        if isinstance(module, ExpertStack) and module.waiting:
            leaf, found = next(iter(module.waiting.items()))
            count = module.weight.shape[0]
            raise ArgumentError(
                f"{path}.{leaf}: found {len(found)} experts, expected all {count} of them"
            )
        for buffer_name, buffer in module.named_buffers(recurse=False):
            setattr(module, buffer_name, buffer.to(device))
    if network.profile.storage is not None:
        if kinds:
            keep_converted(network, kinds)
        else:
            keep_weights(network, network.profile.storage)
        prepare_weights(network, network.profile.storage)
    return network.eval()


def keep_weights(network: Transformer, storage: Storage) -> None:
    """Put every weight into the format of `storage`,
    one after the other: what it was made of can go at once.
    """
    for path, module in network.named_modules():
        if isinstance(module, ExpertStack):
            module.keep(storage.experts(module.stored()))
        elif isinstance(module, Linear):
            module.keep(storage.linear(path)(module.stored()))


def keep_converted(network: Transformer, kinds: Kinds) -> None:
    """Have every weight in the class of its kind, what has none in bf16."""
    by_path = _by_path(kinds)
    for path, module in network.named_modules():
        kind = by_path.get(path)
        if kind is not None:
            assert isinstance(module, ExpertStack | Linear)
            assert module.scale is not None
            if isinstance(module, ExpertStack):
                module.keep(experts_kept(kind, module.weight, module.scale))
            else:
                module.keep(kept(kind, module.weight, module.scale))
        elif isinstance(module, ExpertStack):
            module.keep(experts_to_bf16(module.stored()))
        elif isinstance(module, Linear):
            module.keep(to_bf16(module.stored()))


def _by_path(kinds: Kinds) -> Mapping[str, Kind]:
    """Kinds by the path of their module, all experts of a projection under one."""
    found = {}
    for name, kind in kinds.items():
        expert = EXPERT.fullmatch(name)
        found[f"{expert[1]}.{expert[3]}" if expert else name.removesuffix(".weight")] = kind
    return found


def prepare_weights(network: Transformer, storage: Storage) -> None:
    """Have experts and gates of every layer as the operators of `storage` want them."""
    for module in network.modules():
        if isinstance(module, Gate) and storage.folds_gates and module.folding_saves():
            module.fold()
        if isinstance(module, Experts | SharedExpert) and isinstance(module.w1.stored(), PREPARED):
            parts: list[StoredModule[Any]] = [module.w1, module.w3, module.w2]
            for part, weight in zip(parts, prepared(*(p.stored() for p in parts)), strict=True):
                part.keep(weight)


def official_tensors(network: Transformer) -> Iterator[tuple[str, torch.Tensor]]:
    """(official name, tensor) of every parameter, detached: what a checkpoint holds."""
    for path, module in network.named_modules():
        if isinstance(module, Experts):
            yield from ((f"{path}.{name}", tensor.detach()) for name, tensor in module.by_expert())
        elif not isinstance(module, ExpertStack):
            for leaf, parameter in module.named_parameters(recurse=False):
                yield f"{path}.{leaf}" if path else leaf, parameter.detach()
