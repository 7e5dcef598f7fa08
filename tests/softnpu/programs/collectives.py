"""Every collective that torch.distributed offers on backend hccl,
against what a single process computes. Run by torchrun.
"""

import torch
import torch.distributed as dist
import torch_npu  # noqa: F401
from seeds import seed

dist.init_process_group("hccl")
rank, size = dist.get_rank(), dist.get_world_size()
torch.npu.set_device(rank)


def data(owner, shape=(5, 3), dtype=torch.float32):
    """What rank `owner` contributes: known to all ranks."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed(f"rank {owner}"))) * 8
    return values.to(dtype)


everybody = range(size)
for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.int8):
    for op, combine in (
        (dist.ReduceOp.SUM, torch.Tensor.add),
        (dist.ReduceOp.MAX, torch.maximum),
        (dist.ReduceOp.MIN, torch.minimum),
    ):
        wide = torch.float32 if dtype.is_floating_point else dtype
        want = data(0, dtype=dtype).to(wide)
        for other in list(everybody)[1:]:
            want = combine(want, data(other, dtype=dtype).to(wide))
        x = data(rank, dtype=dtype).npu()
        dist.all_reduce(x, op)
        assert torch.equal(x.cpu(), want.to(dtype)), ("all_reduce", dtype, op)

big = torch.full((3 << 20,), float(rank), device="npu")  # 12 MiB: more than one round
dist.all_reduce(big)
assert big.cpu().eq(sum(everybody)).all()

parts = [torch.empty(5, 3, device="npu") for _ in everybody]
dist.all_gather(parts, data(rank).npu())
whole = torch.empty(5 * size, 3, device="npu")
dist.all_gather_into_tensor(whole, data(rank).npu())
for owner in everybody:
    assert torch.equal(parts[owner].cpu(), data(owner)) and torch.equal(
        whole[5 * owner : 5 * owner + 5].cpu(), data(owner)
    )

piece = torch.empty(2, 3, device="npu")
dist.reduce_scatter_tensor(piece, data(rank, (2 * size, 3)).npu())
want = torch.stack([data(owner, (2 * size, 3)) for owner in everybody]).sum(0)
assert torch.allclose(piece.cpu(), want[2 * rank : 2 * rank + 2], atol=1e-5)

for root in everybody:
    x = data(rank).npu()
    dist.broadcast(x, root)
    assert torch.equal(x.cpu(), data(root))
    x = data(rank).npu()
    dist.reduce(x, root)
    if rank == root:
        assert torch.allclose(
            x.cpu(), torch.stack([data(owner) for owner in everybody]).sum(0), atol=1e-5
        )

# Uneven all-to-all: rank i sends i + 2j rows to rank j; some counts are zero.
send = [rank + 2 * other for other in everybody]
receive = [other + 2 * rank for other in everybody]
rows = torch.arange(sum(send) * 4, dtype=torch.float32).view(-1, 4) + 1000 * rank
got = torch.empty(sum(receive), 4, device="npu")
dist.all_to_all_single(got, rows.npu(), receive, send)
want = []
for other in everybody:
    theirs = [other + 2 * k for k in everybody]
    start = sum(theirs[:rank])
    block = torch.arange(sum(theirs) * 4, dtype=torch.float32).view(-1, 4) + 1000 * other
    want.append(block[start : start + theirs[rank]])
assert torch.equal(got.cpu(), torch.cat(want))
outs = [torch.empty(2, device="npu") for _ in everybody]
dist.all_to_all(
    outs, [torch.full((2,), float(10 * rank + other), device="npu") for other in everybody]
)
assert [o[0].item() for o in outs] == [10.0 * other + rank for other in everybody]

# A ring, blocking and batched; 300 KiB does not fit into one mailbox.
after, before = (rank + 1) % size, (rank - 1) % size
mine, theirs = (
    torch.full((75 << 10,), float(rank), device="npu"),
    torch.empty(75 << 10, device="npu"),
)
if rank % 2 == 0:
    dist.send(mine, after), dist.recv(theirs, before)
else:
    dist.recv(theirs, before), dist.send(mine, after)
assert theirs.cpu().eq(before).all()
theirs.zero_()
work = dist.batch_isend_irecv(
    [dist.P2POp(dist.isend, mine, after), dist.P2POp(dist.irecv, theirs, before)]
)
for w in work:
    w.wait()
assert theirs.cpu().eq(before).all()

# Sub-groups, asynchronous work, barrier.
for members in ([0, size - 1], list(range(0, size, 2))):
    group = dist.new_group(sorted(set(members)))
    x = torch.ones(4, device="npu") * (rank + 1)
    if rank in members:
        work = dist.all_reduce(x, group=group, async_op=True)
        work.wait()
        assert x[0].item() == sum(m + 1 for m in set(members))
dist.barrier()

# Tensor-parallel and expert-parallel layers equal the single rank.
g = torch.Generator().manual_seed(seed("layers"))
x, w1, w2 = (
    torch.randn(6, 8, generator=g),
    torch.randn(8, 4 * size, generator=g),
    torch.randn(4 * size, 8, generator=g),
)
mine = slice(4 * rank, 4 * rank + 4)
y = torch.relu(x.npu() @ w1[:, mine].npu()) @ w2[mine].npu()
dist.all_reduce(y)
assert torch.allclose(y.cpu(), torch.relu(x @ w1) @ w2, atol=1e-4)

experts = torch.randn(size, 8, 8, generator=g)
tokens = torch.randn(size, 7, 8, generator=g)
choice = torch.randint(0, size, (size, 7), generator=g)
order = choice[rank].argsort(stable=True)
counts = torch.bincount(choice[rank], minlength=size).npu()
theirs = torch.empty_like(counts)
dist.all_to_all_single(theirs, counts)
arrived = torch.empty(int(theirs.sum()), 8, device="npu")
dist.all_to_all_single(arrived, tokens[rank][order].npu(), theirs.tolist(), counts.tolist())
done = arrived @ experts[rank].npu()
back = torch.empty(7, 8, device="npu")
dist.all_to_all_single(back, done, counts.tolist(), theirs.tolist())
result = torch.empty_like(back)
result[order.npu()] = back
want = torch.einsum("td,tde->te", tokens[rank], experts[choice[rank]])
assert torch.allclose(result.cpu(), want, atol=1e-4)

torch.npu.synchronize()
print(f"collectives: rank {rank} of {size} good", flush=True)
dist.destroy_process_group()
