"""What phase 1 of MC2 refuses, on every rank before it sends anything, so that none waits."""

import os

import aclnn
import torch
import torch_npu
from distribute_calls import GROUP, combine, dispatch, of_experts
from distribute_formulas import A2, EXPERTS, LOCAL, RANK, RANKS, Case, H
from fused_check import A5, problems, refused

GOOD = Case("refused", [4] * RANKS)
X, IDS, *_ = GOOD.of(RANK)
SENT = dispatch(GOOD)
Y = of_experts(GOOD, SENT)
RESULT = combine(GOOD, Y, SENT)  # what follows differs by one thing each


def bad(argument, case=GOOD, **more):
    refused("dispatch", lambda: dispatch(case, **more), argument, 561002)


def bad_combine(argument, sent=SENT, y=Y, **more):
    refused("combine", lambda: combine(GOOD, y, sent, **more), argument, 561002)


def direct(argument, group=GROUP, ranks=RANKS, experts=EXPERTS, x=X, ids=IDS, **more):
    refused("dispatch", lambda: torch_npu.npu_moe_distribute_dispatch_v2(
        x.npu(), ids.npu(), group, ranks, RANK, experts, shared_expert_num=0, **more,
    ), argument, 561002)  # fmt: skip


def domains_and_sizes():
    direct("groupEp", group="nobody")
    direct("groupEp", group="")
    direct("epWorldSize", ranks=RANKS + 2, experts=RANKS + 2)
    direct("epWorldSize", ranks=1025, experts=1025)
    direct("moeExpertNum", experts=EXPERTS + 1)
    direct("moeExpertNum", experts=1026 * RANKS)
    direct("H", x=torch.zeros(4, 16, dtype=torch.bfloat16))
    direct("BS", x=torch.zeros(513, H, dtype=torch.bfloat16), ids=IDS[:1].repeat(513, 1))
    direct("K", ids=torch.arange(17, dtype=torch.int32).repeat(4, 1), experts=20 * RANKS)
    direct("expertIds", ids=IDS[:3])
    direct("groupTp", group_tp=GROUP)


def attributes():
    bad("quantMode", quant_mode=7)
    bad("quantMode", quant_mode=1)
    bad("commAlg", comm_alg="ring")
    bad("commAlg" if A5 else "epWorldSize", comm_alg="hierarchy")
    bad("tpWorldSize", tp_world_size=3)
    bad("expertShardType", expert_shard_type=1)
    bad("sharedExpertRankNum", shared_expert_num=1, shared_expert_rank_num=1)
    bad("zeroExpertNum", zero_expert_num=1)
    bad("performanceInfo", performance_info=torch.zeros(RANKS, dtype=torch.int64).npu())
    bad("globalBS", global_bs=3 * RANKS)
    bad("globalBS", global_bs=4 * RANKS + 1)


def tensors():
    bad("scales", scales=torch.ones(EXPERTS, H).npu())
    bad("scales", scales=torch.ones(LOCAL, H).npu(), quant_mode=2)
    bad("xActiveMask", x_active_mask=torch.ones(3, dtype=torch.bool).npu())
    if not A2:
        bad("expertScales", expert_scales=torch.ones(4, 2).npu())
        bad_combine("expandScales", expand_scales=SENT[6])
    else:
        bad("xActiveMask", x_active_mask=torch.ones(4, 2, dtype=torch.bool).npu())
        bad_combine("sharedExpertX", shared_expert_x=X.npu())
    if not A5:
        bad("quantMode", quant_mode=4)


def buffer():
    os.environ["HCCL_BUFFSIZE"] = "0"
    bad("HCCL_BUFFSIZE")
    bad_combine("HCCL_BUFFSIZE")
    os.environ["HCCL_BUFFSIZE"] = "200"
    large = Case("large", [256] * RANKS, k=3)
    os.environ["HCCL_BUFFSIZE"] = "2"
    bad("HCCL_BUFFSIZE", case=large)
    del os.environ["HCCL_BUFFSIZE"]


def combines():
    bad_combine("commQuantMode", comm_quant_mode=2)
    bad_combine("commQuantMode", comm_quant_mode=9)
    bad_combine("assistInfoForCombine", sent=[*SENT[:2], SENT[2][:-1], *SENT[3:]])
    bad_combine("epSendCounts", sent=[*SENT[:4], SENT[4][:-1], *SENT[5:]])
    bad_combine("expandX", y=Y[:1])
    bad_combine("H", y=Y[:, :16])


def outputs():
    """torch_npu allocates them as it should, so that these calls go past it."""
    names = ("expand_x", "dynamic_scales", "assist_info_for_combine", "expert_token_nums",
             "ep_recv_counts")  # fmt: skip
    good = dict(
        dict(zip(names, SENT, strict=False)), x=X.npu(), expert_ids=IDS.npu(), group_ep=GROUP,
        ep_world_size=RANKS, ep_rank_id=RANK, moe_expert_num=EXPERTS, group_tp="", tp_world_size=0,
        tp_rank_id=0, expert_shard_type=0, shared_expert_num=0, shared_expert_rank_num=0,
        quant_mode=0, global_bs=0, expert_token_nums_type=1, comm_alg="",
    )  # fmt: skip

    def bad(argument, code=561002, **wrong):
        call = lambda: aclnn.call("aclnnMoeDistributeDispatchV2", **(good | wrong))
        refused("dispatch", call, argument, code)

    bad("expandX", expand_x=SENT[0][:-1])
    bad("expandX", 161002, expand_x=SENT[0].float())
    bad("expandX", 161001, expand_x=None)
    bad("x", 161002, x=X.float().npu())
    bad("expertIds", 161002, expert_ids=IDS.long().npu())
    bad("x", x=X[0].npu())
    bad("assistInfoForCombine", assist_info_for_combine=SENT[2][:-1])
    bad("expertTokenNums", expert_token_nums=SENT[3][:-1])
    bad("epRecvCounts", ep_recv_counts=SENT[4][:-1])
    bad("dynamicScales", 161001, quant_mode=2, expand_x=SENT[0].char(), dynamic_scales=None)
    bad("expertTokenNumsType", expert_token_nums_type=2)
    bad("epRankId", ep_rank_id=1 - RANK)
    if not A2:
        bad("commAlg", comm_alg="fullmesh_v2")  # V2 has none there


def refusals():
    for part in (domains_and_sizes, attributes, tensors, buffer, combines, outputs):
        part()
    if not torch.equal(combine(GOOD, Y, SENT), RESULT):
        problems.append("combine differs after refusals")
