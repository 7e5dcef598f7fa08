"""aclnnCompressor of CANN, pooling only (docs/spec/ascend-operators.md 4.9 C; spec/v4.md 4.3; see
fused_check.py). Tokens come in chunks, what lies between them in the state; the formula pools each
entry from the whole sequence.
"""

import os

import numpy as np
import torch
from aclnn import call
from fused_check import A5, Steps, array, check, f32, problems, refused, rng, same
from v4_paged import cumulative, int32, on_npu

NAME = "aclnnCompressor"
A2 = os.environ.get("SOFTNPU_SOC", "").startswith("Ascend910B")
HIDDEN = 1024


def case_of(width, coff, ratio, chunks, size, **more):
    """`chunks`: tokens of each sequence, call by call; `gone[b]`: positions below it are on page
    0 of the state when the last chunk comes.
    """
    lengths = np.sum(chunks, 0)
    x = [f32(n, HIDDEN).bfloat16() for n in lengths]
    weights = [(f32(coff * width, HIDDEN) * 0.04).bfloat16() for _ in range(2)]
    names = dict(square=False, ring=False, gone=[0] * len(lengths)) | more
    return dict(
        x=x, wkv=weights[0], wgate=weights[1], ape=f32(ratio, coff * width), width=width,
        coff=coff, ratio=ratio, chunks=chunks, size=size, **names,
    )  # fmt: skip


def tables(case):
    """(state of NaN, block table) with random pages from 1 on."""
    lengths, size = np.sum(case["chunks"], 0), case["size"]
    columns = [1 if case["ring"] else -(-n // size) + 1 for n in lengths]
    pages = iter(rng.permutation(sum(columns) + 2) + 1)
    table = np.zeros((len(lengths), max(columns)), np.int32)
    for row, n in zip(table, columns, strict=True):
        row[:n] = [next(pages) for _ in range(n)]
    state = torch.full((sum(columns) + 3, size, 2 * case["coff"] * case["width"]), float("nan"))
    return state, table


def chunk(case, state, table, starts, counts):
    """One call; the entries [n, width], one array for all sequences."""
    ratio, batch = case["ratio"], len(starts)
    parts = [x[s : s + n] for x, s, n in zip(case["x"], starts, counts, strict=True)]
    named = dict(
        state_cache=state, wkv=case["wkv"], wgate=case["wgate"], ape=case["ape"],
        state_block_table=int32(table[:, 0] if case["ring"] else table), start_pos=int32(starts),
        cmp_ratio=ratio, coff=case["coff"], cache_mode=1 + case["ring"],
        state_cache_stride_dim0=state.stride(0),
    )  # fmt: skip
    if case["square"]:
        longest = max(counts)
        x = torch.full((batch, longest, HIDDEN), float("nan")).bfloat16()
        for b, part in enumerate(parts):
            x[b, : len(part)] = part
        named |= dict(x=x, seqused=int32(counts))
        rows = (batch, -(-longest // ratio))
    else:
        total = sum(counts)
        named |= dict(x=torch.cat(parts), cu_seqlens=cumulative(counts))
        rows = (min(total, total // ratio + batch),)
    out = torch.full((*rows, case["width"]), float("nan")).bfloat16().npu()
    call(NAME, **on_npu(named), cmp_kv=out)
    closing = [(s + n) // ratio - s // ratio for s, n in zip(starts, counts, strict=True)]
    got = out.cpu()
    if case["square"]:
        written = torch.cat([got[b, :n] for b, n in enumerate(closing)])
    else:
        written = got[: sum(closing)]
    if written.isnan().any() or got.isnan().sum() + written.numel() != got.numel():
        problems.append(f"compressor: {closing} entries of {rows} rows: others written")
    return written


def run(case):
    """Entries of each call, and the state of the tokens that it still holds."""
    state, table = tables(case)
    state, outputs = state.npu(), []
    starts = [0] * len(case["x"])
    for number, counts in enumerate(case["chunks"]):
        if number == len(case["chunks"]) - 1:
            for b, gone in enumerate(case["gone"]):
                table[b, : gone // case["size"]] = 0
        outputs.append(chunk(case, state, table, starts, counts))
        starts = [s + n for s, n in zip(starts, counts, strict=True)]
    held = state.cpu()
    size, rows = case["size"], []
    for b, end in enumerate(starts):
        first = max(end - size, 0) if case["ring"] else case["gone"][b]
        column = (lambda p: 0) if case["ring"] else (lambda p: p // size)
        rows += [held[table[b, column(p)], p % size] for p in range(first, end)]
    return [*outputs, torch.stack(rows)]


STEPS = Steps(
    values=lambda x, wkv, wgate: (x @ wkv.T, x @ wgate.T),
    ape=lambda ape, t: ape[t % len(ape)],
    blocks=lambda entry: (entry - 1, entry),
    halves=lambda part, width, which: part[..., which * width : (which + 1) * width],
    absent=-np.inf,
    weights=lambda s: np.exp(s - s.max(0)) / np.exp(s - s.max(0)).sum(0),
    pooled=lambda p, u: (p * u).sum(0),
    closing=lambda first, end: range(first, end),
    stored=same,
)


def entry_of(case, u, s, entry, oldest, steps):
    """Slots of the block before (its first channels) and of its own, softmax for each channel."""
    width, coff, ratio = case["width"], case["coff"], case["ratio"]
    values, scores = [], []
    for which, block in enumerate(steps.blocks(entry)[-coff:]):
        for t in range(block * ratio, (block + 1) * ratio):
            here = max(oldest, 0) <= t < len(u)
            values.append(steps.halves(u[t], width, which) if here else np.zeros(width))
            scores.append(
                steps.halves(s[t], width, which) if here else np.full(width, steps.absent)
            )
    return steps.pooled(steps.weights(np.stack(scores)), np.stack(values))


def formula(case, steps):
    sequences = []
    for x in case["x"]:
        u, s = steps.values(array(x), array(case["wkv"]), array(case["wgate"]))
        s = s + np.stack([steps.ape(array(case["ape"]), t) for t in range(len(s))])
        sequences.append((u, s))
    outputs, starts = [], np.zeros(len(sequences), int)
    for number, counts in enumerate(case["chunks"]):
        entries = []
        last = number == len(case["chunks"]) - 1
        for b, (u, s) in enumerate(sequences):
            first, end = starts[b] // case["ratio"], (starts[b] + counts[b]) // case["ratio"]
            oldest = case["gone"][b] if last else 0
            entries += [entry_of(case, u, s, e, oldest, steps) for e in steps.closing(first, end)]
        outputs.append(np.stack(entries) if entries else np.zeros((0, case["width"])))
        starts = starts + counts
    rows = []
    for b, (u, s) in enumerate(sequences):
        first = max(starts[b] - case["size"], 0) if case["ring"] else case["gone"][b]
        rows.append(np.concatenate(steps.stored([u, s]), -1)[first:])
    return [*outputs, np.concatenate(rows)]


FAULTS = {
    "no ape": dict(ape=lambda ape, t: ape[0] * 0),
    "ape one row on": dict(ape=lambda ape, t: ape[(t + 1) % len(ape)]),
    "kv and gate exchanged": dict(values=lambda x, wkv, wgate: (x @ wgate.T, x @ wkv.T)),
    "halves exchanged": dict(
        halves=lambda part, width, which: part[..., (1 - which) * width :][..., :width]
    ),
    "own halves twice": dict(halves=lambda part, width, which: part[..., -width:]),
    "absent with score 0": dict(absent=0.0),
    "mean": dict(weights=lambda s: np.full(s.shape, 1 / len(s))),
    "softmax over channels": dict(weights=lambda s: np.exp(s) / np.exp(s).sum(-1)[:, None]),
    "not weighted": dict(pooled=lambda p, u: u.sum(0)),
    "entries reversed": dict(closing=lambda first, end: range(first, end)[::-1]),
    "s before u": dict(stored=lambda parts: parts[::-1]),
}


def checks():
    cases = [
        case_of(128, 2, 4, [[6, 1, 3], [1, 0, 1], [6, 3, 5]], 8),  # V4's indexer
        case_of(512, 1, 128, [[130, 127], [130, 3]], 32),  # HCA
        case_of(512, 2, 4, [[5, 2], [8, 3]], 4, square=True),  # CSA
        case_of(128, 1, 2, [[3], [2], [5]], 16),
        # the block before the next entry's is on page 0: only its own block is pooled
        case_of(128, 2, 4, [[12, 9], [4, 8]], 4, gone=[12, 8]),
    ]
    if A5:
        cases.append(case_of(128, 2, 4, [[4, 3], [3, 6], [6, 2]], 16, ring=True))
        cases.append(case_of(128, 2, 4, [[4, 3], [3, 6]], 16, ring=True, square=True))
    check(
        "compressor", run, lambda case, steps: formula(case[0], steps), STEPS,
        [(case,) for case in cases], FAULTS, 1e-2,
    )  # fmt: skip


def step():
    """One decode step of 2 sequences, that is accepted."""
    state = torch.zeros(9, 8, 512)
    good = dict(
        x=f32(2, HIDDEN).bfloat16(), wkv=f32(256, HIDDEN).bfloat16(),
        wgate=f32(256, HIDDEN).bfloat16(), state_cache=state, ape=f32(4, 256),
        state_block_table=int32([[1, 2, 3], [4, 5, 6]]), cu_seqlens=int32([0, 1, 2]),
        start_pos=int32([7, 9]), cmp_ratio=4, coff=2, cache_mode=1,
        state_cache_stride_dim0=state.stride(0), cmp_kv=torch.zeros(2, 128).bfloat16(),
    )  # fmt: skip
    return on_npu(good)


def bad(good, argument, code=None, **changed):
    refused(NAME, lambda: call(NAME, **good | on_npu(changed)), f"'{argument}'", code)


def refusals():
    """The step's arguments replaced one by one."""
    good = step()
    call(NAME, **good)
    bad(good, "x", x=f32(2, HIDDEN))
    bad(good, "x", x=f32(2, 512).bfloat16())
    bad(good, "x", x=f32(2, 1100).bfloat16())
    bad(good, "x", x=f32(HIDDEN, 2).bfloat16().t())
    bad(good, "wkv", wkv=f32(256, HIDDEN))
    bad(good, "wkv", wkv=f32(256, HIDDEN).half())
    bad(good, "wkv", wkv=f32(192, HIDDEN).bfloat16())
    bad(good, "wgate", wgate=f32(128, HIDDEN).bfloat16())
    bad(good, "ape", ape=f32(4, 128))
    bad(good, "ape", ape=f32(4, 256).bfloat16())
    bad(good, "state_cache", state_cache=torch.zeros(9, 8, 256))
    bad(good, "state_cache", state_cache=torch.zeros(2, 1025, 512))
    bad(good, "state_cache", state_cache=torch.zeros(9, 8, 512).bfloat16())
    bad(good, "state_cache_stride_dim0", state_cache_stride_dim0=0)
    bad(good, "state_block_table", state_block_table=None)
    bad(good, "state_block_table", state_block_table=int32([1, 2]))
    bad(good, "state_block_table", state_block_table=int32([[1, 2, 3]]))
    bad(good, "cu_seqlens", cu_seqlens=None)
    bad(good, "cu_seqlens", cu_seqlens=torch.tensor([0, 1, 2]))
    bad(good, "cu_seqlens", x=f32(2, 1, HIDDEN).bfloat16())
    bad(good, "start_pos", start_pos=int32([7]))
    bad(good, "cmp_ratio", cmp_ratio=3)
    bad(good, "cmp_ratio", cmp_ratio=256)
    bad(good, "coff", coff=3)
    bad(good, "cache_mode", cache_mode=3)
    bad(good, "cmp_kv", cmp_kv=torch.zeros(1, 128).bfloat16())
    bad(good, "cmp_kv", cmp_kv=torch.zeros(2, 128))


def faults():
    """What the kernel names."""
    good = step()
    bad(good, "state_block_table", 507015, start_pos=int32([7, 24]))  # beyond its columns
    bad(good, "state_block_table", 507015, state_block_table=int32([[1, 2, 3], [4, 9, 6]]))
    bad(good, "state_block_table", 507015, state_block_table=int32([[-1, 2, 3], [4, 5, 6]]))
    for words, table, start in (
        ("row 0 of page 1 is written twice", [[1] * 3, [1] * 3], [8, 8]),
        ("row 0 of page 1 is read and written", [[1, 2, 3], [4, 1, 6]], [7, 8]),
    ):
        clash = on_npu(dict(state_block_table=int32(table), start_pos=int32(start)))
        refused(NAME, lambda clash=clash: call(NAME, **good | clash), words, 507015)
    bad(good, "start_pos", 507015, start_pos=int32([7, -1]))
    bad(good, "seqused", 507015, seqused=int32([1, 2]))
    bad(good, "cu_seqlens", 507015, cu_seqlens=int32([0, 1, 3]))
    room = torch.zeros(9, 8 * 512 + 64).npu()[:, : 8 * 512].view(9, 8, 512)
    apart = good | dict(state_cache=room, state_cache_stride_dim0=room.stride(0))
    if A5:
        call(NAME, **apart)
        small = dict(state_cache=torch.zeros(3, 7, 512), state_cache_stride_dim0=7 * 512)
        bad(good, "state_cache", 507015, cache_mode=2, state_block_table=int32([1, 2]), **small)
    else:
        refused(NAME, lambda: call(NAME, **apart), "'state_cache'")
        bad(good, "cache_mode", cache_mode=2, state_block_table=int32([1, 2]))


if A2:
    refused(NAME, lambda: run(case_of(128, 2, 4, [[4]], 8)), "does not exist on")
else:
    checks()
    refusals()
    faults()
