"""torch.distributed with backend hccl over shared memory."""

import re

import pytest
from processes import long, run

from softnpu import SOCS


@pytest.mark.parametrize(
    ("ranks", "soc"),
    [
        (2, SOCS[0]),
        pytest.param(4, SOCS[1], marks=long),
        pytest.param(3, SOCS[2], marks=long),
    ],
)
def test_collectives(ranks, soc):
    code, output = run("collectives.py", ranks=ranks, soc=soc)
    assert code == 0 and output.count("good") == ranks, output


@pytest.mark.parametrize(
    ("ranks", "soc"),
    [pytest.param(*pair, marks=long) for pair in ((2, SOCS[0]), (4, SOCS[1]), (2, SOCS[2]))],
)
def test_what_users_call(ranks, soc):
    code, output = run("distributed.py", ranks=ranks, soc=soc)
    assert code == 0 and output.count("good") == ranks, output


CALLS = [
    "all_reduce",
    "message",
    "group",
    "broadcast",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "barrier",
]


@pytest.mark.parametrize(
    "call", [CALLS[0], *(pytest.param(call, marks=long) for call in CALLS[1:])]
)
def test_a_lost_rank_is_an_error(call):
    _, output = run("lost_rank.py", call, ranks=2, variables={"HCCL_CONNECT_TIMEOUT": "600"})
    assert "lost rank: noticed" in output and "NOT NOTICED" not in output, output
    assert re.search(r"rank 1 \(process \d+\) of communicator \S+ is gone", output), output


@pytest.mark.parametrize("how", [pytest.param(how, marks=long) for how in ("exit", "destroy")])
def test_a_rank_that_leaves_in_good_order_is_not_lost(how):
    code, output = run("leaving_rank.py", how, ranks=3)
    assert code == 0 and output.count("went on") == 2, output


REASONS = {
    "count": "ranks disagree on count: rank",
    "dtype": "ranks disagree on dtype",
    "call": "ranks disagree on the call",
    "uneven": "which expects",
    "message": "rank 1 sends 32 bytes to rank 0, which expects 16",
    "unreceived": "nobody has received a message of 16 bytes from rank 0 to rank 1",
    "fault": "failed on rank 0: HcclAllReduce: softnpu: injected fault",
}


# The other ones without torch: collectives_test.cpp.
CORE = ("count",)


@pytest.mark.parametrize(
    "case", [case if case in CORE else pytest.param(case, marks=long) for case in REASONS]
)
def test_ranks_that_disagree_all_learn_it(case):
    code, output = run("disagreeing_ranks.py", case, ranks=2)
    assert code == 0 and "NOT NOTICED" not in output and REASONS[case] in output, output
    assert output.count("learnt") == (2 if case == "unreceived" else 4), output


@long
def test_a_reduction_that_the_chip_has_not_is_refused():
    code, output = run("refused_reductions.py", ranks=2, variables={"TASK_QUEUE_ENABLE": "0"})
    assert code == 0 and output.count("good") == 2, output
