"""torch_npu's calls of MC2 for a case of distribute_formulas.py, on a communicator of their own."""

import numpy as np
import torch
import torch.distributed as dist
import torch_npu
from distribute_formulas import A2, EXPERTS, LOCAL, RANK, RANKS, factor, multiplied

dist.init_process_group("hccl")
torch.npu.set_device(RANK)
# The documents want a communicator for these two alone.
MC2 = dist.new_group(list(range(RANKS)))
GROUP = MC2._get_backend(torch.device("npu")).get_hccl_comm_name(RANK)


def npu(x):
    return None if x is None else x.npu()


def attributes(case):
    """Of both calls."""
    return dict(global_bs=case.global_bs(), shared_expert_num=0)


def dispatch(case, **more):
    x, ids, weights, mask, _, smooth = case.of(RANK)
    return torch_npu.npu_moe_distribute_dispatch_v2(
        x.npu(), ids.npu(), GROUP, RANKS, RANK, EXPERTS,
        **attributes(case) | dict(
            x_active_mask=npu(mask), quant_mode=case.quant,
            scales=npu(smooth) if case.smooth else None,
            expert_scales=npu(weights) if A2 else None,
            expert_token_nums_type=0 if case.prefix else 1,
            y_dtype=torch.float8_e4m3fn if case.quant == 4 else None,
        ) | more,
    )  # fmt: skip


def combine(case, y, sent, **more):
    _, ids, weights, mask, shared, _ = case.of(RANK)
    return torch_npu.npu_moe_distribute_combine_v2(
        y.npu(), ids.npu(), sent[2], sent[4], weights.npu(), GROUP, RANKS, RANK, EXPERTS,
        **attributes(case) | dict(
            x_active_mask=npu(mask), expand_scales=sent[6] if A2 else None,
            shared_expert_x=npu(shared) if case.shared else None,
        ) | more,
    )  # fmt: skip


def of_experts(case, sent):
    """What this rank's experts make of the rows that it was sent, [A, H]."""
    rows, scale, counts = sent[0].cpu(), sent[1].cpu(), sent[3].cpu().numpy()
    counts = np.diff(counts, prepend=0) if case.prefix else counts
    n = counts.sum()
    y = (rows.view(torch.uint8) if case.quant == 4 else rows.float())[:n].numpy()
    if case.quant == 4:
        scale = scale.view(torch.uint8)
    scale = scale[:n].numpy() if case.quant else None
    if case.quant == 2:
        scale = scale[:, None]
    factors = np.repeat([factor(RANK * LOCAL + e) for e in range(LOCAL)], counts)[:, None]
    result = torch.full(rows.shape, float("nan"), dtype=case.dtype)  # no row behind them is read
    result[:n] = torch.tensor(multiplied(y, scale, case.quant) * factors).to(case.dtype)
    return result


def device(case):
    """The results of the device, as `World.results` has them."""
    sent = dispatch(case)
    n = int(sent[4][EXPERTS - 1])
    x = combine(case, of_experts(case, sent), sent).cpu().float().numpy()
    mask = case.of(RANK)[3]
    written = slice(None) if mask is None else mask.reshape(len(x), -1).any(1).numpy()
    rows = sent[0][:n].cpu()
    rows = rows.view(torch.uint8) if case.quant == 4 else rows.float()
    result = [rows.numpy(), sent[3].cpu().numpy(), sent[4][:EXPERTS].cpu().numpy()]
    if case.quant:
        scale = sent[1][:n].cpu()
        scale = scale.view(torch.uint8) if case.quant == 4 else scale
        result.append(scale.numpy().reshape(n, -1))
    if A2:
        result.append(sent[6][:n].cpu().numpy())
    return [*result, x[written]]
