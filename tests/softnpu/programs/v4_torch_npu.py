"""The operators of the family that torch_npu has names for: its calls give what ours give, so both
mean one C signature (see dense_check.py).
"""

import torch
import torch_npu
import v4_norm_quant as norms
import v4_products as products
import v4_swiglu as swiglu
from dense_check import FAMILY, e8m0, from_fp8, launch, on_npu
from fused_check import A5, bf16, problems

E4M3 = torch.float8_e4m3fn


def plain(x):
    if x.dtype == torch.float8_e8m0fnu:
        return e8m0(x)
    return from_fp8(x) if x.dtype == E4M3 else x.cpu()


def agree(name, symbol, given, outputs, theirs):
    """`given`: our arguments; `outputs`: which of them torch_npu's results are, in its order."""
    launch(symbol, **given)
    for output, found in zip(outputs, theirs, strict=True):
        if not torch.equal(plain(given[output]), plain(found.view(given[output].dtype))):
            problems.append(f"{name}: another {output}")
    print(f"{name}: {symbol} means the same")


def check_everywhere():
    x1, x2 = bf16(3, 4, 64), bf16(4, 24, 64)
    given = products.turned_arguments(x1, x2, [1, 0, 2], [0, 2, 1], 0, 1)
    y = torch_npu.npu_transpose_batchmatmul(
        x1.npu(), x2.npu(), perm_x1=[1, 0, 2], perm_x2=[0, 2, 1], perm_y=[1, 0, 2]
    )
    agree("npu_transpose_batchmatmul", "aclnnTransposeBatchMatMul", given, ["out"], [y])


def check_a2():  # A5 has its first version called, which is not emulated
    settings = swiglu.DEFAULTS
    case = swiglu.dequant_case(9, 128, [4, 5], 1, settings=settings)
    x, scale, row_scale, _, _, counts, *_ = on_npu(list(case))
    results = torch_npu.npu_dequant_swiglu_quant(
        x, weight_scale=scale, activation_scale=row_scale, group_index=counts, activate_left=True,
        quant_mode=1, swiglu_mode=1, clamp_limit=settings[0], glu_alpha=settings[1],
        glu_bias=settings[2],
    )  # fmt: skip
    agree("npu_dequant_swiglu_quant", swiglu.DEQUANT, swiglu.dequant_arguments(*case),
          ["y", "scale"], results)  # fmt: skip
    x, h = bf16(5, 128), norms.hadamard(128)
    results = torch_npu.npu_rotate_quant(x.npu(), h.npu(), dst_dtype=torch.int8)
    agree("npu_rotate_quant", "aclnnRotateQuant", norms.rotate_arguments(x, h), ["y", "scale"],
          results)  # fmt: skip


def check_a5():
    x, gamma = bf16(3, 128), bf16(128)
    results = torch_npu.npu_rms_norm_dynamic_mx_quant(
        x.npu(), gamma.npu(), epsilon=norms.EPS, scale_alg=1, dst_type=E4M3
    )
    given = norms.mx_arguments(x, gamma, None, 1)
    agree("npu_rms_norm_dynamic_mx_quant", "aclnnRmsNormDynamicMxQuant", given,
          ["y", "mxscale"], results[:2])  # fmt: skip
    x, h = bf16(3, 128), norms.hadamard(64)
    results = torch_npu.npu_rotate_quant(x.npu(), h.npu(), dst_dtype=E4M3, scale_alg=1)
    agree("npu_rotate_quant", "aclnnRotateQuant", norms.rotate_mx_arguments(x, h, None, 1),
          ["y", "scale"], results)  # fmt: skip
    case = products.mx_case(3, 4, 128, 24, True, 32)
    given = products.quant_arguments(*case)
    x1, x2, s1, s2 = on_npu([case[0], case[1], given["x1_scale"], given["x2_scale"]])
    y = torch_npu.npu_transpose_quant_batchmatmul(
        x1, x2, torch.bfloat16, x1_scale=s1, x2_scale=s2, group_sizes=[0, 0, 32], perm_x1=[1, 0, 2],
        perm_x2=[0, 2, 1], perm_y=[1, 0, 2],
    )  # fmt: skip
    agree("npu_transpose_quant_batchmatmul", "aclnnTransposeQuantBatchMatMul", given, ["out"], [y])


if FAMILY:
    check_everywhere()
    check_a5() if A5 else check_a2()
