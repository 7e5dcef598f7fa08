"""torch.distributed with backend hccl over shared memory."""

import pytest
from processes import long, run

from dsv4_backend.softnpu import SOCS


@pytest.mark.parametrize(("ranks", "soc"), [(2, SOCS[0]), (4, SOCS[1]), pytest.param(3, SOCS[2], marks=long)])
def test_collectives(ranks, soc):
    code, output = run("collectives.py", ranks=ranks, soc=soc)
    assert code == 0 and output.count("good") == ranks, output


def test_a_lost_rank_is_an_error():
    _, output = run("lost_rank.py", ranks=2, timeout=120)
    assert "lost rank: noticed" in output and "NOT NOTICED" not in output, output
