"""Ranks that do not say the same of dispatch or combine, or of which one fails: an error on all
ranks, and no wrong value. `distribute_disagree.py CASE`, run by torchrun on two ranks.
"""

import os
import sys

import aclnn
import torch
import torch.distributed as dist
import torch_npu

from softnpu import current

dist.init_process_group("hccl")
rank, ranks, h = dist.get_rank(), dist.get_world_size(), 1024
torch.npu.set_device(rank)
group = dist.new_group(list(range(ranks)))
group = group._get_backend(torch.device("npu")).get_hccl_comm_name(rank)
domain = (group, ranks, rank, 4)


def dispatch(bs=4, domain=domain, ids=None, mask=None, **more):
    x = torch.ones(bs, h, dtype=torch.bfloat16, device="npu")
    ids = torch.tensor([[0, 3]] * bs if ids is None else ids, dtype=torch.int32).npu()
    mask = None if mask is None else torch.tensor(mask).npu()
    return torch_npu.npu_moe_distribute_dispatch_v2(
        x, ids, *domain, shared_expert_num=0, x_active_mask=mask, **more
    )


def combine(sent, bs=4, ids=None, mask=None, **more):
    ids = torch.tensor([[0, 3]] * bs if ids is None else ids, dtype=torch.int32).npu()
    mask = None if mask is None else torch.tensor(mask).npu()
    weights = torch.ones(bs, 2, device="npu")
    return torch_npu.npu_moe_distribute_combine_v2(
        sent[0], ids, sent[2], sent[4], weights, *domain, shared_expert_num=0, x_active_mask=mask,
        **more,
    )  # fmt: skip


def fault(call):
    if rank == 0:
        current().inject(f"aclnnMoeDistribute{call}@kernel:1:507015")
    return combine(dispatch())


def other_version():
    sent, out = dispatch(), torch.zeros(4, h, dtype=torch.bfloat16, device="npu")
    aclnn.call(
        "aclnnMoeDistributeCombineV2", expand_x=sent[0],
        expert_ids=torch.tensor([[0, 3]] * 4, dtype=torch.int32).npu(),
        assist_info_for_combine=sent[2], ep_send_counts=sent[4],
        expert_scales=torch.ones(4, 2, device="npu"), group_ep=group, ep_world_size=ranks,
        ep_rank_id=rank, moe_expert_num=4, group_tp="", tp_world_size=0, tp_rank_id=0,
        expert_shard_type=0, shared_expert_num=0, shared_expert_rank_num=0, global_bs=0,
        out_dtype=0, comm_quant_mode=0, group_list_type=0, comm_alg="", x=out,
    )  # fmt: skip
    return out


def counts_of_another():
    sent = list(dispatch())
    sent[4] = dispatch(ids=[[0, 1]] * 4)[4]
    return combine(sent)


CASES = {
    "experts": lambda: dispatch(domain=(group, ranks, rank, 4 + 4 * rank)),
    "global_bs": lambda: dispatch(bs=4 + rank),
    "buffer": lambda: os.environ.update(HCCL_BUFFSIZE=str(100 + rank)) or dispatch(),
    "quant": lambda: dispatch(quant_mode=2 * rank),
    "call": lambda: combine(dispatch()) if rank else (dispatch(), dispatch()),
    "uneven_mask": lambda: dispatch(bs=3 + rank, mask=[True] * 2 + [False] * (1 + rank),
                                    global_bs=4 * ranks),
    "mask_order": lambda: dispatch(mask=[True, False, True, True] if rank else None),
    "id": lambda: dispatch(ids=[[0, 4 * rank]] * 4),
    "twice": lambda: dispatch(ids=[[1, 1]] * 4, domain=(group, ranks, rank, 2)),
    "dispatch_fault": lambda: fault("DispatchV4"),
    "combine_fault": lambda: fault("CombineV4"),
    "version": other_version,
    "mask": lambda: combine(dispatch(), mask=[True] * 3 + [False]),
    "ids": lambda: combine(dispatch(), ids=[[3, 0]] * 4),
    "counts": counts_of_another,
    "batch": lambda: combine(dispatch(global_bs=6 * ranks), global_bs=5 * ranks),
}  # fmt: skip
for _ in range(2):  # now and later
    try:
        result = CASES[sys.argv[1]]()
        torch.npu.synchronize()
        print("NOT NOTICED", [t.sum().item() for t in result[:1]], flush=True)
    except RuntimeError as error:
        print("learnt", error, flush=True)
os._exit(0)
