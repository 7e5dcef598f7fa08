"""The attention operators that CANN 9.1 has for DeepSeek V4, on the software device."""

import pytest
from processes import run

from softnpu import SOCS


@pytest.mark.parametrize("soc", SOCS)
def test_attention_operators_equal_their_documents(soc):
    code, output = run("v4_attention.py", soc=soc, cann="9.1.0")
    assert code == 0 and "attention of V4: 0 problems" in output, output


def test_a_cann_before_9_1_has_none_of_them():
    code, output = run("v4_attention.py", "absent", soc=SOCS[2], cann="9.0.0")
    assert code == 0 and "attention of V4: 0 problems" in output, output
