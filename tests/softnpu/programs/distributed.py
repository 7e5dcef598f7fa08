"""What users of torch.distributed call beyond single collectives,
on backend hccl, against what one process computes.
"""

import copy
import math

import torch
import torch.distributed as dist
import torch_npu  # noqa: F401
import torch_npu.distributed as npu
from seeds import seed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _coalescing_manager
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("hccl")
rank, size = dist.get_rank(), dist.get_world_size()
torch.npu.set_device(rank)
everybody = range(size)


def full(value, length=4):
    return torch.full((length,), float(value), device="npu")


def coalesced():
    for asynchronous in (False, True):
        reduced, gathered = (
            [full(rank + i) for i in range(3)],
            [full(-1, 4 * size) for _ in range(3)],
        )
        with _coalescing_manager(device=torch.device("npu", rank), async_ops=asynchronous) as work:
            for x in reduced:
                dist.all_reduce(x)
        if asynchronous:
            work.wait()
        with _coalescing_manager(device=torch.device("npu", rank), async_ops=asynchronous) as work:
            for i, y in enumerate(gathered):
                dist.all_gather_into_tensor(y, full(rank + i))
        if asynchronous:
            work.wait()
        for i in range(3):
            assert reduced[i].tolist() == [sum(everybody) + size * i] * 4
            assert gathered[i][::4].tolist() == [owner + i for owner in everybody]


def objects():
    gathered = [None] * size
    dist.all_gather_object(gathered, {"rank": rank, "text": "x" * rank * 100})
    assert gathered == [{"rank": owner, "text": "x" * owner * 100} for owner in everybody]
    sent = [{"from": 0}, [1, 2]] if rank == 0 else [None, None]
    dist.broadcast_object_list(sent, 0)
    assert sent == [{"from": 0}, [1, 2]]
    mine = [None]
    dist.scatter_object_list(
        mine, [f"for {other}" for other in everybody] if rank == 0 else None, 0
    )
    assert mine == [f"for {rank}"]


def lists():
    for rows in ([3] * size, [2 + owner for owner in everybody]):  # alike and uneven
        outs = [full(-1, n) for n in rows]
        dist.all_gather(outs, full(rank, rows[rank]))
        assert [out.tolist() for out in outs] == [[owner] * rows[owner] for owner in everybody]
        out = full(-1, rows[rank])
        dist.reduce_scatter(out, [full(10 * rank + other, rows[other]) for other in everybody])
        assert out.tolist() == [10.0 * sum(everybody) + size * rank] * rows[rank]
        outs = [full(-1, n) for n in rows]
        dist.all_to_all(outs, [full(10 * rank + other, rows[rank]) for other in everybody])
        assert [out.tolist() for out in outs] == [
            [10.0 * owner + rank] * rows[owner] for owner in everybody
        ]
    outs = [full(-1) for _ in everybody] if rank == 0 else None
    dist.gather(full(rank), outs, 0)
    assert rank or [out[0].item() for out in outs] == list(everybody)
    out = full(-1)
    dist.scatter(out, [full(other) for other in everybody] if rank == 0 else None, 0)
    assert out[0].item() == rank


def uneven():
    """torch_npu's own calls."""
    rows = [2 + owner for owner in everybody]
    out = full(-1, sum(rows))
    npu.all_gather_into_tensor_uneven(out, full(rank, rows[rank]), rows)
    assert out.tolist() == [float(owner) for owner in everybody for _ in range(rows[owner])]
    out = full(-1, rows[rank])
    npu.reduce_scatter_tensor_uneven(out, torch.arange(float(sum(rows)), device="npu"), rows)
    assert out.tolist() == [size * (sum(rows[:rank]) + i) for i in range(rows[rank])]
    counts = [[1 + owner + 2 * other for other in everybody] for owner in everybody]
    out = full(-1, sum(row[rank] for row in counts))
    npu.all_to_all_vc(
        out,
        torch.cat([full(10 * rank + other, counts[rank][other]) for other in everybody]),
        counts,
    )
    assert out.tolist() == [
        10.0 * owner + rank for owner in everybody for _ in range(counts[owner][rank])
    ]


def batches():
    after, before = (rank + 1) % size, (rank - 1) % size
    outs = [full(-1, 3 + i) for i in range(3)]
    sends = [dist.P2POp(dist.isend, full(100 * rank + i, 3 + i), after) for i in range(3)]
    for work in dist.batch_isend_irecv(
        [*sends, *(dist.P2POp(dist.irecv, out, before) for out in outs)]
    ):
        work.wait()
    assert [out[-1].item() for out in outs] == [100.0 * before + i for i in range(3)]


def odd_tensors():
    empty = full(0, 0)
    for call in (
        dist.all_reduce,
        lambda x: dist.broadcast(x, 0),
        lambda x: dist.all_to_all_single(full(0, 0), x),
    ):
        call(empty)
    dist.send(empty, 1) if rank == 0 else dist.recv(empty, 0) if rank == 1 else None
    outs = [torch.empty(3, 4, device="npu").t() for _ in everybody]  # not contiguous
    dist.all_gather(outs, torch.arange(12.0, device="npu").view(4, 3) + rank)
    assert all(
        torch.equal(outs[owner].cpu(), torch.arange(12.0).view(4, 3) + owner) for owner in everybody
    )
    for op, want in (
        (dist.ReduceOp.MAX, [True, False, True]),
        (dist.ReduceOp.MIN, [True, False, False]),
    ):
        flags = torch.tensor([True, False, rank == 0], device="npu")
        dist.all_reduce(flags, op)
        assert flags.tolist() == want


def reductions():
    for op, want in (
        (dist.ReduceOp.AVG, (size + 3) / 2),
        (dist.ReduceOp.PRODUCT, math.prod(range(2, size + 2))),
    ):
        dist.all_reduce(x := full(rank + 2), op)
        assert x[0].item() == want
    for dtype in (torch.uint8, torch.int16, torch.complex64):
        dist.all_reduce(x := torch.ones(3).to(dtype).npu())
        assert x.cpu().eq(size).all()


def groups():
    for members in (list(everybody), [0, 1]):
        group = dist.new_group(members)
        if rank in members:
            dist.all_reduce(x := full(1), group=group)
            assert x[0].item() == len(members)
            dist.destroy_process_group(group)


def network():
    torch.manual_seed(seed("network"))
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))


def data():
    return torch.randn(4 * size, 8, generator=torch.Generator().manual_seed(seed("data")))


def train(model, x, step=0.1):
    optimiser = torch.optim.AdamW(model.parameters(), lr=step)
    for _ in range(3):
        optimiser.zero_grad()
        model(x).square().mean().backward()
        optimiser.step()
    return [getattr(p, "full_tensor", lambda p=p: p)().detach().cpu() for p in model.parameters()]


def training():
    mesh, alone = init_device_mesh("npu", (size,)), train(network(), data())
    sharded, parallel = (
        network().npu(),
        parallelize_module(network().npu(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()}),
    )
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer, mesh=mesh)
    mine = data()[rank::size].npu()
    for model, x in (
        (DistributedDataParallel(network().npu()), mine),
        (sharded, mine),
        (parallel, data().npu()),
    ):
        assert all(
            torch.allclose(a, b, atol=1e-4) for a, b in zip(train(model, x), alone, strict=True)
        )


def meshes():
    mesh, x = init_device_mesh("npu", (size,)), torch.arange(30.0).view(5, 6)
    rows = distribute_tensor(x.npu(), mesh, [Shard(0)])
    assert torch.equal(rows.redistribute(mesh, [Shard(1)]).full_tensor().cpu(), x)
    assert torch.allclose((rows @ rows.t()).full_tensor().cpu(), x @ x.t())
    if size == 4:
        square = init_device_mesh("npu", (2, 2), mesh_dim_names=("data", "tensor"))
        alone = network()
        model = parallelize_module(
            copy.deepcopy(alone).npu(),
            square["tensor"],
            {"0": ColwiseParallel(), "2": RowwiseParallel()},
        )
        fully_shard(model, mesh=square["data"])
        mine = data()[square["data"].get_local_rank() :: 2].npu()
        assert all(
            torch.allclose(a, b, atol=1e-4)
            for a, b in zip(train(model, mine), train(alone, data()), strict=True)
        )


for check in (
    coalesced,
    objects,
    lists,
    uneven,
    batches,
    odd_tensors,
    reductions,
    groups,
    training,
    meshes,
):
    try:
        check()
        torch.npu.synchronize()
    except BaseException:
        print(f"distributed: {check.__name__} failed on rank {rank}", flush=True)
        raise
print(f"distributed: rank {rank} of {size} good", flush=True)
dist.destroy_process_group()
