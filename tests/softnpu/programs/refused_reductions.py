"""A product of bfloat16 is refused on A2, and nothing is launched;
other products and sums go on. Without the task queue.
"""

import torch
import torch.distributed as dist
import torch_npu  # noqa: F401

dist.init_process_group("hccl")
rank = dist.get_rank()
torch.npu.set_device(rank)
expected = "reduction prod of bfp16: this chip's HCCL reduces int8, int32, fp16, fp32, int64"
for dtype, op, want in (
    (torch.int32, dist.ReduceOp.PRODUCT, 9),
    (torch.bfloat16, dist.ReduceOp.PRODUCT, None),
    (torch.bfloat16, dist.ReduceOp.SUM, 6),
):
    x = torch.full((4,), 3, dtype=dtype, device="npu")
    try:
        dist.all_reduce(x, op)
        assert want and x.tolist() == [want] * 4, (dtype, op, x)
    except RuntimeError as error:
        assert want is None and expected in str(error), error
print(f"refused reductions: rank {rank} good", flush=True)
