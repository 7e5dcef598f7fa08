"""What the device must notice, one case for each process: `guards.py CASE`.
Prints "caught" or ends the process on purpose.
"""

import contextlib
import ctypes
import os
import sys

import torch
import torch_npu

from softnpu import current

case = sys.argv[1]
device = current()


def expect(function, *words):
    try:
        function()
        torch.npu.synchronize()
    except (RuntimeError, torch.OutOfMemoryError) as error:
        missing = [word for word in words if word not in str(error)]
        assert not missing, (missing, str(error))
        return
    raise AssertionError(f"{case}: nothing was raised")


x = torch.arange(8.0, device="npu")
torch.npu.synchronize()
if case == "dereference":  # the process must die with a message that names the pointer
    print(hex(x.data_ptr()), flush=True)
    ctypes.c_float.from_address(x.data_ptr()).value
    sys.exit(0)
elif case == "over-write":
    # Without caching: 480 bytes and 32 of padding, rounded to 512.
    y = torch.empty(120, device="npu")
    device.raw_write(y.data_ptr(), 512, 1)
    expect(torch.npu.synchronize, "of 512 bytes was over-written 0 bytes behind its end")
elif case == "fresh":
    floats, integers = torch.empty(5, device="npu"), torch.empty(3, dtype=torch.int32, device="npu")
    assert floats.cpu().isnan().all() and integers.cpu().eq(-1).all()
elif case == "memory":
    expect(lambda: torch.empty(300 << 20, dtype=torch.uint8, device="npu"), "out of memory")
    assert torch.ones(4, device="npu").sum().item() == 4
elif case == "kernel":
    expect(lambda: torch.nn.functional.embedding(torch.tensor([99]).npu(), torch.ones(4, 2).npu()))
    assert (x + 1).sum().item() == 36
elif case == "inject":
    device.inject("aclnnMulGetWorkspaceSize:2:161002")
    assert (x * x)[1].item() == 1
    expect(lambda: x * x, "injected fault 161002 in aclnnMulGetWorkspaceSize")
    assert (x * x)[2].item() == 4
    device.inject("aclnnMul@kernel:1:507015")
    y = x * x  # the launch is good; the fault is found when the stream is synchronised
    expect(torch.npu.synchronize, "507015")
    device.inject("aclrtMallocAlign32:1:207001,aclrtMallocAlign32:2:207001")
    expect(lambda: torch.empty(50 << 20, device="npu"), "out of memory")
    device.inject("")
elif case == "unknown":
    unknown = {
        "YoloBoxesEncode": lambda: torch_npu.npu_yolo_boxes_encode(
            x.view(2, 4), x.view(2, 4), torch.ones(2, dtype=torch.int32).npu(), False
        ),
        "aclStft": lambda: torch.stft(
            torch.ones(16).npu(), 4, window=torch.ones(4).npu(), return_complex=True
        ),
    }
    expect(unknown[sys.argv[2]], sys.argv[2])
elif case == "graph":
    static, graph = torch.ones(16, device="npu"), torch.npu.NPUGraph()
    side = torch.npu.Stream()
    with torch.npu.graph(graph):
        a = static * 2
        side.wait_stream(torch.npu.current_stream())
        with torch.npu.stream(side):
            b = a + 1
        torch.npu.current_stream().wait_stream(side)
        c = b * a
    for value in (1.0, 3.0):
        static.fill_(value)
        graph.replay()
        assert c[0].item() == (2 * value + 1) * 2 * value
elif case == "events":
    start, end = torch.npu.Event(enable_timing=True), torch.npu.Event(enable_timing=True)
    start.record()
    y = x @ x
    end.record()
    end.synchronize()
    assert start.elapsed_time(end) >= 0 and y.item() == 140
elif case == "leak":
    for _ in range(20):
        z = torch.nn.functional.silu(x[2:] * 2).sum()
    torch.npu.synchronize()
    counts = device.alive()
    kinds = ("tensors", "tensor_lists", "scalars", "arrays", "executors")
    assert not any(counts[name] for name in kinds), counts
elif case == "idle":
    device.inject("aclnnMul@idle:1:1")
    y = x * x
    torch.npu.synchronize()
    assert device.statistics()["idle_launches"] == {"aclnnMul": 1} and y.isnan().all()
elif case == "unlaunched":
    # With the task queue on: the failed phase 2 of the first makes torch_npu drop the second.
    device.inject("aclnnMul:1:507015")
    with contextlib.suppress(RuntimeError):
        x * x
        torch.npu.synchronize()
    with contextlib.suppress(RuntimeError):
        y = x + x
        torch.npu.synchronize()
    assert device.statistics()["unlaunched"].get("aclnnAdd") == 1, device.statistics()["unlaunched"]
elif case == "storage":  # a launcher whose view says one element too many
    sizes, strides, storage = ((ctypes.c_int64 * 1)(n) for n in (5, 2, 8))
    acl = ctypes.CDLL("libascendcl.so")
    acl.aclCreateTensor.restype = ctypes.c_void_p
    tensor = ctypes.c_void_p(
        acl.aclCreateTensor(
            sizes, ctypes.c_uint64(1), 0, strides, ctypes.c_int64(0), 2, storage,
            ctypes.c_uint64(1), ctypes.c_void_p(x.data_ptr()),
        )
    )  # fmt: skip
    size, executor = ctypes.c_uint64(), ctypes.c_void_p()
    acl.aclGetRecentErrMsg.restype = ctypes.c_char_p
    code = ctypes.CDLL("libopapi.so").aclnnAbsGetWorkspaceSize(
        tensor, tensor, ctypes.byref(size), ctypes.byref(executor)
    )
    message = acl.aclGetRecentErrMsg().decode()
    assert code == 161002 and "reaches byte 36 of a storage of 32" in message, (code, message)
elif case == "segments":
    # PYTORCH_NPU_ALLOC_CONF=expandable_segments:True: reserve, map, grow, out of memory, unmap.
    parts = [torch.full((1 << 20,), float(i), device="npu") for i in range(20)]
    assert all(part[-1].item() == i for i, part in enumerate(parts))
    expect(lambda: torch.empty(300 << 20, dtype=torch.uint8, device="npu"), "out of memory")
    parts.clear()
    torch.npu.empty_cache()
    assert torch.ones(40 << 20, device="npu").sum().item() == 40 << 20
elif case == "travel":  # a fault on a side stream reaches who waits for it
    device.inject("aclnnMul@kernel:1:507015")
    side = torch.npu.Stream()
    with torch.npu.stream(side):
        y = x * x
    torch.npu.current_stream().wait_stream(side)
    expect(lambda: (y + 1).sum().item(), "aclnnMul")
    device.inject("aclnnMul@kernel:1:507015")
    pinned, event = torch.empty(8, pin_memory=True), torch.npu.Event()
    pinned.copy_(x * x, non_blocking=True)
    event.record()
    expect(event.synchronize, "aclnnMul")
    assert (x * x)[3].item() == 9
elif case == "fork":
    # After the device was used: a child's calls are errors, never a wait for threads it lacks.
    loader = torch.utils.data.DataLoader(range(8), batch_size=4, num_workers=2, pin_memory=True)
    assert sum(batch.npu().sum().item() for batch in loader) == 28
    y = x * 2  # on its way
    if (child := os.fork()) == 0:
        expect(lambda: x * x, "was forked from one that uses the device")
        if os.environ["TASK_QUEUE_ENABLE"] == "1":
            os._exit(0)  # torch_npu itself would wait for its queue, which has no thread here
        expect(y.cpu, "was forked from one that uses the device")
        sys.exit(0)  # torch_npu's own exit runs too
    assert os.waitpid(child, 0)[1] == 0 and y.sum().item() == 56
elif case == "trace":
    (x * 3).sum().item()
    device.write_trace(sys.argv[2])
print("caught", flush=True)
