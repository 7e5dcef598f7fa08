"""MX along two axes, grouped products that are added, NZ caches, routing without scales of tokens,
joins and quotients that phase 1 refuses, and dropout of a fused softmax: what torch_npu's public
tests call, against torch and NumPy.
"""

import numpy as np
import torch
import torch_npu
from fused_check import A5, array, bf16, f32, problems, refused


def expect(what, found, wanted):
    if not np.array_equal(found, wanted):
        problems.append(f"{what}: found {found}, expected {wanted}")


def mx_columns(x):
    """E4M3 values and scale bytes of blocks of 32 along the first axis; scales by division."""
    rows, columns = x.shape
    padded = np.zeros((-(-rows // 64) * 64, columns), np.float32)
    padded[:rows] = x
    blocks = padded.reshape(-1, 32, columns)
    scale = (np.abs(blocks).max(1) / np.float32(448)).astype(np.float32)
    bits = scale.view(np.uint32)
    exponent, mantissa = (bits >> 23).astype(int), bits & 0x7FFFFF
    exponent += ((exponent > 0) & (exponent < 254) & (mantissa > 0)).astype(int)
    exponent += ((exponent == 0) & (mantissa > 0x400000)).astype(int)
    scaled = np.clip(blocks * np.exp2(127.0 - exponent)[:, None], -448, 448)
    values = torch.from_numpy(scaled.reshape(-1, columns)[:rows].astype(np.float32))
    pairs = exponent.astype(np.uint8).reshape(-1, 2, columns).transpose(0, 2, 1)
    return values.to(torch.float8_e4m3fn).float().numpy(), pairs


def mx_rows(x):
    values, pairs = mx_columns(np.ascontiguousarray(x.T))
    return values.T, pairs.transpose(1, 0, 2)


def check_dual_axis(name, outputs, values, ends=None):
    """Blocks along the rows begin anew with each group; scales of group g at end // 64 + g."""
    y1, scale1, y2, scale2 = (x.cpu() for x in outputs)
    want, pairs = mx_rows(values)
    expect(f"{name}: y1", y1.view(torch.float8_e4m3fn).float().numpy(), want)
    expect(f"{name}: scales of rows", scale1.view(torch.uint8).numpy(), pairs)
    begin, y2 = 0, y2.view(torch.float8_e4m3fn).float().numpy()
    for group, end in enumerate(ends or [len(values)]):
        want, pairs = mx_columns(values[begin:end])
        expect(f"{name}: y2 of group {group}", y2[begin:end], want)
        row = begin // 64 + group
        found = scale2.view(torch.uint8).numpy()[row : row + len(pairs)]
        expect(f"{name}: scales of group {group}", found, pairs)
        begin = end


def check_mx():
    x = bf16(150, 96)
    outputs = torch_npu.npu_dynamic_mx_quant_with_dual_axis(
        x.npu(), dst_type=torch.float8_e4m3fn, scale_alg=1
    )
    check_dual_axis("dual axis", outputs, array(x).astype(np.float32))
    for left in (True, False):
        for ends in (None, [70, 80, 150]):
            x, gradient = bf16(150, 128), bf16(150, 64)
            groups = None if ends is None else torch.tensor(ends).npu()
            leaf = x.float().requires_grad_()
            halves = leaf.chunk(2, -1)
            act, lin = halves if left else halves[::-1]
            y = act * torch.sigmoid(act) * lin
            y.backward(gradient.float())
            more = dict(group_index=groups, activate_left=left)
            outputs = torch_npu.npu_swiglu_mx_quant_with_dual_axis(x.npu(), **more)
            check_dual_axis(f"swiglu, left {left}", outputs, y.detach().numpy(), ends)
            outputs = torch_npu._npu_swiglu_backward_mx_quant_with_dual_axis(
                x.npu(), gradient.npu(), **more
            )
            check_dual_axis(f"gradient, left {left}", outputs, leaf.grad.numpy(), ends)
    refused(
        "swiglu",
        lambda: torch_npu.npu_swiglu_mx_quant_with_dual_axis(x.npu(), scale_alg=0),
        "scaleAlg",
        161002,
    )


def check_grouped_add():
    """Ends and counts; y is [groups x M, N]."""
    x, weight, y = bf16(20, 6), bf16(20, 5), f32(18, 5)
    parts = [(0, 7), (7, 7), (7, 20)]
    want = y + torch.cat([x[a:b].float().T @ weight[a:b].float() for a, b in parts])
    for kind, list_ in ((0, [7, 7, 20]), (1, [7, 0, 13])):
        got = torch_npu.npu_grouped_matmul_add(
            y.npu(),
            x.npu(),
            weight.npu(),
            torch.tensor(list_).npu(),
            transpose_x=True,
            transpose_weight=False,
            group_type=2,
            group_list_type=kind,
        )
        torch.testing.assert_close(got.cpu(), want)


def check_cat():
    """Phase 1 refuses sizes that differ off the axis, other ranks, and results that cannot hold."""
    good = torch.ones(2, 3).npu()
    for other in (torch.ones(2, 4), torch.ones(2, 3, 1)):
        refused("cat", lambda other=other: torch.cat([good, other.npu()]), "tensors", 161002)
    empty = torch.empty(0).npu()
    expect("cat with nothing", torch.cat([empty, good]).cpu().numpy(), np.ones((2, 3)))


def check_dropout_softmax():
    """What stays is the softmax over the chance to stay; about that share stays."""
    x, y = f32(4, 3, 32, 32), f32(4, 3, 32, 32)
    want = torch.softmax(x + 0.5 * y, -1)
    for drop in (0.0, 0.25):
        _, soft, out = torch_npu.npu_dropout_with_add_softmax(y.npu(), x.npu(), 0.5, drop, -1)
        torch.testing.assert_close(soft.cpu(), want)
        kept = out.cpu() != 0
        torch.testing.assert_close(out.cpu(), want * kept / (1 - drop))
        if abs(kept.float().mean().item() - (1 - drop)) > 0.02:
            problems.append(f"dropout {drop}: {kept.float().mean()} stays")


def check_quotient():
    """Phase 1 refuses a quotient of integers in place."""
    for divisor in (torch.full((3,), 2).int().npu(), 2.0):
        whole = torch.ones(3).int().npu()
        refused("div_", lambda a=whole, b=divisor: a.div_(b), "selfRef", 161002)
    half = torch.ones(3).half().npu()
    expect("div_", half.div_(torch.full((3,), 2.0).npu()).cpu().numpy(), np.full(3, 0.5))


def check_tiled_caches():
    """NZ caches take the tokens of PA_NZ: [blocks, heads * D / 16, block, 16]."""
    key, value, slots = f32(5, 2, 32).half(), f32(5, 2, 32).half(), [3, 40, -1, 17, 63]
    caches = [f32(4, 4, 16, 16).half() for _ in range(2)]
    tiled = [torch_npu.npu_format_cast(c.npu(), 29) for c in caches]
    mapping = torch.tensor(slots).int().npu()
    torch_npu.npu_scatter_pa_kv_cache(key.npu(), value.npu(), *tiled, mapping)
    for x, cache, got in zip((key, value), caches, tiled, strict=True):
        for token, slot in enumerate(slots):
            if slot >= 0:
                cache[slot // 16, :, slot % 16] = x[token].reshape(4, 16)
        expect("NZ cache", torch_npu.npu_format_cast(got, 2).cpu().numpy(), cache.numpy())


def check_routing():
    """Without scales of tokens a row is x @ w by the columns' scales and its logit."""
    x, weight = (torch.randint(-5, 5, s, dtype=torch.int8) for s in ((12, 64), (2, 64, 256)))
    scale, logit, rows = f32(2, 256), f32(12), torch.arange(12) % 4
    got = torch_npu.npu_grouped_matmul_finalize_routing(
        x.npu(),
        torch_npu.npu_format_cast(weight.npu(), 29),
        torch.tensor([7, 5]).npu(),
        scale=scale.npu(),
        logit=logit.npu(),
        row_index=rows.npu(),
        output_bs=4,
    )
    group = (torch.arange(12) >= 7).long()
    y = torch.einsum("mk,mkn->mn", x.float(), weight.float()[group]) * scale[group]
    want = torch.zeros(4, 256).index_add_(0, rows, y * logit[:, None])
    torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-3)


def check_graph_operators():
    """The register of overflows stays 0, and an empty tensor is one: AsStrided, by ravel."""
    x = torch.ones(8).npu()
    torch_npu.npu_clear_float_status(x)
    expect("overflows", torch_npu.npu_get_float_status(x).cpu().numpy(), np.zeros(8))
    empty = torch.randn(2, 0, 3).npu().transpose(0, 2)
    expect("ravel", list(empty.ravel().cpu().shape), [0])


def check_ragged_statistics():
    """softmax_layout TND, which torch_npu sends as same_as_input: rows of tokens, not of heads."""
    q, k, v = (f32(6, 2, 16).half().npu() for _ in range(3))
    rows, blocks = (
        torch_npu.npu_fusion_attention(
            *(q, k, v, 2, "TND"),
            actual_seq_qlen=[6],
            actual_seq_kvlen=[6],
            softmax_layout=layout,
        )
        for layout in ("TND", "")
    )
    for a, b in zip(rows[1:3], blocks[1:3], strict=True):
        expect("statistics", a.cpu().transpose(0, 1).numpy(), b.cpu().view(2, 6, 8).numpy())


check_cat()
check_quotient()
if A5:
    check_mx()
    check_grouped_add()
else:
    torch.npu.config.allow_internal_format = True
    check_dropout_softmax()
    check_tiled_caches()
    check_routing()
    check_ragged_statistics()
    check_graph_operators()
