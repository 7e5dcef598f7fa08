"""Putting tensors into the network by their checkpoint names, without copying the large ones."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from dsv4_ascend.checkpoint.layout import FP32_NAMES
from dsv4_ascend.model.transformer import Transformer


def assign(network: Transformer, name: str, tensor: torch.Tensor) -> None:
    """Make `tensor` the parameter of official name `name`; it keeps its storage, but for BF16 `FP32_NAMES`."""
    if tensor.dtype == torch.bfloat16 and name.endswith(FP32_NAMES):
        tensor = tensor.float()
    path, _, leaf = name.rpartition(".")
    module = network.get_submodule(path)
    setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))


def assign_all(network: Transformer, tensors: Iterable[tuple[str, torch.Tensor]], device: torch.device) -> Transformer:
    """Assign (name, tensor) pairs, moved to `device` if they are not there, and put the network in eval mode."""
    for name, tensor in tensors:
        assign(network, name, tensor.to(device))
    for module in network.modules():
        for buffer_name, buffer in module.named_buffers(recurse=False):
            setattr(module, buffer_name, buffer.to(device))
    return network.eval()
