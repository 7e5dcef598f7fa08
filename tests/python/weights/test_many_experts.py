"""What a layer of 256 experts costs the host beside its operators: nothing per expert."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsv4_ascend.bench.small_moe import beside_operators, one_token, small_moe
from dsv4_ascend.model.profile import IDEAL, OFFICIAL


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
        layer = small_moe(experts, profile)
        with torch.inference_mode(), Counting() as mode:
            layer(*one_token(profile))
        counts.append(mode.counts)
    assert sum(counts[0].values()) >= 15
    assert counts[0] == counts[1]


def test_the_measured_layer_runs_all_but_its_operators():
    layer = small_moe(256)
    with torch.inference_mode():
        whole = layer(*one_token())
        call = beside_operators(layer)
        with Counting() as mode:
            got = call()
    assert torch.equal(got, whole)
    with torch.inference_mode(), Counting() as full:
        layer(*one_token())
    assert 0 < sum(mode.counts.values()) < sum(full.counts.values()) / 2
