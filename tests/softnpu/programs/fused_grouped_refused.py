"""What grouped_matmul refuses, not quantised and int8 by int8 (see fused_check.py)."""

import torch
import torch_npu
from fused_check import A5, bf16, f32, refused, reseed
from fused_grouped import brain, call_a8w8, gmm, half, longs, npu, scales
from grouped_data import i8, nz, positive

reseed(__name__)
good = {"x": f32(4, 4), "w": f32(2, 4, 4), "b": f32(2, 4), "g": longs(1, 4)}


def plain_with(split=3, kind=0, group_type=0, act=0, **changes):
    v = {**good, **changes}
    return lambda: gmm(
        [v["x"].npu()],
        [v["w"].npu()],
        bias=[v["b"].npu()],
        group_list=v["g"].npu(),
        split_item=split,
        group_type=group_type,
        group_list_type=kind,
        act_type=act,
    )


def quantised_with(**changes):
    v = {
        "x": i8(8, 8),
        "w": i8(3, 8, 4),
        "b": None,
        "s": scales(3, 4),
        "p": positive(8),
        "act": 0,
        "o": half,
        **changes,
    }
    move = [t if t is None else t.npu() for t in (v["x"], v["w"], v["b"], v["s"], v["p"])]
    return lambda: call_a8w8(*move, v["act"], v["o"], "nd")


for argument, call in [
    ("x", plain_with(x=f32(4, 4).to(torch.int16))),
    ("weight", plain_with(w=f32(2, 4, 4).half())),
    ("weight", plain_with(w=f32(2, 5, 4))),
    ("bias", plain_with(b=f32(2, 4).half())),
    ("bias", plain_with(b=f32(3, 4))),
    ("group_list", plain_with(g=longs(1, 2, 4))),
    ("group_list", plain_with(g=longs(1, 4).int())),
    ("group_list", plain_with(g=longs(1, 4), kind=2)),
    ("group_list_type", plain_with(kind=3)),
    ("act_type", plain_with(act=5)),
    ("x", plain_with(x=f32(4, 4).t())),
    ("x", plain_with(x=f32(4, 4), w=f32(4, 4), group_type=2)),
    ("scale", quantised_with(s=scales(3, 3))),
    ("scale", quantised_with(s=None)),
    ("scale", quantised_with(s=scales(3, 4, half))),
    ("per_token_scale", quantised_with(p=positive(7))),
    ("per_token_scale", quantised_with(p=positive(8).half())),
    ("bias", quantised_with(b=f32(3, 4).half() if not A5 else f32(3, 4).bfloat16())),
    ("act_type", quantised_with(act=3)),
    ("act_type", quantised_with(act=1, s=None, p=None, o=torch.int32)),
    ("out", quantised_with(o=torch.float32)),
]:
    refused("grouped_matmul", call, argument)
for argument, call in [
    ("x", plain_with(x=bf16(4, 4).float(), w=nz(f32(2, 4, 4)))),
    ("weight", plain_with(x=bf16(4, 1), w=nz(bf16(2, 1, 4)))),
    ("weight", quantised_with(w=nz(i8(3, 16, 4)))),
]:
    refused("grouped_matmul NZ", call, argument)


def apart_with(dtype, **lists):
    weights = [torch.ones(4, 4, dtype=dtype)] * 2
    lists = {name: npu(tensors) for name, tensors in lists.items()}
    return lambda: gmm(npu([bf16(3, 4)] * 2), npu(weights), split_item=0, group_type=-1, **lists)


for argument, call in [
    ("bias", apart_with(brain, bias=[f32(4), torch.ones(4, dtype=torch.int64)])),
    ("antiquant_scale", apart_with(torch.int8, antiquant_scale=[bf16(4), f32(4)])),
    (
        "antiquant_offset",
        apart_with(torch.int8, antiquant_scale=[bf16(4)] * 2, antiquant_offset=[bf16(4)]),
    ),
    (
        "antiquant_offset",
        apart_with(torch.int8, antiquant_scale=[bf16(4)] * 2, antiquant_offset=[bf16(4), f32(4)]),
    ),
    (
        "'group_list'",
        plain_with(g=longs(2, 2**63 - 1), kind=1),
    ),  # a kernel fault: their sum overflows
    ("'group_list'", plain_with(g=longs(-1, 5), kind=1)),
]:
    refused("grouped_matmul", call, argument)
if A5:
    refused(
        "grouped_matmul", plain_with(g=torch.tensor([[0, 1], [1, 3]]), kind=2), "group_list_type"
    )
else:
    refused("grouped_matmul", plain_with(x=torch.empty(4, 65536), w=torch.empty(2, 65536, 4)), "x")
    refused("grouped_matmul", quantised_with(b=f32(3, 4)), "bias")
    for view in (bf16(2, 32, 64).npu()[:, ::2], bf16(2, 16, 128).npu()[..., ::2]):
        # npu_format_cast keeps the strides.
        call = plain_with(x=bf16(4, 16), w=view, b=f32(2, 64))
        refused(
            "grouped_matmul NZ",
            lambda call=call, view=view: gmm(
                [bf16(4, 16).npu()],
                [torch_npu.npu_format_cast(view, 29)],
                group_list=longs(1, 4).npu(),
                split_item=3,
                group_type=0,
            ),
            "part of a tensor in the NZ format",
        )
