"""Every native CPU kernel in every instruction set that this machine runs, against its contract."""

import pytest

from dsv4_ascend.parity.runner import samples
from dsv4_backend import OPERATORS, dispatch

KERNELS = sorted(name for name, device in dispatch.native_kernels() if device == "cpu")
# Why a kernel may leave a case to the reference.
REASONS = ("float64", "not contiguous", "not adjacent", "is rounded to o's dtype first")


def refusal(operator, isa, arguments):
    """Why the kernel of that instruction set (or of any) does not take the arguments, or None."""
    answers = {a.name: a.reason for a in dispatch.candidates(operator, *arguments)}
    return answers.get(f"{operator}/{isa}", answers[f"{operator}/portable"])


@pytest.mark.parametrize("name", KERNELS)
def test_contract_cases(isa, name):
    operator, ran = OPERATORS[name], 0
    with dispatch.use("auto"):  # what makes a case may have no kernel
        of_contract = list(samples(operator))
    for sample in of_contract:
        reason = refusal(name, isa, sample.case.arguments)
        if reason is not None:
            assert any(known in reason for known in REASONS), f"{sample.name}: {reason}"
            continue
        result = sample.run(operator)
        assert result.ok, f"{sample.name}: {result.detail}"
        ran += 1
    assert ran > 0
