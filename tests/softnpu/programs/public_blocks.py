"""Quantisation by blocks, sums of sparse coordinates, and layers that torch_npu sends over the
graph-operator path, against NumPy or torch from their documents.
"""

import numpy as np
import torch
import torch.nn.functional as F
import torch_npu
from fused_check import A5, bf16, f32, problems, refused, rng


def expect(what, found, wanted):
    if not np.array_equal(found, wanted):
        problems.append(f"{what}: found {found}, expected {wanted}")


def block_scales(x, rows, columns, top):
    """The largest magnitude of each block over `top`, and that of each value."""
    m, n = x.shape
    padded = np.zeros((-(-m // rows) * rows, -(-n // columns) * columns), np.float32)
    padded[:m, :n] = np.abs(x)
    peaks = padded.reshape(-1, rows, padded.shape[1] // columns, columns).max((1, 3))
    scales = (peaks / np.float32(top)).astype(np.float32)
    return scales, scales.repeat(rows, 0).repeat(columns, 1)[:m, :n]


def check_int8():
    x = f32(5, 300).half()
    x[2, 128:256] = 0
    y, scale = torch_npu.npu_dynamic_block_quant(x.npu(), dst_type=1)
    scales, each = block_scales(x.float().numpy(), 1, 128, 127)
    expect("dynamic_block_quant: scales", scale.cpu().numpy(), scales)
    by = np.where(each == 0, 1, each)
    want = np.round(x.float().numpy() / by).astype(np.int8)
    expect("dynamic_block_quant: values", y.cpu().numpy(), want)


def e4m3(values):
    held = torch.tensor(np.clip(values, -448, 448).astype(np.float32))
    return held.to(torch.float8_e4m3fn).float().numpy()


def check_groups():
    x = bf16(300, 200).float().numpy()
    ends = [140, 140, 300]
    y, scale = torch_npu.npu_grouped_dynamic_block_quant(
        torch.tensor(x).bfloat16().npu(), torch.tensor(ends, dtype=torch.int32).npu(),
        dst_type=292, row_block_size=128, col_block_size=128,
    )  # fmt: skip
    y, scale, begin = y.cpu().float().numpy(), scale.cpu().numpy(), 0
    for group, end in enumerate(ends):
        if end > begin:
            scales, each = block_scales(x[begin:end], 128, 128, 448)
            row = begin // 128 + group
            expect(f"blocks of group {group}: scales", scale[row : row + len(scales)], scales)
            expect(f"blocks of group {group}: values", y[begin:end], e4m3(x[begin:end] / each))
        begin = end
    refused(
        "grouped_dynamic_block_quant",
        lambda: torch_npu.npu_grouped_dynamic_block_quant(
            torch.tensor(x).bfloat16().npu(), torch.tensor(ends, dtype=torch.int32).npu(),
            dst_type=292, row_block_size=64, col_block_size=128,
        ),
        "rowBlockSize",
    )  # fmt: skip


def check_squares():
    """Each square of 32 has one exponent, which stands in the scales of its rows and columns."""
    x = bf16(70, 96).float().numpy()
    y, rows, columns = torch_npu.npu_dynamic_block_mx_quant(
        torch.tensor(x).bfloat16().npu(), dst_type=torch.float8_e4m3fn
    )
    peaks, _ = block_scales(x, 32, 32, 1)
    exponents = np.floor(np.log2(peaks)) - 8
    each = np.exp2(exponents).repeat(32, 0).repeat(32, 1)[:70]
    found = y.cpu().view(torch.float8_e4m3fn).float().numpy()
    expect("dynamic_block_mx_quant: values", found, e4m3(x / each))
    codes = np.zeros((4, 4), np.uint8)
    codes[:3, :3] = exponents + 127
    want = codes[:3].repeat(32, 0)[:70].reshape(70, 2, 2)
    expect("scales of rows", rows.cpu().view(torch.uint8).numpy(), want)
    want = codes[:, :3].repeat(32, 1).reshape(2, 2, 96).transpose(0, 2, 1)
    expect("scales of columns", columns.cpu().view(torch.uint8).numpy(), want)


def check_mx_groups():
    """Blocks of 32 rows begin anew with each group; scales of group g at begin // 64 + g."""
    x = bf16(100, 3).float().numpy()
    ends = [40, 100]
    y, scale = torch_npu.npu_grouped_dynamic_mx_quant(
        torch.tensor(x).bfloat16().npu(), torch.tensor(ends, dtype=torch.int32).npu(),
        round_mode="rint", dst_type=torch.float8_e4m3fn, blocksize=32,
    )  # fmt: skip
    found = y.cpu().view(torch.float8_e4m3fn).float().numpy()
    scale, begin = scale.cpu().view(torch.uint8).numpy(), 0
    for group, end in enumerate(ends):
        peaks, _ = block_scales(x[begin:end], 32, 1, 1)
        exponents = np.floor(np.log2(peaks)) - 8
        each = np.exp2(exponents).repeat(32, 0)[: end - begin]
        expect(f"MX of group {group}", found[begin:end], e4m3(x[begin:end] / each))
        codes = np.zeros((2, 3), np.uint8)
        codes[: len(exponents)] = exponents + 127
        expect(f"scales of group {group}", scale[begin // 64 + group], codes.T)
        begin = end


def check_coalesced():
    indices = torch.tensor([[1, 0, 1, 2, 1], [3, 0, 3, 1, 2]])
    values = f32(5, 2)
    dense = torch.zeros(3, 4, 2)
    for i, j, value in zip(*indices, values, strict=True):
        dense[i, j] += value
    sparse = torch.sparse_coo_tensor(indices.npu(), values.npu(), (3, 4, 2)).coalesce()
    expect("coalesce: places", sparse.indices().cpu().numpy(), [[0, 1, 1, 2], [0, 2, 3, 1]])
    want = dense[[0, 1, 1, 2], [0, 2, 3, 1]].numpy()
    np.testing.assert_allclose(sparse.values().cpu().numpy(), want, rtol=1e-6)


def check_layers():
    """BERT's Adam does not correct its moments; LayerNormV3 gives the inverse deviation."""
    start, m, v, gradient = f32(40), f32(40), f32(40).abs(), f32(40)
    found = [x.clone().npu() for x in (start, m, v)]
    torch_npu.npu_bert_apply_adam(0.1, 0.9, 0.99, 1e-6, gradient.npu(), -1, 0, 0.01, out=found)
    m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient**2
    wanted = (start - 0.1 * (m / (v.sqrt() + 1e-6) + 0.01 * start), m, v)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.cpu(), want)
    x, weight, bias = f32(3, 4, 6), f32(6), f32(6)
    codes = torch.tensor(rng.integers(0, 256, 12), dtype=torch.uint8)
    bits = torch.tensor(np.unpackbits(codes.numpy(), bitorder="little")).float() * 2 - 1
    got = torch_npu.npu_sign_bits_unpack(codes.npu(), 4, torch.float32)
    expect("sign bits", got.cpu().numpy(), bits.view(4, -1).numpy())
    got = torch_npu.npu_layer_norm_eval(x.npu(), [6], weight.npu(), bias.npu(), 1e-5)
    torch.testing.assert_close(got.cpu(), F.layer_norm(x, [6], weight, bias, 1e-5))


def check_swiglu():
    """SwiGLU of groups: its gradient; de-quantised rows quantised to FLOAT8."""
    x, gradient, weight = f32(6, 10), f32(6, 5), f32(6, 1)
    leaf = x.clone().requires_grad_()
    gate, up = leaf.chunk(2, -1)
    y = F.silu(gate.clamp(max=0.5)) * up.clamp(-0.5, 0.5)
    scaled = weight.clone().requires_grad_()
    (y * scaled)[:4].backward(gradient[:4])
    got = torch_npu.npu_swiglu_group_quant_backward(
        gradient.npu(), x.npu(), weight=weight.npu(), y_origin=y.detach().npu(),
        group_index=torch.tensor([1, 3]).npu(), clamp_limit=0.5,
    )  # fmt: skip
    torch.testing.assert_close(got[0].cpu(), leaf.grad)
    torch.testing.assert_close(got[1].cpu(), scaled.grad)
    x = torch.tensor(rng.integers(-50, 50, (5, 12)), dtype=torch.int32)
    by = f32(12).abs()
    got, scale = torch_npu.npu_dequant_swiglu_quant(
        x.npu(), weight_scale=by.npu(), activate_left=True, quant_mode=1, dst_type=292
    )
    gate, up = (x * by).chunk(2, -1)
    h = F.silu(gate) * up
    want = h.abs().amax(-1) / 448
    torch.testing.assert_close(scale.cpu(), want)
    rounded = (h / want[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    close = torch.isclose(got.cpu().float(), rounded, rtol=0.13)  # a step, where fp32 differs
    expect("dequant_swiglu_quant: values", (~close).sum().item(), 0)


torch.npu.set_device(0)
check_int8()
check_coalesced()
if A5:
    check_groups()
    check_squares()
    check_mx_groups()
    check_swiglu()
else:
    check_layers()
