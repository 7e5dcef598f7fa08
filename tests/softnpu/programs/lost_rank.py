"""Rank 1 dies without a word; the others must get an error that names it, and no hang.
`lost_rank.py CALL`.
"""

import os
import signal
import sys

import torch
import torch.distributed as dist
import torch_npu  # noqa: F401

dist.init_process_group("hccl")
torch.npu.set_device(dist.get_rank())
group = dist.new_group([0, 1])  # its communicator is formed by the first call
x = torch.ones(4, device="npu")
dist.all_reduce(x)
torch.npu.synchronize()
if dist.get_rank() == 1:
    os.kill(os.getpid(), signal.SIGKILL)
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun wants to end everybody: report first
both = torch.ones(8, device="npu")
CALLS = {
    "all_reduce": lambda: dist.all_reduce(x),
    "broadcast": lambda: dist.broadcast(x, 0),
    "all_gather": lambda: dist.all_gather_into_tensor(both, x),
    "reduce_scatter": lambda: dist.reduce_scatter_tensor(x, both),
    "all_to_all": lambda: dist.all_to_all_single(x, x.clone()),
    "barrier": dist.barrier,
    "message": lambda: dist.send(x, 1),
    "group": lambda: dist.all_reduce(x, group=group),
}
try:
    CALLS[sys.argv[1]]()
    # No synchronise but the copies' own.
    print("lost rank: NOT NOTICED", x.tolist(), both.tolist(), flush=True)
except RuntimeError as error:
    # The text is on stderr too, unless the communicator could not be formed.
    print("lost rank: noticed", error, flush=True)
os._exit(0)
