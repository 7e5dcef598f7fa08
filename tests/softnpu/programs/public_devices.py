"""Several devices of one process: copies between them that are more than bytes, and all ranks of a
communicator in one process.
"""

import ctypes

import torch
from fused_check import A5, f32, problems

HCCL = ctypes.CDLL("libhccl.so")


def check_copies():
    """Views of one device arrive on another, and in a part of its tensors."""
    x = f32(4, 6)
    for view in (lambda t: t.t(), lambda t: t[:, 1:4], lambda t: t[1:3]):
        found = view(x.to("npu:1")).to("npu:0").cpu()
        if not torch.equal(found, view(x)):
            problems.append(f"copy between devices: found {found}, expected {view(x)}")
    out = torch.zeros(4, 6, device="npu:0")
    out[:, :3] = x[:, 3:].contiguous().to("npu:1")
    if not torch.equal(out.cpu()[:, :3], x[:, 3:]):
        problems.append("copy into a part of another device's tensor")


def check_ranks():
    """A communicator of two ranks in one process sends what rank 0 has to both."""
    handles, devices = (ctypes.c_void_p * 2)(), (ctypes.c_int32 * 2)(0, 1)
    assert HCCL.HcclCommInitAll(2, devices, handles) == 0
    parts = [torch.full((5,), 1.0 + rank, device=f"npu:{rank}") for rank in range(2)]
    for rank, part in enumerate(parts):
        with torch.npu.device(rank):
            torch.npu.synchronize()
            stream = ctypes.c_void_p(torch.npu.current_stream().npu_stream)
            code = HCCL.HcclBroadcast(
                ctypes.c_void_p(part.data_ptr()), ctypes.c_uint64(5), 4, 0,
                ctypes.c_void_p(handles[rank]), stream,
            )  # fmt: skip
            assert code == 0, code
    for rank, part in enumerate(parts):
        with torch.npu.device(rank):
            torch.npu.synchronize()
        if part.tolist() != [1.0] * 5:
            problems.append(f"broadcast in one process: rank {rank} has {part.tolist()}")
    for handle in handles:
        assert HCCL.HcclCommDestroy(ctypes.c_void_p(handle)) == 0
    twice = (ctypes.c_int32 * 2)(1, 1)
    if HCCL.HcclCommInitAll(2, twice, handles) == 0:
        problems.append("HcclCommInitAll: one device twice was accepted")


if not A5:  # torch_npu refuses such copies there
    check_copies()
check_ranks()
torch.npu.set_device(0)
