"""The device as a user of torch meets it: random numbers,
mixed precision, graphs, streams, copies, statistics.
"""

import ctypes
import io
import threading

import torch
import torch_npu  # noqa: F401
from seeds import seed
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from softnpu import current

DRAWS = {
    "rand": lambda: torch.rand(64, device="npu"),
    "randn": lambda: torch.randn(64, device="npu"),
    "randint": lambda: torch.randint(0, 1000, (64,), device="npu"),
    "dropout": lambda: functional.dropout(torch.ones(64, device="npu"), 0.5),
}


def random_numbers():
    for name, draw in DRAWS.items():
        torch.manual_seed(seed(name))
        first, second = draw(), draw()
        state = torch.npu.get_rng_state()
        third = draw()
        torch.npu.set_rng_state(state)
        assert torch.equal(draw(), third), name
        torch.npu.manual_seed_all(seed(name))
        assert torch.equal(draw(), first) and not torch.equal(first, second), name


def random_numbers_of_a_graph():
    for name, draw in DRAWS.items():
        graph = torch.npu.NPUGraph()
        with torch.npu.graph(graph):
            result = draw()
        runs = []
        for _ in range(2):
            torch.manual_seed(seed(name))
            for _ in range(3):
                graph.replay()
                runs.append(result.clone())
        assert all(torch.equal(runs[i], runs[i + 3]) for i in range(3)), name
        assert not torch.equal(runs[0], runs[1]) and not torch.equal(runs[1], runs[2]), name


def gradient_scaling():
    for bad in (False, True):
        weight = torch.nn.Parameter(torch.ones(4, 4, device="npu"))
        optimiser, scaler = (
            torch.optim.SGD([weight], 0.5),
            torch.amp.GradScaler("npu", init_scale=8.0),
        )
        with torch.autocast("npu", dtype=torch.bfloat16):
            product = weight @ weight
        assert product.dtype == torch.bfloat16
        scaler.scale(product.float().sum() * (float("inf") if bad else 1)).backward()
        scaler.step(optimiser)
        scaler.update()
        assert scaler.get_scale() == (4.0 if bad else 8.0) and weight[0, 0].item() == (
            1.0 if bad else -3.0
        )


def checkpointed():
    layers = torch.nn.Sequential(
        torch.nn.Linear(8, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 8)
    ).npu()
    gradients = []
    for run in (layers, lambda x: checkpoint(layers, x, use_reentrant=False)):
        x = torch.ones(4, 8, device="npu", requires_grad=True)
        torch.manual_seed(seed())
        run(x).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def pinned_loader():
    data = TensorDataset(torch.arange(64.0).view(16, 4))
    batches = [batch for (batch,) in DataLoader(data, 4, pin_memory=True, num_workers=2)]
    assert all(batch.is_pinned() for batch in batches)
    assert torch.cat([batch.to("npu", non_blocking=True) for batch in batches]).sum().item() == 2016


def statistics():
    torch.npu.empty_cache()
    torch.npu.reset_peak_memory_stats()
    before, total = torch.npu.memory_allocated(), torch.npu.mem_get_info()[1]
    block = torch.empty(1 << 20, device="npu")
    assert torch.npu.memory_allocated() - before >= 4 << 20 and total == 256 << 20
    del block
    assert torch.npu.max_memory_allocated() - before >= 4 << 20
    properties = torch.npu.get_device_properties(0)
    assert properties.total_memory == total and torch.npu.device_count() == 8


def threads():
    problems = []

    def work(number):
        try:
            torch.npu.set_device(0)
            with torch.npu.stream(torch.npu.Stream()):
                for _ in range(20):
                    doubled = torch.full((8,), float(number), device="npu") * 2
                    torch.npu.current_stream().synchronize()
                    assert doubled.sum().item() == 16 * number
        except (RuntimeError, AssertionError) as error:
            problems.append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not problems, problems


def storages_and_files():
    x = torch.arange(6.0, device="npu")
    shared = torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(x))
    shared.mul_(2)
    file = io.BytesIO()
    torch.save(x, file)
    for place in ("npu", "npu:1", "cpu"):
        file.seek(0)
        loaded = torch.load(file, map_location=place)
        assert loaded.device.type == place.split(":")[0] and loaded.cpu().tolist() == [
            0,
            2,
            4,
            6,
            8,
            10,
        ]
    x.untyped_storage().resize_(64)
    x.resize_(16)
    assert x[:6].cpu().tolist() == [0, 2, 4, 6, 8, 10]


def two_devices():
    """Contiguous copies of one dtype: all others need the graph-operator path,
    in torch_npu itself.
    """
    x = torch.arange(6.0, device="npu:0")
    for _ in range(10):
        y = x.to("npu:1", non_blocking=True) + 1
        x = torch.empty(6, device="npu:0").copy_(y)
    assert x.cpu().tolist() == [10, 11, 12, 13, 14, 15]


def graphed_module():
    layers = torch.nn.Sequential(
        torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)
    ).npu()
    x = torch.randn(4, 8, device="npu")
    expected = layers(x).detach()
    graphed = torch.npu.make_graphed_callables(layers, (x.clone(),))
    y = graphed(x)
    y.sum().backward()
    assert torch.equal(y.detach(), expected) and layers[0].weight.grad.abs().sum().item() > 0


def captures():
    """CANN's modes: what another thread may do while a stream is captured."""
    x = torch.ones(8, device="npu")
    for mode, allowed in (("global", False), ("thread_local", True), ("relaxed", True)):
        found = []

        def copy(found=found):
            torch.npu.set_device(0)
            try:
                found.append(torch.ones(3).to("npu").sum().item() == 3)
            except RuntimeError as error:
                found.append("107030" not in str(error))

        graph = torch.npu.NPUGraph()
        try:
            with torch.npu.graph(graph, capture_error_mode=mode):
                y = x * 2
                other = threading.Thread(target=copy)
                other.start()
                other.join()
            graph.replay()
            assert allowed and y.sum().item() == 16, mode
        except RuntimeError as error:
            assert not allowed and "the capture was lost: aclrtMemcpy" in str(error), error
        assert found == [allowed], (mode, found)


def freed_before_a_replay():
    block, graph = torch.ones(8 << 20, device="npu"), torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        result = block * 2
    graph.replay()
    assert result.sum().item() == 16 << 20
    del block
    torch.npu.empty_cache()
    graph.replay()
    try:
        torch.npu.synchronize()
    except RuntimeError as error:
        assert "507042" in str(error), error
        return
    raise AssertionError("a replay that reads freed memory was not noticed")


def timing():
    plain, timed = torch.npu.Event(), torch.npu.Event(enable_timing=True)
    assert plain.query()
    for event in (plain, timed):
        event.record()
    try:
        timed.elapsed_time(plain)
    except RuntimeError as error:
        assert "107006" in str(error), error
        return
    raise AssertionError("an event without a time was asked for it")


def dead_handles():
    acl, opapi = ctypes.CDLL("libascendcl.so"), ctypes.CDLL("libopapi.so")
    acl.aclCreateIntArray.restype, acl.aclGetRecentErrMsg.restype = ctypes.c_void_p, ctypes.c_char_p
    array = ctypes.c_void_p(acl.aclCreateIntArray((ctypes.c_int64 * 2)(1, 2), ctypes.c_uint64(2)))
    assert acl.aclDestroyIntArray(array) == 0 and acl.aclDestroyIntArray(array) == 161002
    size, executor = ctypes.c_uint64(), ctypes.c_void_p()
    for handle in (array, ctypes.c_void_p(0x1234)):
        code = opapi.aclnnAbsGetWorkspaceSize(
            handle, handle, ctypes.byref(size), ctypes.byref(executor)
        )
        message = acl.aclGetRecentErrMsg().decode()
        assert code == 161002 and "argument 1 is no live aclTensor" in message, (code, message)


torch.npu.set_device(0)
CASES = [
    random_numbers, random_numbers_of_a_graph, gradient_scaling, checkpointed, pinned_loader,
    statistics, threads, storages_and_files, two_devices, graphed_module, captures, timing,
    dead_handles, freed_before_a_replay,
]  # fmt: skip
for case in CASES:
    case()
    torch.npu.synchronize()
counts = current().alive()
assert not any(
    counts[name] for name in ("tensors", "tensor_lists", "scalars", "arrays", "executors")
), counts
print("runtime good")
