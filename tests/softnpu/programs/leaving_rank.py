"""Rank 2 ends in good order and the others go on: forming a group without it, late, is no error.
`leaving_rank.py HOW`.
"""

import sys
import time

import torch
import torch.distributed as dist
import torch_npu  # noqa: F401

LATE = 8
"""Seconds, more than what a rank that joins allows when another one was lost."""

dist.init_process_group("hccl")
rank = dist.get_rank()
torch.npu.set_device(rank)
pair = dist.new_group([0, 1])  # its communicator is formed by the first call
x = torch.ones(4, device="npu")
dist.all_reduce(x)
assert x.tolist() == [3.0] * 4
if rank == 2:
    if sys.argv[1] == "destroy":
        dist.destroy_process_group()
    sys.exit()
if rank == 1:
    time.sleep(LATE)
dist.all_reduce(x, group=pair)
assert x.tolist() == [6.0] * 4
print(f"rank {rank} went on", flush=True)
