"""Values of arguments are read before a call, unless an engine vouches for them."""

import threading

import pytest
import torch

from dsv4_backend import dispatch
from dsv4_backend.errors import ArgumentError
from dsv4_backend.ops.attention import sparse_attention
from dsv4_backend.ops.cache import write_cache
from dsv4_backend.ops.embedding import embed_streams
from dsv4_backend.ops.gate import gate_hash
from dsv4_backend.ops.gemm import grouped_gemm
from dsv4_backend.ops.indexer import topk_indices
from dsv4_backend.ops.norm import rms_norm


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def attention(table, starts, ends):
    q, sink, pages = torch.ones(2, 1, 4), torch.zeros(1), torch.ones(3, 2, 4)
    return sparse_attention(q, sink, pages, table, None, None, None, starts, ends, 2, 0)


def cached(slots):
    pages = torch.zeros(2, 2, 1)
    write_cache(pages, torch.ones(len(slots), 1), torch.tensor(slots))
    return pages


def hashed(table):
    return gate_hash(torch.ones(1, 2), torch.ones(3, 2), ints(0), table, 1.0)


def first_row_of(pages):
    write_cache(pages, torch.ones(1, 1), torch.tensor([0]))


# Calls with a value that a check refuses, by what torch makes of it unchecked.
REFUSED = {
    "a slot twice": lambda: cached([1, 1]),
    "a slot below -1": lambda: cached([-2]),
    "NaN among scores": lambda: topk_indices(torch.full((1, 3), torch.nan), ints(3), 2),
    "offsets that end early": lambda: attention(ints(0, 1).view(1, 2), ints(0, 1), ints(2)),
    "an absent block": lambda: attention(ints(-1).view(1, 1), ints(0, 2), ints(2)),
    "an id outside": lambda: embed_streams(ints(5), torch.ones(5, 2), 1),
    "a slot outside": lambda: cached([4]),
    "a block outside": lambda: attention(ints(3).view(1, 1), ints(0, 2), ints(2)),
    "an expert outside": lambda: hashed(torch.tensor([[3]])),
}
GROUPED = {
    "outside": ints(0, 400, 3),
    "one too many": ints(0, 1, 4),
    "falling": ints(0, -1, 3),
    "ending early": ints(0, 2, 2),
    "beginning late": ints(1, 2, 3),
    "extreme": ints(-(2**31), 2**31 - 1, -(2**31)),
}
OUTSIDE = [name for name in REFUSED if "outside" in name or "early" in name]


@pytest.mark.parametrize("name", REFUSED)
def test_values_are_checked(name):
    with pytest.raises(ArgumentError):
        REFUSED[name]()


@pytest.mark.parametrize("name", [name for name in REFUSED if name not in OUTSIDE])
def test_unchecked_values_are_taken_as_they_are(name):
    with dispatch.use(check_contents=False):
        REFUSED[name]()


@pytest.mark.parametrize("name", OUTSIDE)
def test_references_do_not_read_outside_a_tensor_unchecked(name):
    with (
        dispatch.use("reference", check_contents=False),
        pytest.raises((IndexError, RuntimeError), match="out of"),
    ):
        REFUSED[name]()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: rms_norm(torch.ones(2, 3), torch.ones(4), 1e-6), "weight"),
        (lambda: rms_norm(torch.ones(2, 3), torch.ones(3), -1.0), "eps"),
        (lambda: write_cache(torch.zeros(2, 2, 1), torch.ones(1, 1), ints(0)), "slots"),
        (lambda: first_row_of(torch.zeros(1, 2, 1).expand(2, 2, 1)), "cache"),
        (lambda: first_row_of(torch.zeros(0, 2, 1)), "cache"),
        (lambda: attention(ints(0).view(1, 1), ints(0, 1, 2), ints(2)), "query_start_loc"),
    ],
)
def test_shapes_dtypes_numbers_and_memory_are_always_checked(call, words):
    with dispatch.use(check_contents=False), pytest.raises(ArgumentError, match=words):
        call()


def is_checked():
    try:
        REFUSED["a slot twice"]()
    except ArgumentError:
        return True
    return False


def test_checks_come_back_after_the_block_and_after_an_error():
    with dispatch.use(check_contents=False):
        assert not is_checked()
        with dispatch.use(check_contents=True):
            assert is_checked()
        assert not is_checked()
    assert is_checked()
    with pytest.raises(IndexError), dispatch.use(check_contents=False):
        raise IndexError
    assert is_checked()


def test_policies_inside_keep_the_choice():
    with dispatch.use(check_contents=False):
        for policy in dispatch.POLICIES:
            with dispatch.use(policy):
                rms_norm(torch.ones(2, 8), torch.ones(8), 1e-6)
        with dispatch.use("reference"):
            assert not is_checked()


def test_the_policy_in_force_stays():
    with dispatch.use("strict", only="rms_norm/portable"), dispatch.use(check_contents=False):
        dispatch.forget_ran()
        rms_norm(torch.ones(2, 8), torch.ones(8), 1e-6)
    assert dispatch.ran()["rms_norm", "cpu"] == {"rms_norm/portable": 1}
    with dispatch.use("reference"), dispatch.use(check_contents=False):
        dispatch.forget_ran()
        rms_norm(torch.ones(2, 8), torch.ones(8), 1e-6)
    assert dispatch.ran()["rms_norm", "cpu"] == {"reference": 1}


def test_the_choice_belongs_to_a_thread():
    found = []
    with dispatch.use(check_contents=False):
        thread = threading.Thread(target=lambda: found.append(is_checked()))
        thread.start()
        thread.join()
    assert found == [True]


@pytest.mark.parametrize("inside", [{"check_contents": False}, {}])
def test_checking_on_a_device_what_is_unchecked_is_a_contradiction(inside):
    outer = dispatch.use(check_contents=False)
    inner = dispatch.use(check_on_device=True, **inside)
    with outer, pytest.raises(ValueError, match="check_on_device"), inner:
        pass
    with dispatch.use(check_on_device=True), dispatch.use(check_contents=False):
        assert not is_checked()


@pytest.mark.parametrize("offsets", GROUPED.values(), ids=GROUPED)
def test_kernels_write_each_row_once_whatever_the_offsets(offsets):
    """Rows of no expert are zero; the others are those of some expert."""
    x, weight = torch.randn(3, 4), torch.randn(2, 5, 4)
    with dispatch.use("strict", check_contents=False):
        rows = grouped_gemm(x, weight, offsets)
    by_expert = torch.einsum("tk,enk->etn", x, weight)
    for row, mine in zip(rows, by_expert.unbind(1), strict=True):
        candidates = [torch.zeros(5), *mine]
        assert any(torch.allclose(row, one, atol=1e-5) for one in candidates)
