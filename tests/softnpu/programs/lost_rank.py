"""Rank 1 dies without a word; the others must get an error that names it, and no hang."""

import os
import signal

import torch
import torch.distributed as dist
import torch_npu  # noqa: F401

dist.init_process_group("hccl")
torch.npu.set_device(dist.get_rank())
x = torch.ones(4, device="npu")
dist.all_reduce(x)
torch.npu.synchronize()
if dist.get_rank() == 1:
    os.kill(os.getpid(), signal.SIGKILL)
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun wants to end everybody: report first
try:
    dist.all_reduce(x)
    torch.npu.synchronize()
    print("lost rank: NOT NOTICED", flush=True)
except RuntimeError as error:
    print("lost rank: noticed" if "is gone" in str(error) else f"lost rank: {error}", flush=True)
os._exit(0)
