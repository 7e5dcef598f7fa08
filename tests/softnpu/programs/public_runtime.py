"""What torch_npu's public tests ask of the runtime: limits, host memory, profiles, batches of
copies; and optimisers and losses that round as CANN's operators do.
"""

import ctypes

import torch
import torch.nn.functional as F
import torch_npu
from aclnn import ACL
from fused_check import A5, f32, problems

CORES = (28, 56) if A5 else (20, 40)
HOST, DEVICE = 0, 1


def expect(what, found, wanted):
    if found != wanted:
        problems.append(f"{what}: found {found}, expected {wanted}")


def check_device():
    """Attributes are told apart; a device's limits hold for its streams, until they have some."""
    properties = torch.npu.get_device_properties(0)
    found = (properties.cube_core_num, properties.vector_core_num, properties.L2_cache_size)
    expect("device properties", found, (*CORES, 192 << 20))
    stream = torch.npu.Stream()
    names = ("cube_core_num", "vector_core_num")
    expect("limits", torch.npu.get_device_limit(0), dict(zip(names, CORES, strict=True)))
    torch.npu.set_device_limit(0, 12, 20)
    expect("stream", torch.npu.get_stream_limit(stream), dict(zip(names, (12, 20), strict=True)))
    torch.npu.set_stream_limit(stream, 8, 10)
    expect("stream", torch.npu.get_stream_limit(stream), dict(zip(names, (8, 10), strict=True)))
    expect("device", torch.npu.get_device_limit(0), dict(zip(names, (12, 20), strict=True)))
    torch.npu.reset_stream_limit(stream)
    expect("stream", torch.npu.get_stream_limit(stream), dict(zip(names, (12, 20), strict=True)))
    expect("too many cores", ACL.aclrtSetDeviceResLimit(0, 0, CORES[0] + 1), 107000)
    expect("resource type", ACL.aclrtSetDeviceResLimit(0, 2, 1), 107000)
    ACL.aclrtResetDeviceResLimit(0)
    expect("limits", torch.npu.get_device_limit(0), dict(zip(names, CORES, strict=True)))


def check_memory():
    """Host memory at device addresses is one memory; use is told; copies go by their sides."""
    swapped = torch_npu.empty_with_swapped_memory([64], dtype=torch.float32, device="npu:0")
    swapped.fill_(1.5)
    expect("swapped memory", (swapped * 2).cpu().tolist(), [3.0] * 64)
    del swapped

    class Use(ctypes.Structure):
        _fields_ = (
            ("name", ctypes.c_char * 32),
            ("now", ctypes.c_uint64),
            ("peak", ctypes.c_uint64),
            ("reserved", ctypes.c_size_t * 8),
        )

    use, count = (Use * 4)(), ctypes.c_size_t()
    expect("memory use", ACL.aclrtGetMemUsageInfo(0, use, 4, ctypes.byref(count)), 0)
    free, total = torch.npu.mem_get_info()
    expect("memory use", (count.value, use[0].name, use[0].now), (1, b"app", total - free))
    if use[0].peak < use[0].now:
        problems.append(f"memory use: the peak {use[0].peak} is below {use[0].now}")


def check_copies():
    """A batch of two copies, to the device and back, and one that fails at its second copy."""
    source, back = torch.arange(8, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    device = torch.zeros(8, dtype=torch.int32).npu()
    torch.npu.synchronize()

    def copy(to, room):
        pointers, sizes = ctypes.c_void_p * 2, ctypes.c_size_t * 2
        sides = (ctypes.c_uint32 * 16)(0, DEVICE, 0, HOST, *[0] * 4, 0, HOST, 0, DEVICE)
        failed = ctypes.c_size_t()
        code = ACL.aclrtMemcpyBatch(
            pointers(device.data_ptr(), to),
            sizes(32, room),
            pointers(source.data_ptr(), device.data_ptr()),
            sizes(32, 32),
            ctypes.c_size_t(2),
            sides,
            sizes(0, 1),
            ctypes.c_size_t(2),
            ctypes.byref(failed),
        )
        return code, failed.value

    expect("batch of copies", copy(back.data_ptr(), 32), (0, 2**64 - 1))
    expect("batch of copies", back.tolist(), list(range(8)))
    expect("failing copy", copy(back.data_ptr(), 16), (107000, 1))


def check_profile():
    """Start-up and its order: nothing starts before aclprofInit, or twice."""
    devices = (ctypes.c_uint32 * 1)(0)
    ACL.aclprofCreateConfig.restype = ctypes.c_void_p
    config = ctypes.c_void_p(ACL.aclprofCreateConfig(devices, 1, 0, None, ctypes.c_uint64(1)))
    expect("start before init", ACL.aclprofStart(config), 107000)
    expect("init", ACL.aclprofInit(b"/tmp", ctypes.c_size_t(4)), 0)
    expect("start", [ACL.aclprofStart(config) for _ in range(2)], [0, 107000])
    expect("stop", [ACL.aclprofStop(config) for _ in range(2)], [0, 107000])
    expect("end", [ACL.aclprofFinalize(), ACL.aclprofDestroyConfig(config)], [0, 0])
    expect("destroyed", ACL.aclprofStart(config), 107000)


def check_rounding():
    """AdamW counts its first step as 1; the loss of fp16 logits is rounded once."""
    a = f32(5, 3)
    b = a.clone().npu()
    plain = torch.optim.AdamW([a.requires_grad_()], lr=0.1)
    fused = torch.optim.AdamW([b.requires_grad_()], lr=0.1, fused=True)
    for _ in range(3):
        a.grad = f32(5, 3)
        b.grad = a.grad.npu()
        plain.step(), fused.step()
        torch.testing.assert_close(b.detach().cpu(), a.detach())
    x, target = f32(1000).half(), f32(1000).sigmoid().half()
    weight, pos = f32(1000).exp().half(), f32(1000).exp().half()
    for more in ({}, {"weight": weight, "pos_weight": pos}):
        leaf, wide = x.npu().requires_grad_(), x.float().requires_grad_()
        on = {name: value.npu() for name, value in more.items()}
        loss = F.binary_cross_entropy_with_logits(leaf, target.npu(), reduction="none", **on)
        exact = F.binary_cross_entropy_with_logits(
            wide, target.float(), reduction="none", **{n: v.float() for n, v in more.items()}
        )
        loss.backward(torch.ones(1000).half().npu()), exact.backward(torch.ones(1000))
        for got, want in ((loss.detach(), exact.detach()), (leaf.grad, wide.grad)):
            expect("values rounded twice", (got.cpu() != want.half()).sum().item(), 0)


for step in (check_device, check_memory, check_copies, check_profile, check_rounding):
    step()
