"""aclnnSparseFlashMla and its metadata (docs/spec/ascend-operators.md 4.11 D; see fused_check.py).
The formula takes a dense softmax of each query; nothing is online or blocked.
"""

import ml_dtypes
import numpy as np
import torch
from aclnn import call
from fused_check import A5, Steps, array, bf16, check, f32, problems, refused, rng, same
from v4_paged import cumulative, int32, on_npu, pool_of, with_gaps

ATTENTION, METADATA = "aclnnSparseFlashMla", "aclnnSparseFlashMlaMetadata"
SCALE = 0.04419417
ATTRIBUTES = dict(ori_mask_mode=4, cmp_mask_mode=3, ori_win_left=127, ori_win_right=0)
LENGTHS = ["cu_seqlens_q", "cu_seqlens_ori_kv", "cu_seqlens_cmp_kv"]
LENGTHS += ["seqused_ori_kv", "seqused_cmp_kv", "cmp_residual_kv"]

STEPS = Steps(
    left=127,
    position=lambda length, queries, i: length - queries + i,
    visible=lambda position, ratio, held: min((position + 1) // ratio, held),
    page=lambda table, b, column: table[b, column],
    listed=lambda row: row[: list(row).index(-1)] if -1 in row else row,
    seen=lambda entries, visible: entries[entries < visible],
    sink=same,
    scale=same,
    entries=same,
    weights=lambda logits, top: np.exp(logits - top),
    value=same,
)


def rows_of(pool, table, b, positions, steps):
    size = pool.shape[1]
    return [pool[steps.page(table, b, p // size), p % size, 0] for p in positions]


def attended(case, steps):
    """Output and log of the sum; `case` as `case_of` makes it, with the keys as numbers."""
    numbers = {k: array(v) if isinstance(v, torch.Tensor) else v for k, v in case.items()}
    q, ori, cmp, sinks = (numbers.get(k) for k in ("q", "ori_kv", "cmp_kv", "sinks"))
    ratio, starts = numbers["cmp_ratio"], numbers["cu_seqlens_q"]
    out, lse = np.zeros(q.shape), np.zeros(q.shape[:-1])
    for b, length in enumerate(numbers["seqused_ori_kv"]):
        queries = starts[b + 1] - starts[b]
        for i in range(queries):
            row, position = starts[b] + i, steps.position(length, queries, i)
            window = range(max(position - steps.left, 0), min(position + 1, length))
            keys = rows_of(ori, numbers["ori_block_table"], b, window, steps)
            if cmp is not None:
                visible = steps.visible(position, ratio, numbers["seqused_cmp_kv"][b])
                listed = np.arange(visible)
                if "cmp_sparse_indices" in numbers:
                    listed = steps.listed(numbers["cmp_sparse_indices"][row, 0])
                listed = steps.entries(steps.seen(listed, visible))
                keys += rows_of(cmp, numbers["cmp_block_table"], b, listed, steps)
            keys = np.stack(keys)
            logits = q[row] @ keys.T * steps.scale(SCALE)
            sink = steps.sink(sinks)
            top = np.maximum(logits.max(-1), sink)
            p = steps.weights(logits, top[:, None])
            total = np.exp(logits - top[:, None]).sum(-1) + np.exp(sink - top)
            out[row] = p @ steps.value(keys) / total[:, None]
            lse[row] = top + np.log(total)
    return [out, lse[None]]


def case_of(heads, lengths, queries, *, ratio=1, topk=0, size=16, dtype=torch.bfloat16, rows=None):
    """A TND call on pages; the window's freed pages do not exist. `rows(n)`: keys, as f32 unless
    given.
    """
    rows = rows or (lambda n: f32(n, 1, 512).to(dtype))
    first = [max(n - k - 127, 0) for n, k in zip(lengths, queries, strict=True)]
    ori, table = pool_of([rows(n) for n in lengths], size, unread=first)
    case = dict(
        q=(f32(sum(queries), heads, 512) * 2).to(dtype), ori_kv=ori, ori_block_table=table,
        cu_seqlens_q=cumulative(queries), seqused_ori_kv=int32(lengths), sinks=f32(heads) * 3,
        cmp_ratio=ratio,
    )  # fmt: skip
    if ratio == 1:
        return case
    held = [n // ratio for n in lengths]
    case["cmp_kv"], case["cmp_block_table"] = pool_of([rows(n) for n in held], size)
    case |= dict(seqused_cmp_kv=int32(held), cmp_residual_kv=int32([n % ratio for n in lengths]))
    if topk:
        case["cmp_sparse_indices"] = indices(lengths, queries, ratio, topk)
    return case


def indices(lengths, queries, ratio, topk):
    """Random entries, some not visible yet (they are skipped), then -1."""
    result = np.full((sum(queries), 1, topk), -1, np.int32)
    row = 0
    for length, count in zip(lengths, queries, strict=True):
        for _ in range(count):
            some = rng.permutation(length // ratio)[: topk - 3]
            result[row, 0, : len(some)] = some
            row += 1
    return int32(result)


def metadata_of(case, symbol=METADATA, **changed):
    topk = case["cmp_sparse_indices"].shape[-1] if "cmp_sparse_indices" in case else 0
    named = {name: case[name] for name in LENGTHS if name in case} | ATTRIBUTES
    named |= dict(
        num_heads_q=case["q"].shape[-2], num_heads_kv=1, head_dim=512,
        batch_size=len(case["cu_seqlens_q"]) - 1, max_seqlen_q=4096, max_seqlen_ori_kv=1 << 20,
        max_seqlen_cmp_kv=1 << 20, ori_topk=0, cmp_topk=topk, cmp_ratio=case["cmp_ratio"],
        layout_q="TND", layout_kv="PA_BBND", has_ori_kv=True, has_cmp_kv="cmp_kv" in case,
    ) | changed  # fmt: skip
    result = torch.empty(1024, dtype=torch.int32).npu()
    call(symbol, **on_npu(named), metadata=result)
    return result


def attend(case, symbol=ATTENTION, **changed):
    """(output, lse) with these arguments changed; metadata of the case as it is, unless given."""
    if "metadata" not in changed:
        more = {k: case[k] for k in ("quant_mode", "rope_head_dim") if k in case}
        changed["metadata"] = metadata_of(case, symbol + "Metadata", **more)
    named = ATTRIBUTES | case | dict(softmax_scale=SCALE, topk_value_mode=1)
    named |= dict(layout_q="TND", layout_kv="PA_BBND", return_softmax_lse=True) | changed
    q = named["q"]
    out = torch.empty(q.shape, dtype=q.dtype).npu()
    lse = torch.empty((1, *q.shape[:-1])).npu()
    call(symbol, **dict(attention_out=out, softmax_lse=lse) | on_npu(named))
    return out, lse


CASES = [
    case_of(4, [200, 5, 131], [3, 1, 2]),
    case_of(8, [7], [7], dtype=torch.float16, size=32),
    case_of(2, [700, 257], [2, 3], ratio=128),
    case_of(64, [130, 44], [1, 2], ratio=4, topk=512),
    case_of(2, [4300], [1], ratio=4, topk=1024, size=128),
]
FAULTS = {
    "a window of 127": dict(left=126),
    "a window of 129": dict(left=128),
    "queries from the start": dict(position=lambda length, queries, i: i),
    "the entry that closes is hidden": dict(
        visible=lambda position, ratio, held: min(position // ratio, held)
    ),
    "all entries visible": dict(visible=lambda position, ratio, held: held),
    "entries skipped for ever": dict(entries=lambda e: e[:0]),
    "last entry lost": dict(entries=lambda e: e[:-1]),
    "pages of the first sequence": dict(page=lambda table, b, column: table[0, column]),
    "no sink": dict(sink=lambda sinks: sinks - 1e9),
    "no scale": dict(scale=lambda scale: 1.0),
    "sink with its value": dict(sink=lambda sinks: sinks + 1),
    "keys reversed as values": dict(value=lambda keys: keys[::-1]),
}


def in_table(case, steps):
    """A faulty formula may look for a page that does not exist: then it is wrong, rightly."""
    try:
        return attended(case, steps)
    except IndexError:
        return [np.full(case["q"].shape, np.inf), np.full((1, *case["q"].shape[:-1]), np.inf)]


check(
    "sparse_flash_mla", attend, lambda case, steps: in_table(case[0], steps), STEPS,
    [(case,) for case in CASES], FAULTS, 1e-2,
)  # fmt: skip


def rounded(x, kind=ml_dtypes.bfloat16):
    return np.asarray(x, np.float32).astype(kind).astype(np.float64)


def differing(case, got, steps):
    """Share of outputs that are not the formula's, both in bf16."""
    want = rounded(in_table(case, steps)[0])
    return (array(got) != want).mean()


def expect_rounding(name, case, got, emulated, others):
    """Nearly all values agree to the bit with the emulated rounding, and not with another."""
    share = differing(case, got, STEPS.but(**emulated))
    if share > 0.02:
        problems.append(f"{name}: {share:.1%} of the values differ from the rounded formula")
    for other, replaced in others.items():
        if differing(case, got, STEPS.but(**replaced)) < 0.05:
            problems.append(f"{name}: cannot be told from {other}")


P_IN_BF16 = dict(weights=lambda logits, top: rounded(np.exp(logits - top)))
few = case_of(16, [2, 3], [1, 1])
expect_rounding("sparse_flash_mla", few, attend(few)[0], P_IN_BF16, {"P in fp32": {}})

base, hca, csa = CASES[0], CASES[2], CASES[3]


def bad(argument, case, symbol=ATTENTION, **changed):
    refused(symbol, lambda: attend(case, symbol, **changed), argument)


def bad_metadata(argument, case, symbol=METADATA, **changed):
    refused(symbol, lambda: metadata_of(case, symbol, **changed), f"'{argument}'")


def without(case, **changed):
    """The case with arguments changed, or left out where None is given."""
    return {name: value for name, value in (case | changed).items() if value is not None}


def refusable(csa):
    """(argument, what it is replaced by) that both attentions refuse."""
    rows, heads = csa["q"].shape[:2]
    return (
        ("q", dict(q=f32(rows, heads, 512))),
        ("q", dict(q=bf16(rows, heads, 448))),
        ("q", dict(q=bf16(1, rows, heads, 512))),
        ("q", dict(q=bf16(heads, rows, 512).transpose(0, 1))),
        ("ori_kv", dict(ori_kv=None)),
        ("ori_kv", dict(ori_kv=csa["ori_kv"][:, :, 0])),
        ("ori_kv", dict(ori_kv=csa["ori_kv"][..., :320].contiguous())),
        ("ori_kv", dict(ori_kv=f32(4, 16, 1, 512))),
        ("ori_kv", dict(ori_kv=csa["ori_kv"].transpose(0, 1))),
        ("ori_block_table", dict(ori_block_table=None)),
        ("ori_block_table", dict(ori_block_table=csa["ori_block_table"].long())),
        ("ori_block_table", dict(ori_block_table=csa["ori_block_table"][:1])),
        ("cmp_block_table", dict(cmp_block_table=None)),
        ("seqused_ori_kv", dict(seqused_ori_kv=None)),
        ("seqused_cmp_kv", dict(seqused_cmp_kv=int32([1]))),
        ("cmp_residual_kv", dict(cmp_residual_kv=None)),
        ("cmp_residual_kv", dict(cmp_residual_kv=int32([0]))),
        ("cu_seqlens_q", dict(cu_seqlens_q=None)),
        ("cu_seqlens_q", dict(cu_seqlens_q=csa["cu_seqlens_q"].long())),
        ("cu_seqlens_ori_kv", dict(cu_seqlens_ori_kv=csa["cu_seqlens_q"])),
        ("seqused_q", dict(seqused_q=int32([1, 2]))),
        ("ori_sparse_indices", dict(ori_sparse_indices=csa["cmp_sparse_indices"])),
        ("cmp_topk_length", dict(cmp_topk_length=int32([1, 2]))),
        ("cmp_sparse_indices", dict(cmp_sparse_indices=csa["cmp_sparse_indices"][:, 0])),
        ("cmp_sparse_indices", dict(cmp_sparse_indices=csa["cmp_sparse_indices"].long())),
        ("sinks", dict(sinks=None)),
        ("sinks", dict(sinks=f32(heads + 1))),
        ("sinks", dict(sinks=bf16(heads))),
        ("metadata", dict(metadata=None)),
        ("metadata", dict(metadata=int32([1, 2]))),
        ("cmp_ratio", dict(cmp_ratio=128)),
        ("ori_mask_mode", dict(ori_mask_mode=3)),
        ("cmp_mask_mode", dict(cmp_mask_mode=0)),
        ("layout_q", dict(layout_q="BNSD")),
        ("layout_kv", dict(layout_kv="PA_BNSD")),
        ("topk_value_mode", dict(topk_value_mode=2)),
        ("softmax_lse", dict(softmax_lse=f32(1))),
        ("attention_out", dict(attention_out=f32(rows, heads, 512))),
    )


def attempt(symbol, csa):
    """A function that calls with the metadata of `csa`, unless another is given."""
    more = {k: csa[k] for k in ("quant_mode", "rope_head_dim") if k in csa}
    made = metadata_of(csa, symbol + "Metadata", **more)
    return lambda case=csa, **changed: attend(case, symbol, **{"metadata": made} | changed)


def refusals(symbol, base, csa):
    run = attempt(symbol, csa)
    for argument, changed in refusable(csa):
        refused(symbol, lambda changed=changed: run(**changed), f"'{argument}'")
    refused(symbol, lambda: run(base, cmp_ratio=4), "'cmp_ratio'")
    refused(symbol, lambda: run(without(csa, cmp_sparse_indices=None)), "'cmp_ratio'")


def faults(symbol, base, hca, csa):
    """What both kernels name."""
    run = attempt(symbol, csa)

    def fault(words, case=csa, **changed):
        refused(symbol, lambda: attend(case, symbol, **changed), words, 507015)

    def stale(words, case=csa, **changed):
        refused(symbol, lambda: run(case, **changed), words, 507015)

    for name, other in (
        ("cu_seqlens_q", cumulative([2, 1])),
        ("seqused_ori_kv", csa["seqused_ori_kv"] + 4),
        ("seqused_cmp_kv", csa["seqused_cmp_kv"] - 1),
        ("cmp_residual_kv", csa["cmp_residual_kv"] + 1),
    ):
        stale(f"'metadata': made for another {name}", **{name: other})
    stale("'metadata': made for another", hca)
    fault("'metadata': not what", metadata=torch.zeros(1024, dtype=torch.int32))
    fault("is on page 10000, outside", cmp_block_table=csa["cmp_block_table"] * 0 + 10000)
    fault("'ori_block_table': position", ori_block_table=csa["ori_block_table"] * 0 - 1)
    late = csa["cmp_sparse_indices"].clone()
    late[0, 0, -1] = 1
    fault("stands behind a negative one", cmp_sparse_indices=late)
    fault("do not make", without(csa, cmp_residual_kv=csa["cmp_residual_kv"] + 1))
    fault("0 keys of sequence 0 with", without(base, seqused_ori_kv=base["seqused_ori_kv"] * 0))
    fault("'seqused_ori_kv': found", without(base, seqused_ori_kv=base["seqused_ori_kv"] + 999))
    fault("'cu_seqlens_q': found", without(base, cu_seqlens_q=cumulative([3, 1, 9])))


def metadata_refusals(symbol, base, csa):
    def at(argument, case=csa, **changed):
        more = {k: case[k] for k in ("quant_mode", "rope_head_dim") if k in case}
        refused(symbol, lambda: metadata_of(case, symbol, **more | changed), f"'{argument}'")

    at("num_heads_kv", num_heads_kv=2)
    at("head_dim", head_dim=576)
    at("num_heads_q", num_heads_q=129)
    at("batch_size", batch_size=-1)
    at("max_seqlen_q", max_seqlen_q=-1)
    at("ori_topk", ori_topk=512)
    at("cmp_topk", cmp_topk=256)
    at("cmp_ratio", cmp_ratio=1)
    at("cmp_ratio", base, cmp_ratio=128)
    at("ori_mask_mode", ori_mask_mode=0)
    at("cmp_mask_mode", cmp_mask_mode=4)
    at("has_ori_kv", has_ori_kv=False)
    at("layout_kv", layout_kv="BSND")
    at("seqused_q", seqused_q=int32([1, 2]))
    at("ori_topk_length", ori_topk_length=int32([1, 2]))
    at("cu_seqlens_q", cu_seqlens_q=csa["cu_seqlens_q"].long())
    at("cu_seqlens_q", cu_seqlens_q=int32([0, 1]))
    at("cmp_residual_kv", cmp_residual_kv=int32([1]))
    at("max_seqlen_q", max_seqlen_q=1)  # kernel faults
    at("max_seqlen_ori_kv", max_seqlen_ori_kv=5)
    at("max_seqlen_cmp_kv", max_seqlen_cmp_kv=5)


refusals(ATTENTION, base, csa)
faults(ATTENTION, base, hca, csa)
metadata_refusals(METADATA, base, csa)
refused(ATTENTION, lambda: attend(base, cmp_sparse_indices=csa["cmp_sparse_indices"]), "'cmp_s")
refused(METADATA, lambda: metadata_of(csa, num_heads_q=12), "'num_heads_q'")
if A5:
    refused(METADATA, lambda: metadata_of(csa, num_heads_q=1), "'num_heads_q'")
    short = metadata_of(base, ori_win_left=20), dict(ori_win_left=20)
    got = attend(base, metadata=short[0], **short[1])[0]
    if not np.allclose(array(got), attended(base, STEPS.but(left=20))[0], atol=2e-2):
        problems.append("sparse_flash_mla: a window of 21")
else:
    refused(METADATA, lambda: metadata_of(csa, ori_win_left=63), "'ori_win_left'")
    refused(METADATA, lambda: metadata_of(csa, ori_win_right=1), "'ori_win_right'")
    few = dict(cmp_sparse_indices=csa["cmp_sparse_indices"][..., :64].contiguous())
    refused(ATTENTION, lambda: attend(csa, metadata=metadata_of(csa), **few), "'cmp_sparse_indices")
    odd = case_of(4, [20], [1], size=24)
    refused(ATTENTION, lambda: attend(odd), "'ori_kv'")

apart = attend(csa, ori_kv=with_gaps(csa["ori_kv"]), cmp_kv=with_gaps(csa["cmp_kv"]))
if not torch.equal(apart[0].cpu(), attend(csa)[0].cpu()):
    problems.append("sparse_flash_mla: pages with gaps")


def other_layouts():
    """The same rows not in pages: TND beside TND, and BSND."""
    rows = [bf16(n, 1, 512) for n in (20, 33)]
    case = case_of(4, [20, 33], [2, 2])
    case["ori_kv"], case["ori_block_table"] = pool_of(rows, 16)
    want = attend(case)[0].cpu()
    flat = without(case, ori_kv=torch.cat(rows), ori_block_table=None, seqused_ori_kv=None)
    flat |= dict(cu_seqlens_ori_kv=cumulative([20, 33]))
    tnd = dict(layout_kv="TND")
    got = attend(flat, metadata=metadata_of(flat, **tnd), **tnd)[0].cpu()
    dense = torch.full((2, 40, 1, 512), float("nan")).bfloat16()
    for b, part in enumerate(rows):
        dense[b, : len(part)] = part
    bsnd = dict(layout_q="BSND", layout_kv="BSND", cu_seqlens_q=None)
    square = without(case, ori_kv=dense, ori_block_table=None)
    made = metadata_of(square, max_seqlen_q=2, **bsnd)
    q = case["q"].view(2, 2, 4, 512)
    also = attend(square, metadata=made, q=q, **bsnd)[0].cpu().view(4, 4, 512)
    if not (torch.equal(got, want) and torch.equal(also, want)):
        problems.append("sparse_flash_mla: layouts differ")


other_layouts()


def behind():
    """Rows of q behind the last sequence are not written."""
    case = case_of(4, [20, 3], [2, 1])
    longer = case | dict(q=torch.cat([case["q"], case["q"]]))
    out = torch.full((6, 4, 512), float("nan")).bfloat16().npu()
    attend(longer, attention_out=out)
    if not (torch.equal(out[:3].cpu(), attend(case)[0].cpu()) and out[3:].isnan().all()):
        problems.append("sparse_flash_mla: rows behind the last sequence")


behind()
