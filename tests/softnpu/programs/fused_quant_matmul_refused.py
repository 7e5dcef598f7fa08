"""What npu_quant_matmul refuses,
and the empty tensors that it takes on Ascend 950 (see fused_check.py).
"""

import torch
import torch_npu
from fused_check import A5, bf16, f32, refused
from fused_quant_matmul import (
    BRAIN,
    I8,
    call,
    codes,
    exact,
    exponents,
    fp8,
    integers,
    loose,
    packed,
    positive,
    rows,
)


def refuse(argument, case, **changed):
    """The case with some of its arguments exchanged is refused."""
    names = (
        "x1",
        "x2",
        "scale",
        "offset",
        "pertoken",
        "bias",
        "out",
        "kinds",
        "mode",
        "transposed",
        "group",
    )
    given = {**dict(zip(names, case, strict=False)), **changed}
    given = {k: v.npu() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    refused("quant_matmul", lambda: call(**given), argument)


plain = (rows, integers(70, 5), positive(5), None, positive(3), None, BRAIN, I8, "vector", False)
refuse("'x1'", plain, x1=bf16(3, 70))
refuse("'x1'", plain, x1=integers(3, 140).npu()[:, ::2])
refuse("'x2'", plain, x2=integers(69, 5))
refuse("'x2'", exact[1], x2=integers(70, 70000))  # with a packed scale
refuse("'x2'", plain, x2=packed(70, 5))
refuse("x1_scale", plain, pertoken=positive(3).bfloat16())
refuse("x1_scale", plain, pertoken=positive(4))
refuse("x2_scale", plain, scale=positive(5).half())
refuse("x2_scale", plain, scale=positive(4))
refuse("x2_scale", plain, scale=positive(1, 5))
refuse("x2_offset", plain, offset=f32(5))
refuse("x2_offset", exact[1], offset=f32(4), scale=torch_npu.npu_trans_quant_param(f32(5).npu()))
refuse("bias", plain, bias=f32(5).half())
refuse("bias", plain, bias=f32(4))
refuse("bias", loose[5], bias=integers(1, 1, 5, dtype=torch.int32))
refuse("'out'", plain, out=torch.float64)
refuse("group_sizes", plain, group=[1, 1, 32])
parameter = torch_npu.npu_trans_quant_param(positive(5).npu())
results = [
    torch_npu.npu_quant_matmul(
        rows.npu(), integers(70, 5).npu() * 0 + 1, scale, output_dtype=torch.float16
    ).cpu()
    for scale in (parameter, parameter.cpu().view(torch.uint64).npu())
]
assert torch.equal(*results) and results[0].isfinite().all()
int4_tensor = next(case for case in loose if case[8] == "vector" and case[0].dtype == torch.uint8)
int4_group = next(case for case in loose if case[8] == "group")
int8_block = next(case for case in loose if case[8] == "block")
refuse("'x2'", int4_tensor, x2=codes(2, 8, 6), x1=codes(2, 6, 6))
refuse("group_sizes", int4_group, group=[0, 0, 128])
refuse("x2_offset", int4_group, offset=f32(4, 256))
refuse(
    "'x1'",
    int4_group,
    x1=codes(3, 256),
    x2=codes(256, 256),
    scale=positive(2, 256),
    offset=f32(2, 256).half(),
)
refuse("group_sizes", int8_block, group=[128, 128, 128])
refuse("x1_scale", int8_block, pertoken=positive(3, 3))
refuse("bias", int8_block, bias=None)
if A5:
    mx8, mx4 = (
        next(case for case in exact if case[7] == (kind, kind) and case[8] == "mx")
        for kind in ("e4m3", "e2m1")
    )
    mixed = loose[-2]
    refuse("'x2'", plain, x1=fp8("e4m3", 3, 70))
    refuse("group_sizes", mx8, group=[1, 1, 64])
    refuse("x1_scale", mx8, pertoken=exponents(3, 2, 2))
    refuse("x2_scale", mx4, scale=exponents(6, 3, 2))
    refuse("bias", mx8, bias=f32(5).bfloat16())
    refuse("bias", mixed, bias=f32(1, 6).half())
    refuse("'x1'", mixed, x1=fp8("e4m3", 3, 70), x2=codes(6, 35), bias=None)
    refuse("'out'", plain, x1=packed(3, 3), x2=packed(24, 1), scale=positive(8))
else:
    refuse("'x1'", plain, x1=fp8("e4m3", 3, 70), x2=fp8("e4m3", 70, 5))
    refuse("'x1'", plain, x1=rows[:0], pertoken=positive(3)[:0])
    refuse(
        "'x1'",
        int8_block,
        x1=integers(3, 256),
        x2=integers(256, 256),
        scale=positive(2, 2),
        pertoken=positive(3, 2),
    )
    refuse("'x2'", int8_block, x2=integers(128, 512), scale=positive(1, 4), bias=f32(128))
    refuse("x1_scale", plain, pertoken=positive(1))
if A5:
    empty = call(
        *(x.npu() for x in (rows[:0], integers(70, 5), positive(5))),
        None,
        positive(3)[:0].npu(),
        None,
        BRAIN,
        I8,
        "vector",
        False,
    )
    assert empty[0].shape == (0, 5)
