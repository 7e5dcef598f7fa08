"""`compress` against the official decode state machine (spec/v4.md 4.3.1),
for every way of feeding it.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from seeds import generator, seed_of

from dsv4_backend import ragged
from dsv4_backend.errors import ArgumentError
from dsv4_backend.ops.compressor import compress

D, HD, PAIRS, EPS = 6, 8, 3, 1e-6
UNBOUNDED = 2**31 - 1
KINDS = {"overlap": (4, 2), "plain": (6, 1)}  # name -> (ratio, blocks per entry)
FREQUENCIES = 10000.0 ** (-torch.arange(PAIRS) / PAIRS)

both_kinds = pytest.mark.parametrize("kind", KINDS)


def quick(examples):
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


class Weights:
    def __init__(self, kind, dtype=torch.float32):
        self.ratio, self.c = KINDS[kind]
        g = torch.Generator().manual_seed(seed_of(kind))
        width = self.c * HD
        self.wkv, self.wgate = (torch.randn(width, D, generator=g, dtype=dtype) for _ in range(2))
        self.ape = torch.randn(self.ratio, width, generator=g, dtype=dtype)
        self.norm = torch.rand(HD, generator=g, dtype=dtype) + 0.5

    def list(self):
        return self.wkv, self.wgate, self.ape, self.norm, FREQUENCIES.to(self.ape.dtype)


class Oracle:
    """The official buffers kv_state and score_state, one token or one prefill at a time;
    entries in a list.
    """

    def __init__(self, w):
        self.w, self.length, self.entries = w, 0, []
        self.kv = torch.zeros(w.c * w.ratio, w.c * HD)
        self.score = torch.full_like(self.kv, -math.inf)

    def prefill(self, x):
        w, r = self.w, self.w.ratio
        rest = len(x) % r
        cut = len(x) - rest
        u, s = x @ w.wkv.T, x @ w.wgate.T + w.ape.repeat(len(x) // r + 1, 1)[: len(x)]
        for i in range(cut // r):
            kv, score = u[i * r : i * r + r], s[i * r : i * r + r]
            if w.c == 2:
                before = slice((i - 1) * r, i * r)
                old_kv = u[before, :HD] if i else torch.zeros(r, HD)
                old_score = s[before, :HD] if i else torch.full((r, HD), -math.inf)
                kv, score = torch.cat((old_kv, kv[:, HD:])), torch.cat((old_score, score[:, HD:]))
            self.emit(kv, score, i * r)
        if w.c == 2 and cut >= r:
            self.kv[:r], self.score[:r] = u[cut - r : cut], s[cut - r : cut]
        offset = r if w.c == 2 else 0
        self.kv[offset : offset + rest], self.score[offset : offset + rest] = u[cut:], s[cut:]
        self.length = len(x)

    def decode(self, x):
        w, r, t = self.w, self.w.ratio, self.length
        row = (r if w.c == 2 else 0) + t % r
        self.kv[row], self.score[row] = w.wkv @ x, w.wgate @ x + w.ape[t % r]
        if (t + 1) % r == 0:
            kv, score = self.kv, self.score
            if w.c == 2:
                kv, score = (torch.cat((b[:r, :HD], b[r:, HD:])) for b in (kv, score))
            self.emit(kv, score, t + 1 - r)
            if w.c == 2:
                self.kv[:r], self.score[:r] = self.kv[r:].clone(), self.score[r:].clone()
        self.length += 1

    def emit(self, kv, score, position):
        weight = (score - score.max(0).values).exp()
        entry = (weight * kv).sum(0) / weight.sum(0)
        entry = self.w.norm * entry / torch.sqrt((entry * entry).mean() + EPS)
        pairs = torch.view_as_complex(entry[-2 * PAIRS :].reshape(PAIRS, 2))
        turned = torch.view_as_real(
            pairs * torch.polar(torch.ones(PAIRS), position * FREQUENCIES)
        ).flatten()
        self.entries.append(torch.cat((entry[: -2 * PAIRS], turned)))


def expected(w, x):
    oracle = Oracle(w)
    oracle.prefill(x)
    return oracle.entries


class Server:
    """Feeds `compress` step by step: sequences x[s], a paged ring,
    and the entries it has given so far.
    """

    def __init__(self, w, xs, largest_step, block_size=3, seed=0, pool=None):
        self.w, self.xs, self.lengths = w, xs, [0] * len(xs)
        columns = -(-(largest_step + w.c * w.ratio - 1) // block_size)
        count = len(xs) * columns + 1
        order = torch.randperm(count, generator=generator(seed)) + 1
        self.table = order[: count - 1].view(len(xs), columns).int()
        shape = (1 + count, block_size, 2 * w.c * HD)
        self.cache = torch.full(shape, math.nan, dtype=xs[0].dtype) if pool is None else pool
        self.entries = [{} for _ in xs]

    def step(self, counts, drafts=None):
        """The next counts[s] tokens of every sequence,
        then drafts[s] (rows that are not x) which are rolled back.
        """
        drafts = drafts or [x[:0] for x in self.xs]
        parts = [x[n : n + c] for x, n, c in zip(self.xs, self.lengths, counts, strict=True)]
        rows = [row for pair in zip(parts, drafts, strict=True) for row in pair]
        sizes = [len(p) + len(q) for p, q in zip(parts, drafts, strict=True)]
        starts = torch.tensor([0, *sizes]).cumsum(0).int()
        ends = torch.tensor(
            [n + size for n, size in zip(self.lengths, sizes, strict=True)], dtype=torch.int32
        )
        state = self.cache, self.table, starts, ends, UNBOUNDED
        out = compress(torch.cat(rows), *self.w.list(), *state, EPS)
        self.lengths = [n + len(p) for n, p in zip(self.lengths, parts, strict=True)]
        owner, block = ragged.closed_blocks(starts, ends, int(starts[-1]), self.w.ratio)
        for s, i, entry in zip(owner.tolist(), block.tolist(), out, strict=True):
            if i < 0:
                assert not entry.any(), "padding rows are 0"
            elif (i + 1) * self.w.ratio <= self.lengths[s]:
                assert i not in self.entries[s], "a block closes once"
                self.entries[s][i] = entry

    def check(self):
        for x, n, got in zip(self.xs, self.lengths, self.entries, strict=True):
            want = expected(self.w, x[:n])
            assert sorted(got) == list(range(len(want)))
            for i, entry in enumerate(want):
                torch.testing.assert_close(got[i], entry, rtol=1e-5, atol=1e-5)


def tokens(n, seed, scale=1.0):
    return torch.randn(n, D, generator=generator(seed)) * scale


@both_kinds
@pytest.mark.parametrize("prefill", range(1, 20))
def test_prefill_then_decode_is_the_official_state_machine(kind, prefill):
    w, x = Weights(kind), tokens(40, prefill)
    oracle, server = Oracle(w), Server(w, [x], largest_step=prefill)
    oracle.prefill(x[:prefill])
    server.step([prefill])
    for t in range(prefill, len(x)):
        oracle.decode(x[t])
        server.step([1])
    assert len(oracle.entries) == len(x) // w.ratio
    for i, entry in enumerate(oracle.entries):
        torch.testing.assert_close(server.entries[0][i], entry, rtol=1e-5, atol=1e-5)


@both_kinds
def test_the_oracle_decodes_what_it_prefills(kind):
    w, x = Weights(kind), tokens(19, 7)
    stepwise = Oracle(w)
    for row in x:
        stepwise.decode(row)
    for got, want in zip(stepwise.entries, expected(w, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


steps = st.lists(st.lists(st.integers(0, 11), min_size=1, max_size=4), min_size=4, max_size=4)


@both_kinds
@quick(500)
@given(splits=steps, block_size=st.integers(1, 9), seed=st.integers(0, 999))
def test_any_chunking_gives_the_same_entries(kind, splits, block_size, seed):
    """500 x 4 sequences for both kinds: 4,000 random splits,
    in ragged batches, in the smallest ring.
    """
    w = Weights(kind)
    xs = [tokens(sum(split), seed + i) for i, split in enumerate(splits)]
    server = Server(w, xs, max(map(max, splits)), block_size, seed)
    for i in range(max(map(len, splits))):
        server.step([split[i] if i < len(split) else 0 for split in splits])
    server.check()


@both_kinds
@quick(150)
@given(
    rounds=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 6)), min_size=1, max_size=8),
    block_size=st.integers(1, 9),
    seed=st.integers(0, 999),
)
def test_rejected_drafts_leave_no_trace(kind, rounds, block_size, seed):
    w = Weights(kind)
    x = tokens(sum(kept for kept, _ in rounds), seed)
    server = Server(w, [x], max(kept + rejected for kept, rejected in rounds), block_size, seed)
    for i, (kept, rejected) in enumerate(rounds):
        server.step([kept], [tokens(rejected, seed + i + 1, scale=30.0)])
    server.check()


@both_kinds
@quick(200)
@given(length=st.integers(2, 40), seed=st.integers(0, 999), data=st.data())
def test_a_future_token_changes_no_earlier_bit(kind, length, seed, data):
    w, x = Weights(kind), tokens(length, seed)
    changed = data.draw(st.integers(1, length - 1))
    other = x.clone()
    other[changed] = data.draw(st.sampled_from((0.0, 1e4, math.nan, math.inf)))
    first, second = (Server(w, [rows], length) for rows in (x, other))
    first.step([length])
    second.step([length])
    for i in range(changed // w.ratio):
        assert torch.equal(first.entries[0][i], second.entries[0][i])
    flat = ragged.slots(first.table, torch.tensor(0), torch.arange(changed), first.cache.shape[1])
    rows = (ragged.gather_rows(server.cache, flat) for server in (first, second))
    assert torch.equal(*rows)


@both_kinds
@quick(150)
@given(length=st.integers(1, 30), at=st.integers(0, 29), seed=st.integers(0, 999))
def test_an_entry_reads_its_own_block_and_with_overlap_the_one_before(kind, length, at, seed):
    w, x = Weights(kind), tokens(length, seed)
    other = x.clone()
    other[at % length] += 3.0
    first, second = (Server(w, [rows], length) for rows in (x, other))
    first.step([length])
    second.step([length])
    own = at % length // w.ratio
    for i in range(length // w.ratio):
        reads = i - w.c < own <= i
        assert torch.equal(first.entries[0][i], second.entries[0][i]) != reads


@both_kinds
@pytest.mark.parametrize("seed", range(5))
def test_block_order_and_reused_blocks_change_no_bit(kind, seed):
    w, x, y = Weights(kind), tokens(23, seed), tokens(31, seed + 50)
    plain = Server(w, [x], largest_step=9, block_size=64)
    used = Server(w, [y], largest_step=9, block_size=4, seed=seed)
    split = (5, 9, 1, 8)
    for n in split:
        used.step([n])
    shuffled = Server(w, [x], largest_step=9, block_size=4, seed=seed + 1, pool=used.cache)
    for n in split:
        plain.step([n])
        shuffled.step([n])
    assert plain.entries[0].keys() == shuffled.entries[0].keys()
    assert all(torch.equal(plain.entries[0][i], shuffled.entries[0][i]) for i in plain.entries[0])


@both_kinds
def test_gradients_reach_weights_through_the_state(kind):
    """Two calls over one cache: the second pools tokens that the first wrote."""
    w = Weights(kind, torch.float64)
    xs = [
        torch.randn(w.ratio + 1, D, dtype=torch.float64),
        torch.randn(2 * w.ratio, D, dtype=torch.float64),
    ]
    table = torch.tensor([[2, 1]], dtype=torch.int32)

    def entries(first, second, *weights):
        cache = torch.zeros(3, 2 * w.ratio, 2 * w.c * HD, dtype=torch.float64)
        out, length = [], 0
        for x in (first, second):
            length += len(x)
            offsets, lengths = (torch.tensor(v, dtype=torch.int32) for v in ([0, len(x)], [length]))
            state = cache, table, offsets, lengths, UNBOUNDED
            out.append(compress(x, *weights, w.list()[-1], *state, EPS))
        return tuple(out)

    leaves = [t.requires_grad_() for t in (*xs, *w.list()[:-1])]
    assert torch.autograd.gradcheck(entries, leaves, fast_mode=True)


@both_kinds
def test_a_ring_that_would_lose_a_token_is_refused_before_anything_is_written(kind):
    w, x = Weights(kind), tokens(9, 1)
    server = Server(w, [x], largest_step=1, block_size=1)
    server.step([1])
    before = server.cache.clone()
    with pytest.raises(
        ArgumentError, match=r"dsv4::compress: argument 'state_block_table': found \d+ columns"
    ):
        server.step([8 if w.c == 1 else 9])
    assert torch.equal(server.cache.nan_to_num(), before.nan_to_num())


def test_two_sequences_that_share_a_row_to_write_are_refused():
    w, x = Weights("plain"), tokens(4, 1)
    server = Server(w, [x, x], largest_step=4)
    server.table[1] = server.table[0]
    with pytest.raises(ArgumentError, match="written twice"):
        server.step([4, 4])


def test_a_sequence_in_block_0_is_refused():
    w, x = Weights("plain"), tokens(4, 1)
    server = Server(w, [x], largest_step=4)
    server.table[0, 0] = 0
    with pytest.raises(ArgumentError, match=r"found 0 at \[0, 0\], expected 1 to"):
        server.step([4])
