"""Where sparse attention rounds in bf16: 64-key tiles in list order,
as the official kernel does (spec/v4.md 4.6).
"""

import math

import pytest
import torch
from seeds import draw, generator

from dsv4_ascend.parity.compare import compare
from dsv4_ascend.parity.runner import samples
from dsv4_backend.ops.attention import AttentionCall, sparse_attention
from dsv4_backend.proofs.attention import random_call

SAMPLES = list(samples(sparse_attention, "official"))
LIMITS = sparse_attention.tolerance.limits("official")


def key_list(call, owner, t):
    """Rows of one token's list and whether there is a key, one after the other,
    as the specification says.
    """
    first = max(t - call.window + 1, 0)
    near = range(first, first + call.window)
    keys = [(call.window_cache, call.window_block_table, j if j <= t else -1) for j in near]
    entries = range((t + 1) // call.ratio) if call.ratio else ()
    if call.cmp_indices is not None:
        entries = call.cmp_indices[owner[1]].tolist()
    keys += [(call.cmp_cache, call.cmp_block_table, i) for i in entries]
    keys = keys or [(None, None, -1)]
    rows = torch.zeros(len(keys), call.q.shape[-1], dtype=torch.float64)
    for row, (cache, table, index) in zip(rows, keys, strict=True):
        if index >= 0:
            block, offset = divmod(index, cache.shape[1])
            row.copy_(cache[table[owner[0], block % table.shape[1]], offset])
    return rows, torch.tensor([index >= 0 for *_, index in keys], dtype=torch.bool)


def online_softmax(q, sink, keys, valid, tile, noise):
    """The official kernel for one token [H, D]: running maximum and sums,
    bf16 probabilities, one division.
    """
    peak = torch.full((len(q), 1), -1e300, dtype=torch.float64)
    total, out = torch.zeros_like(peak), torch.zeros(q.shape, dtype=torch.float64)
    for k, v in zip(keys.split(tile), valid.split(tile), strict=True):
        scores = noise(q @ k.T / math.sqrt(q.shape[1])).masked_fill(~v, -math.inf)
        now = torch.maximum(peak, scores.amax(1, keepdim=True))
        p, decay = (scores - now).exp(), (peak - now).exp()
        total = total * decay + p.sum(1, keepdim=True)
        out, peak = out * decay + p.float().bfloat16().double() @ k.nan_to_num(), now
    with_sink = total + (sink[:, None] - peak).exp()
    return torch.where(total > 0, out / with_sink, 0).where(~total.isnan(), math.nan)


def oracle(arguments, tile=64, noise=lambda scores: scores):
    call = AttentionCall(*arguments)
    where = zip(call.owners().tolist(), call.positions().tolist(), strict=True)
    rows = [
        online_softmax(
            call.q[i].double(), call.sink.double(), *key_list(call, (s, i), t), tile, noise
        )
        for i, (s, t) in enumerate(where)
    ]
    return torch.stack(rows).bfloat16() if rows else call.q.clone()


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.case.name)
def test_the_kernel_step_by_step_gives_every_case(sample):
    found = compare(oracle(sample.case.arguments), sample.golden[0], LIMITS)
    assert found.ok, found.detail


@pytest.mark.parametrize("stream", [0, 1, 2])
def test_the_tolerance_bears_the_noise_of_fp32_sums(stream):
    """Scores off by 4e-6 of themselves,
    more than sums of 512 products in any order: some probabilities tip.
    """
    source = generator(stream)

    def noise(scores):
        return scores * (1 + 4e-6 * (2 * torch.rand(scores.shape, generator=source) - 1))

    for sample in [s for s in SAMPLES if "staircase" in s.name or "one sequence" in s.name]:
        found = compare(oracle(sample.case.arguments, noise=noise), sample.golden[0], LIMITS)
        assert found.ok, f"{sample.name}: {found.detail}"


@pytest.mark.parametrize("tile", [16, 32, 128, 100_000])
def test_other_tiles_are_told_apart(tile):
    steps = [s for s in SAMPLES if "staircase" in s.name]
    assert (
        max(compare(oracle(s.case.arguments, tile), s.golden[0], LIMITS).limit_use for s in steps)
        > 1.4
    )


@pytest.mark.parametrize("keys", [12, 20, 64])
def test_the_sum_takes_probabilities_before_they_are_rounded(keys):
    """Equal values show it: the result is rounded / unrounded sum of them,
    where a rounded sum would cancel.
    """
    # All but one round down to 0.5, by 0.9 of 2^-8.
    cache = torch.tensor([-0.6875, -0.00205, 0, 1]).repeat(1, keys, 1)
    cache[0, -1, :2] = 0
    cache, q = cache.bfloat16(), torch.tensor([[[2.0, 2.0, 0, 0]]]).bfloat16()
    p = (q[0].double() @ cache[0].double().T / 2).exp()
    want = (p.float().bfloat16().double().sum() / p.sum()).bfloat16()
    batch = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([keys], dtype=torch.int32)
    none = torch.tensor([-math.inf])
    got = sparse_attention(
        q, none, cache, torch.zeros(1, 1, dtype=torch.int32), None, None, None, *batch, keys, 0
    )
    assert got[0, 0, 3] == want
    assert want != 1


@pytest.mark.parametrize("kind", ["window", "all", "chosen"])
@pytest.mark.parametrize("new", [1, 2, 9, 30])
def test_a_chunk_has_the_list_of_the_whole(kind, new):
    """The newest tokens alone have the bits they have in the whole prefill:
    tiles are those of the list.
    """
    whole = random_call(draw(), kind, [(0, 300)], torch.bfloat16, window=70)
    starts = torch.tensor([0, new], dtype=torch.int32)
    last = whole._replace(q=whole.q[-new:], query_start_loc=starts)
    if whole.cmp_indices is not None:
        last = last._replace(cmp_indices=whole.cmp_indices[-new:])
    assert torch.equal(sparse_attention(*last), sparse_attention(*whole)[-new:])
