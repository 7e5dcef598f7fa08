"""References do long calls in tiles of tokens: the same bits for any budget.
Memory does not grow with the call, there and in kernels.
"""

import os
import subprocess
import sys

import pytest
import torch
from seeds import draw

from dsv4_backend import dispatch, tiles
from dsv4_backend.ops import indexer
from dsv4_backend.ops.attention import sparse_attention
from dsv4_backend.ops.indexer import indexer_scores, topk_indices
from dsv4_backend.ops.indexer_topk import indexer_topk
from dsv4_backend.proofs.attention import random_call
from dsv4_backend.proofs.indexer import random_call as random_index_call

SEQUENCES = {
    "one": [(0, 90)],
    "continued": [(120, 61)],
    "many": [(0, 33), (97, 1), (0, 0), (40, 25), (3, 1)],
}
TYPES = [torch.float32, torch.bfloat16]
every_batch = pytest.mark.parametrize("sequences", SEQUENCES.values(), ids=SEQUENCES)
every_type = pytest.mark.parametrize("dtype", TYPES, ids=str)
every_budget = pytest.mark.parametrize("budget", [1, 30_000, 100_000, 1 << 40])


@pytest.fixture
def reference():
    """Only references are done in tiles."""
    with dispatch.use("reference"):
        yield


pytestmark = pytest.mark.usefixtures("reference")


def same_bits(monkeypatch, budget, call):
    want = call()
    monkeypatch.setattr(tiles, "BUDGET", budget)
    got = call()
    assert torch.equal(got.nan_to_num(neginf=-1), want.nan_to_num(neginf=-1))


@every_budget
@every_type
@every_batch
@pytest.mark.parametrize("kind", ["window", "all", "chosen"])
def test_attention_has_the_same_bits(monkeypatch, kind, sequences, dtype, budget):
    call = random_call(draw(), kind, sequences, dtype, heads=4, dim=24, window=70)
    same_bits(monkeypatch, budget, lambda: sparse_attention(*call))


@every_budget
@every_type
@every_batch
@pytest.mark.parametrize("heads", [1, 5, 64])
def test_index_scores_have_the_same_bits(monkeypatch, heads, sequences, dtype, budget):
    call = random_index_call(draw(), sequences, dtype, heads=heads, dim=32)
    same_bits(monkeypatch, budget, lambda: indexer_scores(*call))


@every_budget
@every_type
@every_batch
def test_a_choice_in_one_step_is_the_same(monkeypatch, sequences, dtype, budget):
    call = random_index_call(draw(), sequences, dtype, heads=4, dim=8)
    same_bits(monkeypatch, budget, lambda: indexer_topk(*call, 4))


@every_budget
@every_type
@pytest.mark.parametrize("tokens", [0, 1, 37])
def test_selection_is_the_same(monkeypatch, tokens, dtype, budget):
    scores = draw().normal(tokens, 500).mul(4).round().to(dtype)  # with ties
    visible = draw(1).integers(tokens, high=501)
    same_bits(monkeypatch, budget, lambda: topk_indices(scores, visible, 40))


def test_nan_is_found_in_a_later_tile(monkeypatch):
    monkeypatch.setattr(tiles, "BUDGET", 1)
    scores = torch.zeros(5, 9)
    scores[3, 4], scores[4, 2] = torch.nan, torch.nan
    visible = torch.tensor([9, 9, 9, 4, 3])
    with pytest.raises(ValueError, match=r"NaN at \[4, 2\]"):
        topk_indices(scores, visible, 2)


@pytest.mark.parametrize("entries", [5, 16, 17, 40])
def test_entries_in_pieces_give_the_same_scores(monkeypatch, entries):
    call = random_index_call(draw(), [(4 * entries - 9, 9)], torch.float32, heads=16, dim=32)
    want = indexer_scores(*call)
    monkeypatch.setattr(indexer, "ENTRIES", 16)
    torch.testing.assert_close(indexer_scores(*call), want, rtol=1e-6, atol=1e-6)


PEAK = """
import sys, torch, dsv4_ascend, dsv4_backend
from dsv4_backend.ops.attention import sparse_attention
from dsv4_backend.ops.indexer import indexer_scores, topk_indices
from dsv4_backend.ops.indexer_topk import indexer_topk
from dsv4_ascend.tiny.release import SHIPPED

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) // 1024 for line in file if line.startswith("VmHWM:"))

def batch(tokens, length):
    return torch.tensor([0, tokens], dtype=torch.int32), torch.tensor([length], dtype=torch.int32)

def pages(rows, dim):
    table = torch.arange(rows // 64, dtype=torch.int32)[None]
    return torch.ones(rows // 64, 64, dim).bfloat16(), table

def index_scores(context, tokens=64):
    (keys, table), q = pages(context // 4, 128), torch.ones(tokens, 64, 128).bfloat16()
    weights = q[..., 0].contiguous()
    return lambda: indexer_scores(q, keys, weights, table, *batch(tokens, context), 4)

def choice(context, tokens):
    (keys, table), q = pages(context // 4, 16), torch.randn(tokens, 2, 16).bfloat16()
    weights = q[..., 0].contiguous()
    return lambda: indexer_topk(q, keys, weights, table, *batch(tokens, context), 4, 512)

def selection(context, tokens=64):
    scores = torch.rand(tokens, context // 4).bfloat16()
    return lambda: topk_indices(scores, torch.full((tokens,), context // 4), 512)

def attention(context, tokens=128, chosen=None, ratio=128):
    (near, near_table), (far, far_table) = pages(1024, 512), pages(context // ratio, 512)
    q, sink = torch.ones(tokens, 8, 512).bfloat16(), torch.zeros(8)
    choice = chosen and torch.arange(chosen, dtype=torch.int32).expand(tokens, -1).contiguous()
    caches, ends = (near, near_table, far, far_table), batch(tokens, context)
    return lambda: sparse_attention(q, sink, *caches, choice, *ends, 128, ratio)

def prompt(tokens):
    model, ids = dsv4_ascend.load(SHIPPED), [i % 200 for i in range(tokens)]
    cache = model.new_cache(max_sequences=1, max_tokens=tokens, max_step_tokens=tokens)
    step = dsv4_ascend.model.step.make_step(cache, [cache.new_sequence()], [ids])
    return lambda: model.network.run_layers(*step)

with torch.inference_mode(), dsv4_backend.dispatch.use(sys.argv[2]):
    call = eval(sys.argv[1])
    before = peak()
    call()
    print(peak() - before)
"""


def megabytes(call, policy):
    """Growth of a fresh process's peak memory in one call, what is freed given back at once."""
    command = [sys.executable, "-c", PEAK, call, policy]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout)


@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="peak memory is read from /proc (Linux)"
)
@pytest.mark.parametrize(
    ("call", "limit"),
    [
        pytest.param(
            "index_scores(1 << 16)", 200, marks=pytest.mark.long
        ),  # 64 tokens: 0.6 GB at once
        ("index_scores(1 << 19, 16)", 250),  # 16 tokens: 1.2 GB
        ("choice(1 << 20, 512)", 240),  # 256 MB of scores
        ("selection(1 << 19)", 200),  # 64 rows of 131072
        pytest.param(
            "attention(1 << 16)", 200, marks=pytest.mark.long
        ),  # window and 512 shared entries
        ("attention(1 << 12, 512, 512, 4)", 200),  # CSA: 2.7 GB of rows
        ("prompt(4000)", 500),  # the shipped model, whole: 435 seen at 6000 tokens
    ],
)
@pytest.mark.parametrize("policy", ["auto", "reference"])
def test_memory_of_a_call(call, limit, policy):
    assert megabytes(call, policy) < limit
