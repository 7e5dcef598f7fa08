"""The codes of refusals,
as the tables of return codes in CANN's documents have them (see fused_check.py).
"""

import torch
import torch_npu
from fused_check import A5, CANN, bf16, f32, refused

INTERFACE, TILING, SHAPES, PLATFORM = 161002, 561002, 561103, 361001


def ids(*shape):
    return torch.zeros(shape, dtype=torch.int32).npu()


def gating(k):
    return lambda: torch_npu.npu_moe_gating_top_k(f32(2, 16).npu(), k)


def norm(gamma):
    return lambda: torch_npu.npu_rms_norm(f32(2, 8).npu(), gamma.npu())


def rotary(x, cos):
    return lambda: torch_npu.npu_rotary_mul(x.npu(), cos.npu(), cos.npu())


def permute(tokens, padded=False):
    return lambda: torch_npu.npu_moe_token_permute(tokens.npu(), ids(2, 1), padded_mode=padded)


def finalize(skip):
    return lambda: torch_npu.npu_moe_finalize_routing(
        f32(2, 8).npu(), skip.npu(), None, None, None, ids(2), None
    )


def routing(x, experts, active):
    return lambda: torch_npu.npu_moe_init_routing_v2(
        x.npu(), ids(2, 1), active_num=active, expert_num=experts, active_expert_range=[0, 1],
        quant_mode=-1, expert_tokens_num_type=1, expert_tokens_num_flag=True,
    )  # fmt: skip


def post(x):
    return lambda: torch_npu.npu_mhc_post(
        x.npu(), f32(2, 5, 5).npu(), bf16(2, 128).npu(), f32(2, 5).npu()
    )


for name, call, argument, code in [
    ("moe_gating_top_k", gating(17), "'k'", TILING),
    ("rms_norm", norm(bf16(8)), "'gamma'", INTERFACE),
    ("rms_norm", norm(f32(7)), "'gamma'", TILING),
    ("rotary_mul", rotary(f32(2, 2, 64).int(), f32(2, 1, 64)), "'x'", INTERFACE),
    ("rotary_mul", rotary(f32(2, 2, 64), f32(3, 1, 64)), "'cos'", TILING),
    ("moe_token_permute", permute(f32(2, 4).int()), "'tokens'", INTERFACE),
    ("moe_token_permute", permute(f32(3, 4)), "'indices'", TILING),
    ("moe_token_permute", permute(f32(2, 4), padded=True), "'padded_mode'", TILING),
    ("moe_finalize_routing", finalize(bf16(2, 8)), "'skip1'", INTERFACE),
    ("moe_finalize_routing", finalize(f32(3, 8)), "'skip1'", SHAPES),
    ("moe_init_routing_v2", routing(f32(2, 4).double(), 2, 2), "'x'", INTERFACE),
    ("moe_init_routing_v2", routing(f32(2, 4), 10241, 2), "'expert_num'", TILING),
]:
    refused(name, call, argument, code)
if not A5:
    refused(
        "dynamic_mx_quant",
        lambda: torch_npu.npu_dynamic_mx_quant(bf16(2, 64).npu()),
        "does not exist",
        PLATFORM,
    )
if CANN >= (9, 1) or (A5 and CANN >= (9, 0)):
    refused("mhc_post", post(bf16(2, 5, 128)), "'x'", SHAPES)
