"""Two ranks that do not say the same, or of which one fails: an error on both, and no wrong value.
`disagreeing_ranks.py CASE`.
"""

import os
import sys

import torch
import torch.distributed as dist
import torch_npu  # noqa: F401

from softnpu import current

dist.init_process_group("hccl")
rank = dist.get_rank()
torch.npu.set_device(rank)
first = torch.ones(4, device="npu")
dist.all_reduce(first)
assert first.tolist() == [2.0] * 4


def uneven():
    out, into = ([1, 3], [1, 2]) if rank == 0 else ([2, 2], [2, 2])
    y = torch.empty(sum(into), device="npu")
    dist.all_to_all_single(y, torch.ones(sum(out), device="npu"), into, out)
    return y


def fails_once():
    if rank == 0:
        current().inject("HcclAllReduce@kernel:1:507015")
    dist.all_reduce(y := torch.ones(4, device="npu"))
    return y


def reduce(x):
    dist.all_reduce(x)
    return x


def other_call(x):
    (dist.all_reduce if rank else lambda x: dist.broadcast(x, 0))(x)
    return x


def message(x):
    (dist.send if rank else dist.recv)(x, 1 - rank)
    return x


def unreceived(x):
    dist.send(x, 1) if rank == 0 else dist.recv(x, 0)
    x.tolist()
    if rank == 1:  # leaves, and owes the second message
        dist.destroy_process_group()
        sys.exit()
    dist.send(x, 1)
    return x


CASES = {
    "count": lambda: reduce(torch.ones(4 + 4 * rank, device="npu")),
    "dtype": lambda: reduce(torch.ones(4, device="npu", dtype=(torch.float32, torch.int32)[rank])),
    "call": lambda: other_call(torch.ones(4, device="npu")),
    "uneven": uneven,
    "message": lambda: message(torch.ones(4 + 4 * rank, device="npu")),
    "unreceived": lambda: unreceived(torch.ones(4, device="npu")),
    "fault": fails_once,
}
for _ in range(2):  # now and later
    try:
        print("NOT NOTICED", CASES[sys.argv[1]]().tolist(), flush=True)
    except RuntimeError:
        print("learnt", flush=True)
os._exit(0)
