"""The attention operators of CANN 9.1's V4 family against their documents: each module checks its
own on import. `v4_attention.py [absent]`: that a CANN before 9.1 has none of them.
"""

import sys
from importlib import import_module

import torch
from aclnn import call
from fused_check import bf16, f32, problems, refused, reseed

MODULES = ("v4_rotary", "v4_mla", "v4_mla_quant", "v4_compressor", "v4_indexer", "v4_quant_cache",
           "v4_scatter")  # fmt: skip


def absent():
    x, angles = bf16(1, 1, 1, 64).npu(), f32(1, 1, 1, 64).npu()
    refused(
        "before CANN 9.1",
        lambda: call(
            "aclnnInplacePartialRotaryMul", x=x, cos=angles, sin=angles, mode=1,
            partial_slice=[0, 64],
        ),
        "does not exist before CANN 9.1.0",
        161002,
    )  # fmt: skip
    numbers = dict(
        num_heads_q=64, num_heads_k=1, head_dim=128, topk=512, batch_size=1, max_seqlen_q=1,
        max_seqlen_k=1, layout_q="TND", layout_k="PA_BBND", mask_mode=3, cmp_ratio=1,
    )  # fmt: skip
    out = torch.empty(1024, dtype=torch.int32).npu()
    refused(
        "before CANN 9.1",
        lambda: call("aclnnLightningIndexerV2Metadata", metadata=out, **numbers),
        "does not exist before CANN 9.1.0",
        161002,
    )


if sys.argv[1:] == ["absent"]:
    absent()
else:
    for module in MODULES:
        reseed(module)
        import_module(module)
for problem in problems:
    print("PROBLEM", problem)
print(f"attention of V4: {len(problems)} problems")
sys.exit(bool(problems))
