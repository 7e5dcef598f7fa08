"""npu_moe_distribute_dispatch_v2 and npu_moe_distribute_combine_v2 of the unmodified torch_npu, on
the ranks of torchrun, against formulas in NumPy over the inputs of all ranks, bit for bit.

Every planted fault replaces a step of the formulas: some rank must see it in some case. `all`: also
the older versions and refusals.
"""

import sys

import aclnn
import torch
import torch.distributed as dist
import torch_npu
from distribute_calls import GROUP, combine, device, dispatch, npu, of_experts
from distribute_formulas import A2, A5, CASES, EXPERTS, FAULTS, RANK, RANKS, STEPS, World
from fused_check import distance, problems

from softnpu import current


def check_all():
    got = [device(case) for case in CASES]

    def distances(steps):
        for case, found in zip(CASES, got, strict=True):
            wanted = World(case, steps).results()
            assert len(found) == len(wanted), case.name
            for place, (f, w) in enumerate(zip(found, wanted, strict=True)):
                yield case.name, place, distance(f, w)

    for name, place, d in distances(STEPS):
        if d != 0:
            problems.append(f"{name}: result {place} differs by {d:.3g}")
    seen = torch.tensor(
        [any(d > 0 for *_, d in distances(STEPS.but(**steps))) for steps in FAULTS.values()],
        dtype=torch.int32,
        device="npu",
    )
    dist.all_reduce(seen, dist.ReduceOp.MAX)  # by any rank
    for fault, by in zip(FAULTS, seen.tolist(), strict=True):
        if not by:
            problems.append(f"fault not caught: {fault}")
    print(f"distribute: {len(CASES)} cases, {len(FAULTS)} faults", flush=True)


def versions_agree():
    """V2 and V3, which torch_npu calls where V4 is absent, give the bits of V4."""
    case = CASES[-1] if A5 else CASES[6]
    sent = dispatch(case)
    y = of_experts(case, sent).npu()
    x = combine(case, y, sent)
    own, ids, weights, mask, shared, _ = (npu(t) for t in case.of(RANK))
    domain = dict(
        group_ep=GROUP, ep_world_size=RANKS, ep_rank_id=RANK, moe_expert_num=EXPERTS, group_tp="",
        tp_world_size=0, tp_rank_id=0, expert_shard_type=0, shared_expert_num=0,
        shared_expert_rank_num=0, global_bs=case.bs[0] * RANKS, comm_alg="",
    )  # fmt: skip
    for version in (2, 3):
        special = dict(zero_expert_num=0, copy_expert_num=0, const_expert_num=0)
        domain |= special if version == 3 else {}
        out = [torch.full_like(t.view(torch.uint8), 255).view(t.dtype) for t in sent if t.numel()]
        names = ("expand_x", "dynamic_scales", "assist_info_for_combine", "expert_token_nums",
                 "ep_recv_counts", "expand_scales")  # fmt: skip
        named = dict(zip(names, out, strict=True))
        aclnn.call(
            f"aclnnMoeDistributeDispatchV{version}", x=own, expert_ids=ids, x_active_mask=mask,
            expert_scales=weights if A2 else None, quant_mode=case.quant, expert_token_nums_type=1,
            **domain, **named,
        )  # fmt: skip
        found = torch.full_like(x, float("nan"))
        aclnn.call(
            f"aclnnMoeDistributeCombineV{version}", expand_x=y, expert_ids=ids,
            assist_info_for_combine=named["assist_info_for_combine"],
            ep_send_counts=named["ep_recv_counts"], expert_scales=weights, x_active_mask=mask,
            shared_expert_x=shared if case.shared else None, out_dtype=0, comm_quant_mode=0,
            group_list_type=0, x=found, **domain,
        )  # fmt: skip
        torch.npu.synchronize()
        n = int(sent[4][EXPERTS - 1])
        same = all(
            torch.equal(a[:n].cpu().view(torch.uint8), b[:n].cpu().view(torch.uint8))
            for a, b in ((named["expand_x"], sent[0]), (named["ep_recv_counts"], sent[4]))
        )
        if not same or not torch.equal(found.cpu(), x.cpu()):
            problems.append(f"V{version} differs from V4")


def replayed():
    """Both in a graph, replayed with other tokens for other experts: what eager calls give."""
    x, ids, weights, *_ = (npu(t) for t in CASES[0].of(RANK))
    domain = GROUP, RANKS, RANK, EXPERTS
    alike = dict(shared_expert_num=0, global_bs=CASES[0].global_bs())

    def there_and_back():
        sent = torch_npu.npu_moe_distribute_dispatch_v2(x, ids, *domain, **alike)
        return torch_npu.npu_moe_distribute_combine_v2(
            sent[0], ids, sent[2], sent[4], weights, *domain, **alike
        )

    there_and_back()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        found = there_and_back()
    for _ in range(2):
        x.mul_(-0.5), ids.add_(1).remainder_(EXPERTS)
        graph.replay()
        if not torch.equal(found.cpu(), there_and_back().cpu()):
            problems.append("a replay differs from eager calls")


check_all()
called = current().launches().keys()
if not {"aclnnMoeDistributeDispatchV4", "aclnnMoeDistributeCombineV4"} <= called:
    problems.append("torch_npu calls other functions than V4")
if "all" in sys.argv:
    versions_agree()
    replayed()
    from distribute_refused import refusals

    refusals()
torch.npu.synchronize()
for problem in problems:
    print("PROBLEM", RANK, problem, flush=True)
print(f"distribute: rank {RANK} of {RANKS}, {len(problems)} problems", flush=True)
dist.destroy_process_group()
sys.exit(bool(problems))
