"""How ranks are found, what layout they get, and how they end together."""

from __future__ import annotations

import os
import re
import signal
import time
from contextlib import nullcontext

import pytest
import torch
from rank_processes import fork_ranks, on_ranks

from dsv4_ascend.model import watch
from dsv4_ascend.model.parallel import ALONE, PeerFault
from dsv4_ascend.model.ranks import connected, layout_of, local_device, ranks_started
from dsv4_backend.errors import ArgumentError, EnvironmentFault

STARTED = {
    "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1",
}  # fmt: skip


def test_without_a_launcher_nothing_is_connected():
    assert ranks_started({}) == ranks_started({"RANK": "0", "WORLD_SIZE": "1"}) == 1
    with connected() as parallel:
        assert parallel is ALONE
    assert local_device("npu", {}) == "npu"


def test_a_process_uses_the_npu_of_its_place_on_the_host():
    assert ranks_started(STARTED) == 4
    assert local_device("npu", STARTED) == "npu:1"
    assert local_device("npu:3", STARTED) == "npu:3"
    assert local_device("cpu", STARTED) == "cpu"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"LOCAL_RANK": "", "MASTER_PORT": ""}, "LOCAL_RANK, MASTER_PORT: not set while RANK or"),
        ({"RANK": "one"}, "RANK: found 'one', expected a number"),
        ({"RANK": "4"}, "RANK: found 4, expected less than WORLD_SIZE 4"),
    ],
)
def test_variables_that_no_launcher_sets_are_named(changes, said):
    with pytest.raises(EnvironmentFault, match=re.escape(said)):
        ranks_started(STARTED | changes)


@pytest.mark.parametrize(
    ("world", "options", "layout"),
    [
        (1, {}, (1, 1, 1)),
        (1, {"tp": 1, "dp": 1}, (1, 1, 1)),
        (8, {}, (8, 8, 1)),
        (8, {"tp": 2}, (2, 8, 4)),
        (8, {"dp": 8}, (1, 8, 8)),
        (8, {"dp": 2}, (4, 8, 2)),
        (8, {"tp": 1, "dp": 1}, (1, 8, 1)),
        (8, {"ep": 1}, (8, 1, 1)),
        (8, {"tp": 2, "ep": 4, "dp": 4}, (2, 4, 4)),
    ],
)
def test_what_is_not_given_divides_as_much_as_it_can(world, options, layout):
    found = layout_of(world, **options)
    assert (found.tp, found.ep, found.dp) == layout
    assert found.world == world


def test_one_process_is_told_how_to_start_more():
    with pytest.raises(ArgumentError, match="--tp: found 2 and one process, expected 4 of them: "):
        layout_of(1, tp=2, dp=2)
    with pytest.raises(ArgumentError, match="torchrun --nproc-per-node 8 -m dsv4_ascend"):
        layout_of(1, ep=8)


@pytest.mark.parametrize("options", [{"tp": 3}, {"dp": 3}, {"ep": 3}, {"tp": 4, "dp": 4}])
def test_counts_that_no_layout_has_name_those_that_work(options):
    with pytest.raises(ArgumentError, match="what works with 4 ranks: --tp 4 --ep 4 --dp 1"):
        layout_of(4, **options)


def test_groups_of_ranks():
    """Each group's members by what they gather, in a layout with all kinds of groups."""

    def work(rank):
        with connected(tp=2, ep=4, dp=2) as parallel:
            mine = torch.tensor([rank])
            groups = parallel.tensor, parallel.same_tokens, parallel.experts, parallel.data
            total = parallel.tensor.all_reduce(torch.tensor([0.5 + rank], dtype=torch.bfloat16))
            sent = torch.arange(rank + 1)  # all of it to the last rank
            counts = [0, 0, 0, rank + 1]
            received = [1, 2, 3, 4] if rank == 3 else [0] * 4
            moved = parallel.experts.all_to_all(sent, counts, received).tolist()
            return [g.all_gather(mine).tolist() for g in groups], total.tolist(), moved

    found = on_ranks(4, work)
    for rank, (groups, total, moved) in enumerate(found):
        pair = [0, 1] if rank < 2 else [2, 3]
        assert groups == [pair, pair, [0, 1, 2, 3], [rank % 2, rank % 2 + 2]]
        assert total == [sum(pair) + 1]
        assert moved == ([0, 0, 1, 0, 1, 2, 0, 1, 2, 3] if rank == 3 else [])


def test_an_exchange_with_a_rank_that_has_left_names_it(monkeypatch):
    monkeypatch.setattr(watch, "_PATIENCE", 0.1)

    def work(rank):
        said = "all_reduce with ranks 0: "
        with pytest.raises(PeerFault, match=said) if rank else nullcontext(), connected() as p:
            while rank:
                p.tensor.all_reduce(torch.zeros(1))

    on_ranks(2, work)


@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("busy", ["in an exchange", "on its own"])
def test_the_end_of_a_rank_ends_the_others(killed, busy, capfd):
    """Also of those that are not in an exchange with it, so that gloo does not tell them."""

    def work(rank):
        with connected() as parallel:
            if rank == killed:
                time.sleep(0.2)
                os.kill(os.getpid(), signal.SIGKILL)
            while busy == "in an exchange":
                parallel.tensor.all_reduce(torch.zeros(1))
            time.sleep(60)

    started = fork_ranks(2, work)
    began = time.monotonic()
    for process, _ in started:
        process.join(10)
    assert time.monotonic() - began < 10
    other = 1 - killed
    assert started[killed][0].exitcode == -signal.SIGKILL
    assert started[other][0].exitcode == 3
    said = f"dsv4-ascend: rank {other} of 2: rank {killed} has ended before its work was done\n"
    assert said in capfd.readouterr().err
