"""The model whose ranks on NPUs exchange rows by MC2."""

import pytest
from processes import long, run

from softnpu import SOCS


@pytest.mark.parametrize(
    ("soc", "profile"),
    [
        pytest.param(SOCS[1], "a2a3-int8", marks=long),
        pytest.param(SOCS[1], "bf16", marks=long),
        pytest.param(SOCS[2], "a5-mx", marks=long),
    ],
)
def test_rows_travel_by_dispatch_and_combine(soc, profile):
    code, output = run("mc2_ranks.py", profile, ranks=2, soc=soc)
    assert code == 0 and output.count("from one CPU, good") == 2, output
