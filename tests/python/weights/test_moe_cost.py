"""What a layer of 256 experts costs the host beside its operators: nothing per expert."""

import time
from collections import Counter

import pytest
import torch
from tiny_networks import CONFIG
from torch.utils._python_dispatch import TorchDispatchMode

from dsv4_ascend.model.profile import IDEAL, OFFICIAL
from dsv4_ascend.model.small_moe import SIZE, small_moe
from dsv4_backend.contract import Operator

CALLS = 100


def token(profile=OFFICIAL):
    return torch.ones(1, SIZE, dtype=profile.dtype), torch.zeros(1, dtype=torch.int64)


class Counting(TorchDispatchMode):
    """Counts every tensor operation."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("profile", [IDEAL, OFFICIAL], ids=lambda profile: profile.name)
def test_more_experts_make_no_more_operations(profile):
    counts = []
    for experts in (8, 256):
        layer = small_moe(CONFIG, experts, profile)
        with torch.inference_mode(), Counting() as mode:
            layer(*token(profile))
        counts.append(mode.counts)
    assert sum(counts[0].values()) >= 15
    assert counts[0] == counts[1]


@torch.inference_mode()
def seconds_beside_operators(layer, monkeypatch):
    """The fastest of CALLS calls at T = 1 with the results of all operators at hand."""
    results, call = [], Operator.__call__

    def record(operator, *args):
        results.append(call(operator, *args))
        return results[-1]

    monkeypatch.setattr(Operator, "__call__", record)
    layer(*token())
    seconds = []
    for _ in range(CALLS):
        known = iter(results)
        monkeypatch.setattr(Operator, "__call__", lambda operator, *args, known=known: next(known))
        x, ids = token()
        start = time.perf_counter()
        layer(x, ids)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def test_the_layer_itself_takes_no_time(monkeypatch):
    """0.06 ms where an addition takes 1.3 us; the limit leaves room for machines that run other things."""
    assert seconds_beside_operators(small_moe(CONFIG, 256), monkeypatch) < 0.3e-3
