"""Operators and runtime calls that torch_npu's and op-plugin's own public tests need."""

import pytest
from processes import run

from softnpu import SOCS


@pytest.mark.parametrize("soc", [SOCS[0], SOCS[2]])
def test_operators_equal_their_documents(soc):
    """On A2 with what torch_npu sends there over the graph-operator path, and on A5."""
    code, output = run("public_operators.py", soc=soc)
    assert code == 0 and "public: 0 problems" in output, output


def test_torch_npu_prints_no_warning_of_a_missing_cann():
    """Its import says nothing on stdout: the folders it looks for exist."""
    code, output = run("public_import.py", soc=SOCS[0])
    assert code == 0 and "ASCEND_HOME_PATH" not in output, output
