"""Written arguments whose memory is other arguments' too, and caches that only look like it."""

import pytest
import torch

from dsv4_backend import OPERATORS
from dsv4_backend.errors import ArgumentError


def pages_of_one_buffer(place, dtype=torch.float32):
    """Two caches [3, 2, 4] whose pages lie in the blocks of one buffer, the other's at `place`."""
    buffer = torch.zeros(3, 24, dtype=dtype)
    views = [buffer[:, at : at + 8].unflatten(1, (2, 4)) for at in (4, place)]
    return buffer, *views, torch.ones(2, 4, dtype=dtype), torch.full((2, 4), 2, dtype=dtype)


@pytest.mark.parametrize("place", [12, 13, 16])
def test_pages_that_alternate_in_one_buffer_are_apart(place):
    buffer, cache, other, rows, other_rows = pages_of_one_buffer(place)
    OPERATORS["write_caches"](cache, other, rows, other_rows, torch.tensor([5, 0]))
    want = torch.zeros(3, 24)
    want[0, 4:8] = want[2, 8:12] = 1
    want[0, place : place + 4] = want[2, place + 4 : place + 8] = 2
    assert torch.equal(buffer, want)


@pytest.mark.parametrize("place", [0, 3, 4, 11])
def test_pages_of_one_buffer_that_meet_are_refused(place):
    buffer, cache, other, rows, other_rows = pages_of_one_buffer(place)
    with pytest.raises(ArgumentError, match="found memory of 'cache'"):
        OPERATORS["write_caches"](cache, other, rows, other_rows, torch.tensor([5, 0]))
    assert not buffer.any()


def test_pages_that_reach_into_the_next_block_are_refused():
    buffer = torch.zeros(64)
    cache = buffer.as_strided((2, 2, 4), (24, 4, 1), 4)
    other = buffer.as_strided((2, 2, 4), (24, 12, 1), 16)  # its second row lies in the next block
    rows = torch.ones(1, 4)
    with pytest.raises(ArgumentError, match="found memory of 'cache'"):
        OPERATORS["write_caches"](cache, other, rows, rows, torch.tensor([0]))
