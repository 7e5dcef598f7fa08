"""The V4 family's norms, products, quantisers and gates on the software device."""

import pytest
from processes import long, run

from softnpu import SOCS


@pytest.mark.parametrize(
    ("soc", "cann"),
    [
        *((soc, "9.1.0") for soc in SOCS),
        (SOCS[0], "8.5.0"),
        pytest.param(SOCS[2], "9.0.0", marks=long),
    ],
)
def test_operators_equal_their_documents(soc, cann):
    """With CANN 9.1, which has the family, and with one before it, which refuses it."""
    code, output = run("dense.py", soc=soc, cann=cann)
    assert code == 0 and "dense: 0 problems" in output, output
