"""The gate behind every tolerance: each named fault of each contract is caught by a case of that contract."""

import pytest

from dsv4_ascend.parity.faults import run_faults
from dsv4_ascend.parity.report import reproduce
from dsv4_backend import OPERATORS
from dsv4_backend.mutants import EDITS

every_operator = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)


@every_operator
def test_every_fault_is_caught(operator):
    survivors = [f for f in run_faults(operator) if not f.killed]
    assert not survivors, "\n".join(f"{f.name}  $ {reproduce(f)}" for f in survivors)


@every_operator
def test_faults_are_caught_by_values_not_by_errors(operator):
    raised = [f for f in run_faults(operator) if f.raised]
    assert not raised, "\n".join(f"{f.name}: {f.how}" for f in raised)


@every_operator
def test_faults_know_the_operator(operator):
    assert len(set(operator.faults) - set(EDITS)) >= 4


def test_number_of_faults():
    assert sum(len(op.faults) for op in OPERATORS.values()) >= 400
