"""Quantisation by blocks, and sums of sparse coordinates, against NumPy from their documents."""

import numpy as np
import torch
import torch_npu
from fused_check import A5, bf16, f32, problems, refused


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


torch.npu.set_device(0)
check_int8()
check_coalesced()
if A5:
    check_groups()
    check_squares()
    check_mx_groups()
