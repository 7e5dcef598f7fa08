"""vLLM's groups of ranks as ours."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.distributed import get_tp_group

from dsv4_ascend.model.parallel import ALONE, Parallel, TorchGroup
from dsv4_ascend.model.sharding import DeviceLayout


def parallel_of(config: VllmConfig) -> Parallel:
    """The share of this rank: attention and vocabulary by vLLM's tensor group, and the routed
    experts by number among the same ranks, with --enable-expert-parallel or without.
    """
    size = config.parallel_config.tensor_parallel_size
    if size == 1:
        return ALONE
    found = get_tp_group()
    group = TorchGroup(found.device_group, found.ranks)
    layout = DeviceLayout(size, tp=size, ep=size)
    return Parallel(layout, group.rank, tensor=group, same_tokens=group, experts=group)
