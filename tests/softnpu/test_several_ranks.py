"""The model on several NPUs, over hccl."""

import pytest
from processes import long, run

from softnpu import SOCS


@pytest.mark.parametrize("soc", [pytest.param(soc, marks=long) for soc in SOCS])
def test_ranks_on_npus_give_what_one_cpu_gives(soc):
    code, output = run("several_ranks.py", ranks=2, soc=soc)
    assert code == 0 and output.count("good") == 2, output
