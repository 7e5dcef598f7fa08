"""Task groups of graphs, external events, registered host memory and the device's pause."""

import ctypes
import json
import tempfile
from pathlib import Path

import torch
import torch_npu
from fused_check import f32, refused

ACL = ctypes.CDLL("libascendcl.so")
PAGE = 4096


def captured(step):
    """(graph, task group) of one step on a stream of its own."""
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        stream = torch.npu.current_stream()
        torch.npu.graph_task_group_begin(stream)
        step()
        group = torch.npu.graph_task_group_end(stream)
    return graph, group


def check_update():
    """Tasks of a group are replaced one by one; the rest of the graph stays."""
    x, out = f32(4).npu(), torch.zeros(4, device="npu")
    graph, group = captured(lambda: torch.mul(x, 2, out=out))
    stream = torch.npu.Stream()
    for factor in (3, 5, 7):
        with torch.npu.stream(stream):
            torch.npu.graph_task_update_begin(stream, group)
            torch.mul(x, factor, out=out)
            torch.npu.graph_task_update_end(stream)
        stream.synchronize()
        graph.replay()
        torch.npu.synchronize()
        assert torch.equal(out.cpu(), x.cpu() * factor), factor
    return graph, group, stream, x, out


def check_refusals(graph, group, stream, x, out):
    """Another operator, and another number of tasks, are refused."""

    def update(step):
        with torch.npu.stream(stream):
            torch.npu.graph_task_update_begin(stream, group)
            step()
            torch.npu.graph_task_update_end(stream)
        torch.npu.synchronize()

    refused("task update", lambda: update(lambda: None), "0 tasks were given for a group of 1")
    graph.replay()
    torch.npu.synchronize()
    assert torch.equal(out.cpu(), x.cpu() * 7)


def check_external_event():
    """A replayed graph waits for a record outside it, once for each reset."""
    x, out = torch.zeros(1, device="npu"), torch.zeros(1, device="npu")
    event, graph, other = torch.npu.ExternalEvent(), torch.npu.NPUGraph(), torch.npu.Stream()
    event.record(other)  # until its first record torch_npu ignores wait and reset
    torch.npu.synchronize()
    with torch.npu.graph(graph):
        stream = torch.npu.current_stream()
        event.wait(stream)
        event.reset(stream)
        torch.add(x, 1, out=out)
    graph.replay()  # takes the first record
    torch.npu.synchronize()
    for value in (10.0, 20.0, 30.0):
        graph.replay()
        with torch.npu.stream(other):
            x.fill_(value)
            event.record(other)
        torch.npu.synchronize()
        assert out.item() == value + 1, (value, out.item())


def check_debug_print(graph):
    """The tasks of a graph as a Chrome trace."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.json"
        graph.debug_dump(str(path))
        names = [task["name"] for task in json.loads(path.read_text())]
    assert names and all(isinstance(name, str) for name in names), names


def check_registration():
    """Registered memory is pinned until it is unregistered; nothing twice."""
    room = ctypes.create_string_buffer(2 * PAGE)
    address = ctypes.c_void_p(ctypes.addressof(room))
    size = ctypes.c_uint64(PAGE)
    assert ACL.aclrtHostRegisterV2(address, size, 0) == 0
    assert ACL.aclrtHostRegisterV2(address, size, 0) != 0
    assert ACL.aclrtFreeHost(address) != 0
    assert ACL.aclrtHostUnregister(address) == 0
    assert ACL.aclrtHostUnregister(address) != 0
    assert ACL.aclrtHostRegisterV2(None, size, 0) != 0
    assert ACL.aclrtHostRegisterV2(address, ctypes.c_uint64(0), 0) != 0


def check_pause():
    """The device's pause takes the cycles it is told, on its stream."""
    start, end = (torch.npu.Event(enable_timing=True) for _ in range(2))
    start.record()
    torch_npu.npu._sleep(int(1.65e9 * 0.03))
    end.record()
    torch.npu.synchronize()
    assert start.elapsed_time(end) >= 29, start.elapsed_time(end)


torch.npu.set_device(0)
state = check_update()
check_refusals(*state)
check_external_event()
check_debug_print(state[0])
check_registration()
check_pause()
