"""The CPU kernels of attention, compressor, caches and indexer: what the contracts' cases do not
say. Bits of a token alone, on any number of threads; values that no checker has seen.
"""

from functools import partial

import pytest
import torch

from dsv4_backend import OPERATORS, dispatch
from dsv4_backend.errors import ArgumentError

ATTEND = OPERATORS["sparse_attention"]
POOL = OPERATORS["compress_pool"]
SCORES = OPERATORS["indexer_scores"]
SELECT = OPERATORS["lightning_indexer"]
CHOOSE = OPERATORS["indexer_topk"]
TOPK = OPERATORS["topk_indices"]
WRITE = OPERATORS["write_cache"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = 8
NONSENSE = (-(2**31), -7, 5000, 2**31 - 1)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def batch(sequences):
    """Offsets and lengths of (tokens before, new tokens)."""
    new = ints(*(new for _, new in sequences))
    starts = torch.cat([ints(0), new.cumsum(0).int()])
    return starts, ints(*(before + new for before, new in sequences))


def table(sequences, rows, first=0):
    columns = -(-rows // BLOCK)
    cells = torch.randperm(sequences * columns) + first
    return cells.view(sequences, columns).int()


SEQUENCES = ((300, 3), (0, 2), (130, 5))
TOKENS = 10


def attention(dtype, heads=21, dim=40, window=70):
    near, far = table(3, 304), table(3, 304 // 4)
    positions = torch.cat([torch.arange(b, b + n) for b, n in SEQUENCES])
    chosen = (torch.rand(TOKENS, 90) * ((positions + 1) // 4)[:, None]).int()
    chosen = chosen.where(((positions + 1) // 4)[:, None] > 0, -1)
    return {
        "q": torch.randn(TOKENS, heads, dim).to(dtype),
        "sink": torch.randn(heads),
        "window_cache": torch.randn(near.numel(), BLOCK, dim).to(dtype),
        "window_block_table": near,
        "cmp_cache": torch.randn(far.numel(), BLOCK, dim).to(dtype),
        "cmp_block_table": far,
        "cmp_indices": chosen.int(),
        "query_start_loc": batch(SEQUENCES)[0],
        "seq_lens": batch(SEQUENCES)[1],
        "window": window,
        "ratio": 4,
    }


def indexer(dtype, heads=21, dim=40):
    cells = table(3, 304 // 4)
    return {
        "q": torch.randn(TOKENS, heads, dim).to(dtype),
        "k_cache": torch.randn(cells.numel(), BLOCK, dim).to(dtype),
        "weights": torch.randn(TOKENS, heads).to(dtype) / 30,
        "block_table": cells,
        "query_start_loc": batch(SEQUENCES)[0],
        "seq_lens": batch(SEQUENCES)[1],
        "ratio": 4,
    }


def selection(dtype):
    call = indexer(dtype)
    call["weights"] = call["weights"].float()
    return call | {"max_seq_len": 303, "k": 5}


def coded_selection(codes, scale, dtype):
    """Any codes; the dtype only decides how many bits of them count."""
    call = selection(dtype)
    q, keys = ((torch.randn_like(call[n].float()) * 9).to(codes) for n in ("q", "k_cache"))
    scales = torch.rand(TOKENS, 21).to(scale), torch.rand(keys.shape[:2]).to(scale)
    rest = {n: v for n, v in call.items() if n not in ("q", "k_cache")}
    first = {"q": q, "q_scale": scales[0], "k_cache": keys, "k_scale": scales[1]}
    return first | rest | {"weights": call["weights"].to(scale)}


def compressor(dtype, overlap=2):
    width = overlap * 20
    return {
        "x": torch.randn(TOKENS, 50).to(dtype),
        "wkv": torch.randn(width, 50).to(dtype),
        "wgate": torch.randn(width, 50).to(dtype),
        "ape": torch.randn(4, width),
        "state_cache": torch.randn(1 + 3 * 38, BLOCK, 2 * width),
        "state_block_table": table(3, 304, first=1),
        "query_start_loc": batch(SEQUENCES)[0],
        "seq_lens": batch(SEQUENCES)[1],
        "max_seq_len": 303,
        "head_dim": 20,
    }


def alone(call, token, tables):
    """The call of one of its tokens."""
    sequence = int(torch.searchsorted(call["query_start_loc"][1:], token, right=True))
    end = int(call["query_start_loc"][sequence + 1])
    position = int(call["seq_lens"][sequence]) - end + token
    tokens = [n for n in ("q", "q_scale", "weights", "cmp_indices", "x") if call.get(n) is not None]
    return (
        call
        | {name: call[name][token : token + 1] for name in tokens}
        | {name: call[name][sequence : sequence + 1] for name in tables}
        | {"query_start_loc": ints(0, 1), "seq_lens": ints(position + 1)}
    )


CALLS = {
    "sparse_attention": (attention, ("window_block_table", "cmp_block_table")),
    "indexer_scores": (indexer, ("block_table",)),
    "indexer_topk": (lambda dtype: indexer(dtype) | {"k": 30}, ("block_table",)),
    "lightning_indexer": (selection, ("block_table",)),
    "lightning_indexer_int8": (
        partial(coded_selection, torch.int8, torch.float16),
        ("block_table",),
    ),
    "lightning_indexer_fp8": (
        partial(coded_selection, torch.float8_e4m3fn, torch.float32),
        ("block_table",),
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_a_token_depends_on_itself_alone(isa, name, dtype):
    make, tables = CALLS[name]
    call, op = make(dtype), OPERATORS[name]
    together = op(**call)
    for token in range(TOKENS):
        assert torch.equal(op(**alone(call, token, tables)), together[token : token + 1])


@pytest.mark.parametrize("heads", [1, 8, 31, 33, 64])
def test_a_head_depends_on_itself_alone(isa, heads):
    call = attention(torch.bfloat16, heads=64, dim=17)
    some = call | {"q": call["q"][:, :heads], "sink": call["sink"][:heads]}
    assert torch.equal(ATTEND(**some), ATTEND(**call)[:, :heads])


@pytest.mark.parametrize("name", [*CALLS, "compress_pool"])
def test_threads_change_no_bit(isa, name):
    call = (compressor if name == "compress_pool" else CALLS[name][0])(torch.bfloat16)
    if name == "compress_pool":  # enough work for two threads
        call |= {n: call[n].repeat(20, 1) for n in ("wkv", "wgate")}
        call |= {"ape": call["ape"].repeat(1, 20), "head_dim": 400}
        call |= {"state_cache": call["state_cache"].repeat(1, 1, 20)}

    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(OPERATORS[name](**call))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_of_a_chunk_leave_the_state_of_single_steps(isa, dtype):
    call = compressor(dtype)
    chunk, steps = call["state_cache"].clone(), call["state_cache"].clone()
    POOL(**call | {"state_cache": chunk})
    for token in range(TOKENS):
        POOL(**alone(call, token, ("state_block_table",)) | {"state_cache": steps})
    assert torch.equal(chunk, steps)


@pytest.mark.parametrize("value", NONSENSE)
def test_nonsense_in_tables_is_never_an_address(isa, value):
    with dispatch.use("strict", check_contents=False):
        for operator, (make, _) in CALLS.items():
            call, op = make(torch.bfloat16), OPERATORS[operator]
            for name in ("window_block_table", "cmp_block_table", "cmp_indices", "block_table"):
                if name in call:
                    op(**call | {name: torch.full_like(call[name], value)})
            for name in ("query_start_loc", "seq_lens"):
                op(**call | {name: torch.full_like(call[name], value)})
        call = compressor(torch.bfloat16)
        for name in ("state_block_table", "query_start_loc", "seq_lens"):
            POOL(**call | {name: torch.full_like(call[name], value)})
        cache = torch.zeros(2, 3, 4)
        WRITE(cache, torch.ones(2, 4), torch.tensor([value, 2**62 if value > 0 else -(2**62)]))
        assert not cache.any()
        TOPK(torch.randn(2, 9), ints(value, value), 4)


def test_without_a_block_there_is_no_key(isa):
    call = attention(torch.float32)
    nowhere = torch.full_like(call["window_block_table"], -1)
    with dispatch.use("strict", check_contents=False):
        got = ATTEND(**call | {"window_block_table": nowhere})
        with dispatch.use("reference", check_contents=False):
            want = ATTEND(**call | {"window_block_table": nowhere})
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 511, 512, 700, 3000])
@pytest.mark.parametrize("order", ["random", "rising", "falling", "few values"])
def test_topk_of_long_rows(isa, k, order):
    scores = torch.randn(3, 2500)
    if order == "rising":
        scores = scores.sort(1).values
    elif order == "falling":
        scores = scores.sort(1, descending=True).values
    elif order == "few values":
        scores = scores.round()
    visible = ints(2500, 1234, 513)
    for dtype in DTYPES:
        got = TOPK(scores.to(dtype), visible, k)
        with dispatch.use("reference"):
            assert torch.equal(got, TOPK(scores.to(dtype), visible, k))


@pytest.mark.parametrize("entries", [2047, 2049, 20000])
def test_selection_over_spans_of_entries_is_exact(isa, entries):
    cells = torch.randperm(-(-entries // 16))[None].int()
    keys, q = torch.randn(cells.numel(), 16, 8), torch.randn(2, 3, 8)
    weights, length = torch.randn(2, 3), entries * 2 + 1
    rest = (cells, ints(0, 2), ints(length), length, 2)
    got = SELECT(q, keys, weights, *rest, 300)
    rows = keys[cells[0].long()].flatten(0, 1)[:entries].double()
    dots = (q.double() @ rows.T).relu() * weights.double()[:, :, None]
    for row, scores in zip(got, dots.sum(1), strict=True):
        assert len(set(row.tolist())) == 300
        assert scores[row.long()].min() >= scores.topk(300).values[-1] - 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entries", [1, 2047, 2049, 20000])
@pytest.mark.parametrize("tokens", [1, 9, 70])
def test_choice_in_one_step_is_that_of_stored_scores(isa, dtype, entries, tokens):
    cells = torch.randperm(-(-entries // 16))[None].int()
    length = entries * 2 + 1
    tokens = min(tokens, length)
    call = {
        "q": torch.randn(tokens, 3, 8).to(dtype),
        "k_cache": torch.randn(cells.numel(), 16, 8).to(dtype),
        "weights": torch.randn(tokens, 3).to(dtype),
        "block_table": cells,
        "query_start_loc": ints(0, tokens),
        "seq_lens": ints(length),
        "ratio": 2,
    }
    visible = ((torch.arange(length - tokens, length) + 1) // 2).int()
    scores = SCORES(**call)
    for k in (1, 300, 30000):
        assert torch.equal(CHOOSE(**call, k=k), TOPK(scores, visible, k))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_among_the_scores_of_a_choice_is_an_error(isa, dtype):
    call = indexer(dtype) | {"k": 5}
    undefined = call["q"].clone()
    undefined[[6, 8], 3, 2] = torch.nan
    undefined[[3, 4], 3, 2] = torch.nan  # which see no entry
    want = r"'q': found NaN among the scores of token 6, expected queries, keys and weights whose"
    with pytest.raises(ArgumentError, match=want):
        CHOOSE(**call | {"q": undefined})
    others = CHOOSE(**call)
    others[[6, 8]] = -1
    for policy in ("strict", "reference"):
        with dispatch.use(policy, check_contents=False):
            assert torch.equal(CHOOSE(**call | {"q": undefined}), others)


def test_every_code_of_a_key_counts(isa):
    """The keys' order is that of their values: one channel, and a query of 1."""
    for codes, name in ((torch.int8, "int8"), (torch.float8_e4m3fn, "fp8")):
        keys = torch.arange(256, dtype=torch.uint8).view(codes).float()
        keys = keys[keys > 0].view(-1, 1, 1)
        scale = torch.float16 if name == "int8" else torch.float32
        ones = torch.ones(len(keys), 1, dtype=scale)
        rest = torch.arange(len(keys))[None].int(), ints(0, 1), ints(len(keys)), len(keys), 1
        q = torch.ones(1, 1, 1).to(codes)
        for k in range(1, len(keys)):
            got = OPERATORS[f"lightning_indexer_{name}"](
                q, ones[:1], keys.to(codes), ones, ones[:1], *rest, k
            )
            assert set(got[0].tolist()) == set(keys.flatten().topk(k).indices.tolist())


@pytest.mark.parametrize("form", ["kv_epilog", "indexer_int8", "indexer_token_fp8"])
def test_bytes_outside_of_the_slots_stay(isa, form):
    channels, rope = (96, (16,)) if form == "kv_epilog" else (24, ())
    write, read = OPERATORS[f"write_cache_{form}"], OPERATORS[f"read_cache_{form}"]
    entry = {"kv_epilog": 128, "indexer_int8": 26, "indexer_token_fp8": 28}[form]
    memory = torch.randint(0, 256, (3, 4 * entry + 5), dtype=torch.uint8)
    before, pages = memory.clone(), memory[:, 2:-3]
    with dispatch.use("strict", check_contents=False):
        write(pages, torch.randn(4, channels), torch.tensor([-1, 12, -(2**62), 2**62]), 4, *rope)
        assert torch.equal(memory, before)
        none = read(pages, torch.tensor([-1, 12, 2**62]), 4, channels, *rope)
    assert not none.any()
    rows = torch.randn(2, channels)
    write(pages, rows, torch.tensor([5, 2]), 4, *rope)
    assert torch.equal(memory[2], before[2])
    assert torch.equal(memory[:, :2], before[:, :2])
    assert torch.equal(memory[:, -3:], before[:, -3:])
    near = read(pages, torch.tensor([5, 2]), 4, channels, *rope)
    torch.testing.assert_close(near, rows, rtol=0.07, atol=0.03)


def test_a_cache_is_written_whatever_the_dtype_and_the_strides(isa):
    for dtype in (*DTYPES, torch.float64):
        pages = torch.zeros(3, 7, 11, dtype=dtype)
        rows = torch.randn(4, 9, dtype=dtype)[:, 2:7]
        WRITE(pages[:, 1:5, 3:8], rows, torch.tensor([11, -1, 0, 4]))
        for slot, row in ((11, 0), (0, 2), (4, 3)):
            assert torch.equal(pages[slot // 4, 1 + slot % 4, 3:8], rows[row])
        assert pages.count_nonzero() == 15


def test_wrong_arguments_are_refused_before_anything_is_written():
    call = compressor(torch.bfloat16)
    state = call["state_cache"].clone()
    with dispatch.use("strict"), pytest.raises(ArgumentError, match="state_block_table"):
        POOL(**call | {"state_block_table": torch.zeros_like(call["state_block_table"])})
    assert torch.equal(call["state_cache"], state)


@pytest.mark.parametrize(
    ("name", "call", "reason"),
    [
        ("sparse_attention", attention(torch.float64), "q is float64"),
        ("indexer_scores", indexer(torch.float64), "q is float64"),
        ("compress_pool", compressor(torch.float64), "x is float64"),
    ],
)
def test_what_the_kernels_leave_to_the_reference(name, call, reason):
    answer = dispatch.support(name, *call.values())
    assert not answer
    assert reason in answer.reason


def test_gradients_come_from_the_reference():
    call = attention(torch.float32)
    call["q"].requires_grad_()
    dispatch.forget_ran()
    ATTEND(**call).sum().backward()
    assert dispatch.ran()["sparse_attention", "cpu"] == {"reference": 1}
    assert call["q"].grad.abs().sum() > 0
