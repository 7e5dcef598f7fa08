"""The gate behind every tolerance: each named fault
of each contract is caught by a case of that contract.
"""

import pytest
import torch

from dsv4_ascend.parity.faults import MUTANTS, hunt, run_faults, run_mutants
from dsv4_ascend.parity.mutants import mutants
from dsv4_ascend.parity.report import reproduce
from dsv4_backend import OPERATORS
from dsv4_backend.faults import OUTPUT_FAULTS

every_operator = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)


@every_operator
def test_every_fault_is_caught(operator):
    results = list(run_faults(operator))
    survivors = [f for f in results if not f.killed]
    assert not survivors, "\n".join(f"{f.name}  $ {reproduce(f)}" for f in survivors)
    # A fault is told from the reference by its values, not by an error.
    crashed = [f for f in results if f.raised]
    assert not crashed, "\n".join(f"{f.name}: {f.how}" for f in crashed)


@every_operator
def test_faults_know_the_operator(operator):
    assert sum(not of_output(name) for name in operator.faults) >= 4


def of_output(fault):
    return fault.rpartition(": ")[2] in OUTPUT_FAULTS


@every_operator
def test_every_output_has_its_faults_or_a_reason_why_not(operator):
    outputs = len(getattr(torch.ops.dsv4, operator.name).default._schema.returns)
    assert sum(map(of_output, operator.faults)) + len(operator.left_out) == outputs * len(
        OUTPUT_FAULTS
    )
    assert all(len(why.split()) >= 3 for why in operator.left_out.values())


@every_operator
def test_a_fault_that_a_case_catches_is_not_left_out(operator):
    left_out = operator.left_out_faults()
    assert not [result.fault for result in hunt(operator, left_out) if result.killed]


@every_operator
def test_automatic_mutants_of_the_reference_are_caught(operator):
    results = list(run_mutants(operator))
    assert len(results) >= 10
    survivors = [f.fault for f in results if not f.killed]
    assert not survivors, "\n".join(survivors)
    assert len(results) <= MUTANTS


@every_operator
def test_explained_mutants_exist(operator):
    names = {mutant.name for mutant in mutants(operator)}
    functions = {f"{name.partition(':')[0]}: *" for name in names}
    assert set(operator.equivalents) <= names | functions
    assert all(operator.equivalents.values())


def test_number_of_faults():
    assert sum(len(op.faults) for op in OPERATORS.values()) >= 650
