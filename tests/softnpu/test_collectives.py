"""torch.distributed with backend hccl over shared memory."""

import pytest
from processes import long, run

from dsv4_backend.softnpu import SOCS


@pytest.mark.parametrize(("ranks", "soc"), [(2, SOCS[0]), (4, SOCS[1]), pytest.param(3, SOCS[2], marks=long)])
def test_collectives(ranks, soc):
    code, output = run("collectives.py", ranks=ranks, soc=soc)
    assert code == 0 and output.count("good") == ranks, output


CALLS = ["all_reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all", "barrier"]


@pytest.mark.parametrize("call", [CALLS[0], *(pytest.param(call, marks=long) for call in CALLS[1:])])
def test_a_lost_rank_is_an_error(call):
    _, output = run("lost_rank.py", call, ranks=2, timeout=120)
    assert "lost rank: noticed" in output and "NOT NOTICED" not in output and "is gone" in output, output


REASONS = {
    "count": "ranks disagree on count: rank",
    "dtype": "ranks disagree on dtype",
    "call": "ranks disagree on the call",
    "uneven": "which expects",
    "message": "rank 1 sends 32 bytes to rank 0, which expects 16",
    "fault": "failed on rank 0: HcclAllReduce: softnpu: injected fault",
}


@pytest.mark.parametrize("case", REASONS)
def test_ranks_that_disagree_all_learn_it(case):
    code, output = run("disagreeing_ranks.py", case, ranks=2, timeout=120)
    assert code == 0 and "NOT NOTICED" not in output and REASONS[case] in output, output
    assert output.count("learnt") == 4 - (case == "message"), output
