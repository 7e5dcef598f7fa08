"""What holds for sparse attention,
indexer and selection whatever computes them (spec/v4.md 4.2, 4.5, 4.6, 15.2).
"""

import functools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from seeds import generator

from dsv4_backend import ragged
from dsv4_backend.errors import ArgumentError
from dsv4_backend.ops.attention import sparse_attention
from dsv4_backend.ops.indexer import indexer_scores, topk_indices

HEADS, DIM, RATIO, WINDOW = 3, 8, 4, 7
KINDS = ("window", "all", "chosen")
every_kind = pytest.mark.parametrize("kind", KINDS)


def quick(examples):
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


class Sequence:
    """All rows of one sequence, and what attention over them must be: a dense masked softmax."""

    def __init__(self, length, kind, seed, dtype=torch.float32):
        draw = functools.partial(torch.randn, generator=generator(seed), dtype=dtype)
        self.length, self.kind = length, kind
        self.q, self.near, self.sink = draw(length, HEADS, DIM), draw(length, DIM), draw(HEADS)
        self.far = draw(length // RATIO, DIM)
        self.chosen = None
        if kind == "chosen":
            self.chosen = torch.full((length, 3), -1, dtype=torch.int32)
            for t in range(length):
                some = torch.randperm((t + 1) // RATIO, generator=generator(seed + t))[:3]
                self.chosen[t, : len(some)] = some

    def visible(self):
        """bool [T, T + entries]: what each token may see, by 4.2."""
        t = torch.arange(self.length)[:, None]
        j = torch.arange(self.length)
        near = (j <= t) & (j > t - WINDOW)
        i = torch.arange(len(self.far))
        far = (
            (i < (t + 1) // RATIO)
            if self.kind != "window"
            else torch.zeros(self.length, len(i), dtype=torch.bool)
        )
        if self.chosen is not None:
            far = (self.chosen[:, :, None] == i).any(1)
        return torch.cat((near, far), 1)

    def dense(self, sink=None):
        sink = self.sink if sink is None else sink
        keys = torch.cat((self.near, self.far))
        scores = torch.einsum("thd,nd->thn", self.q, keys) / math.sqrt(DIM)
        scores = scores.masked_fill(~self.visible()[:, None], -math.inf)
        column = sink[None, :, None].expand(self.length, -1, 1)
        return torch.cat((scores, column), -1).softmax(-1)[..., :-1] @ keys


def serve(sequences, splits, block_size=3, seed=0):
    """Outputs [T, H, D] per sequence,
    computed step by step: splits[s] are the chunk sizes of sequence s.
    """
    kind, step = sequences[0].kind, max([1, *map(max, splits)])
    columns = (
        -(-(WINDOW - 1 + step) // block_size),
        max(1, -(-max(s.length for s in sequences) // RATIO // block_size)),
    )
    pools = [torch.full((len(sequences) * c + 2, block_size, DIM), math.nan) for c in columns]
    tables = [
        torch.randperm(len(pool), generator=generator(seed))[: len(sequences) * c].view(-1, c).int()
        for pool, c in zip(pools, columns, strict=True)
    ]
    done, outputs = [0] * len(sequences), [[] for _ in sequences]
    for i in range(max(map(len, splits))):
        new = [split[i] if i < len(split) else 0 for split in splits]
        starts = torch.tensor([0, *new]).cumsum(0).int()
        for s, (sequence, n) in enumerate(zip(sequences, new, strict=True)):
            before, done[s] = done[s], done[s] + n
            put(pools[0], tables[0], s, range(before, done[s]), sequence.near)
            put(pools[1], tables[1], s, range(before // RATIO, done[s] // RATIO), sequence.far)
        pieces = [slice(d - n, d) for d, n in zip(done, new, strict=True)]
        out = sparse_attention(
            torch.cat([s.q[p] for s, p in zip(sequences, pieces, strict=True)]),
            sequences[0].sink,
            pools[0],
            tables[0],
            *(pools[1:] + tables[1:] if kind != "window" else (None, None)),
            torch.cat([s.chosen[p] for s, p in zip(sequences, pieces, strict=True)])
            if kind == "chosen"
            else None,
            starts,
            torch.tensor(done, dtype=torch.int32),
            WINDOW,
            RATIO if kind != "window" else 0,
        )
        for s in range(len(sequences)):
            outputs[s].append(out[starts[s] : starts[s + 1]])
    return [torch.cat(parts) for parts in outputs]


def put(pool, table, s, indices, rows):
    for i in indices:
        pool.view(-1, DIM)[ragged.slots(table, torch.tensor(s), torch.tensor(i), pool.shape[1])] = (
            rows[i]
        )


@pytest.mark.parametrize("length", [1, 2, 6, 7, 8, 13, 14, 15, 40])
def test_without_sink_and_compression_it_is_sliding_window_attention(length):
    sequence = Sequence(length, "window", length)
    sequence.sink = torch.full((HEADS,), -math.inf)
    mask = sequence.visible()[:, :length]
    keys = sequence.near.expand(HEADS, -1, -1)
    want = torch.nn.functional.scaled_dot_product_attention(
        sequence.q.transpose(0, 1), keys, keys, attn_mask=mask
    )
    torch.testing.assert_close(
        serve([sequence], [[length]])[0], want.transpose(0, 1), rtol=1e-5, atol=1e-6
    )


@every_kind
@pytest.mark.parametrize("length", [1, 3, 4, 5, 7, 8, 12, 13, 15, 16, 17, 40])
def test_prefill_and_decode_are_one_dense_softmax(kind, length):
    sequence = Sequence(length, kind, length)
    for split in ([length], [1] * length):
        torch.testing.assert_close(
            serve([sequence], [split])[0], sequence.dense(), rtol=1e-5, atol=1e-6
        )


@every_kind
@quick(80)
@given(
    splits=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=4),
    block_size=st.integers(1, 8),
    seed=st.integers(0, 999),
)
def test_any_chunking_of_any_batch_gives_the_same(kind, splits, block_size, seed):
    sequences = [Sequence(sum(split), kind, seed + i) for i, split in enumerate(splits)]
    for sequence, got in zip(sequences, serve(sequences, splits, block_size, seed), strict=True):
        torch.testing.assert_close(got, sequence.dense(sequences[0].sink), rtol=1e-5, atol=1e-6)


@every_kind
@quick(60)
@given(length=st.integers(2, 30), seed=st.integers(0, 999), data=st.data())
def test_a_future_row_changes_no_earlier_bit(kind, length, seed, data):
    first, second = Sequence(length, kind, seed), Sequence(length, kind, seed)
    changed = data.draw(st.integers(1, length - 1))
    value = data.draw(st.sampled_from((0.0, 1e4, math.nan)))
    second.near[changed:], second.q[changed:], second.far[(changed + 1) // RATIO :] = (
        value,
        value,
        value,
    )
    got, other = (serve([s], [[length]])[0] for s in (first, second))
    assert torch.equal(got[:changed], other[:changed])


@every_kind
def test_sink_after_the_fact(kind):
    """o = o_without_sink / (1 + exp(sink - lse)), natural logarithm."""
    sequence = Sequence(20, kind, 4)
    with_sink = serve([sequence], [[20]])[0]
    sink, sequence.sink = sequence.sink, torch.full((HEADS,), -math.inf)
    without = serve([sequence], [[20]])[0]
    keys = torch.cat((sequence.near, sequence.far))
    scores = torch.einsum("thd,nd->thn", sequence.q, keys) / math.sqrt(DIM)
    lse = scores.masked_fill(~sequence.visible()[:, None], -math.inf).logsumexp(-1)
    torch.testing.assert_close(
        with_sink, without / (1 + (sink - lse).exp())[..., None], rtol=1e-5, atol=1e-6
    )


def test_a_sink_far_above_every_score_has_finite_gradients():
    sequence = Sequence(9, "all", 2)
    sequence.sink = torch.full((HEADS,), 500.0, requires_grad=True)
    sequence.q.requires_grad_()
    serve([sequence], [[9]])[0].sum().backward()
    assert sequence.sink.grad.isfinite().all()
    assert sequence.q.grad.isfinite().all()


def test_all_visible_entries_chosen_is_the_same_as_no_choice():
    some, every = Sequence(30, "chosen", 3), Sequence(30, "all", 3)
    entry = torch.arange(7, dtype=torch.int32)
    some.chosen = torch.where(entry < (torch.arange(30)[:, None] + 1) // RATIO, entry, -1).int()
    torch.testing.assert_close(
        serve([some], [[30]])[0], serve([every], [[30]])[0], rtol=1e-6, atol=1e-6
    )


@every_kind
def test_gradients_reach_everything_through_the_caches(kind):
    """Rows written in place into fresh caches, as in training;
    masked and unwritten rows get none.
    """
    sequence = Sequence(9, kind, 1, torch.float64)
    starts, lengths = torch.tensor([0, 9], dtype=torch.int32), torch.tensor([9], dtype=torch.int32)
    table = torch.tensor([[1, 3, 0]], dtype=torch.int32)

    def outputs(q, sink, near, far):
        caches = []
        for rows in (near, far):
            cache = torch.zeros(4, 3, DIM, dtype=torch.float64)
            flat = ragged.slots(table, torch.tensor(0), torch.arange(len(rows)), 3)
            caches.append(cache.index_put_((flat // 3, flat % 3), rows))
        compressed = (caches[1], table, sequence.chosen) if kind != "window" else (None, None, None)
        ratio = RATIO if kind != "window" else 0
        return sparse_attention(
            q, sink, caches[0], table, *compressed, starts, lengths, WINDOW, ratio
        )

    leaves = [t.requires_grad_() for t in (sequence.q, sequence.sink, sequence.near, sequence.far)]
    assert torch.autograd.gradcheck(outputs, leaves, fast_mode=True)


scores_with_ties = st.lists(
    st.sampled_from((-math.inf, -1.0, -0.0, 0.0, 0.5, math.inf)), min_size=12, max_size=12
)


@quick(300)
@given(
    rows=st.lists(st.tuples(scores_with_ties, st.integers(0, 12)), min_size=1, max_size=6),
    k=st.integers(1, 14),
)
def test_ties_go_to_the_smaller_index(rows, k):
    scores, visible = (
        torch.tensor([values for values, _ in rows]),
        torch.tensor([v for _, v in rows]),
    )
    got = topk_indices(scores, visible, k)
    for (values, v), row in zip(rows, got.tolist(), strict=True):
        want = sorted(range(v), key=lambda i: (-values[i], i))[:k]
        assert row == want + [-1] * (min(k, 12) - len(want))


def test_nan_among_visible_scores_is_an_error():
    scores = torch.tensor([[1.0, math.nan, 2.0]])
    assert topk_indices(scores, torch.tensor([1]), 2).tolist() == [[0, -1]]
    with pytest.raises(
        ArgumentError, match=r"dsv4::topk_indices: argument 'scores': found NaN at \[0, 1\]"
    ):
        topk_indices(scores, torch.tensor([2]), 2)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_selection_is_everything_until_there_are_more_than_k_entries(k):
    """Tokens up to t + 1 = 4K + 3 see all their entries; from 4K + 4 on exactly K are chosen."""
    length = RATIO * (k + 2)
    draw = functools.partial(torch.randn, generator=generator(k))
    q, keys, weights = draw(length, 16, DIM), draw(4, 3, DIM), draw(length, 16)
    starts, lengths = (
        torch.tensor([0, length], dtype=torch.int32),
        torch.tensor([length], dtype=torch.int32),
    )
    table = torch.tensor([[2, 0]], dtype=torch.int32)
    scores = indexer_scores(q, keys, weights, table, starts, lengths, RATIO)
    visible = (torch.arange(length) + 1) // RATIO
    chosen = topk_indices(scores, visible, k)
    for t in range(length):
        found = [i for i in chosen[t].tolist() if i >= 0]
        assert len(found) == len(set(found)) == min(k, int(visible[t]))
        assert all(i < visible[t] for i in found)


@quick(80)
@given(
    splits=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=4),
    block_size=st.integers(1, 5),
    seed=st.integers(0, 999),
)
def test_indexer_scores_do_not_depend_on_chunks_or_blocks(splits, block_size, seed):
    lengths = [sum(split) for split in splits]
    draw = functools.partial(torch.randn, generator=generator(seed))
    queries, weights = [draw(n, 5, DIM) for n in lengths], [draw(n, 5) for n in lengths]
    keys = [draw(n // RATIO, DIM) for n in lengths]
    columns = max(1, -(-max(len(k) for k in keys) // block_size))
    pool = torch.full((len(splits) * columns + 1, block_size, DIM), math.nan)
    table = torch.randperm(len(pool), generator=generator(seed))[:-1].view(-1, columns).int()
    done = [0] * len(splits)
    for i in range(max(map(len, splits))):
        new = [split[i] if i < len(split) else 0 for split in splits]
        pieces = [slice(d, d + n) for d, n in zip(done, new, strict=True)]
        for s, n in enumerate(new):
            put(pool, table, s, range(done[s] // RATIO, (done[s] + n) // RATIO), keys[s])
            done[s] += n
        starts = torch.tensor([0, *new]).cumsum(0).int()
        q, w = (
            torch.cat([rows[s][p] for s, p in enumerate(pieces)]) for rows in (queries, weights)
        )
        got = indexer_scores(
            q, pool, w, table, starts, torch.tensor(done, dtype=torch.int32), RATIO
        )
        for s, piece in enumerate(pieces):
            dots = torch.einsum("thd,nd->thn", queries[s][piece], keys[s]).relu()
            want = (dots * weights[s][piece][..., None]).sum(1)
            t = torch.arange(lengths[s])[piece, None]
            want = want.masked_fill(torch.arange(len(keys[s])) >= (t + 1) // RATIO, -math.inf)
            mine = got[starts[s] : starts[s + 1]]
            torch.testing.assert_close(mine[:, : len(keys[s])], want, rtol=1e-5, atol=1e-5)
            assert (mine[:, len(keys[s]) :] == -math.inf).all()


def test_an_index_that_is_not_visible_yet_is_refused():
    sequence = Sequence(9, "chosen", 0)
    sequence.chosen[6, 2] = 1
    with pytest.raises(
        ArgumentError,
        match=r"'cmp_indices': found 1 at \[6, 2\], expected -1 or one of the 1 visible",
    ):
        serve([sequence], [[9]])
