"""Our launchers on the software device: arithmetic, signatures, order, capture, failures."""

import re

import pytest
from processes import run

from dsv4_backend import OPERATORS
from softnpu import SOCS

QUEUES = ["0", "1", "2"]
NORM = "aclnnRmsNorm"


def launchers(part, soc=SOCS[0], **options):
    code, output = run("launchers.py", part, soc=soc, cann="9.1.0", **options)
    assert code == 0, output
    return output


@pytest.mark.parametrize("soc", SOCS)
def test_every_case_fits_on_every_chip(soc):
    launched = dict(
        re.findall(r"^(\w+): (\d+) of \d+ cases launched", launchers("parity", soc), re.MULTILINE)
    )
    assert int(launched["rms_norm"]) == len(list(OPERATORS["rms_norm"].iterate_cases()))
    assert int(launched["hc_post"]) > 0
    assert (int(launched["hc_pre"]) > 0) == ("950" in soc)


def test_signatures_are_those_of_the_device():
    assert "signatures agree" in launchers("signatures")


@pytest.mark.parametrize("queue", QUEUES)
def test_launches_keep_the_order_of_the_stream(queue):
    assert "0 of 40 rounds wrong" in launchers("order", variables={"TASK_QUEUE_ENABLE": queue})


@pytest.mark.parametrize("queue", ["0", "1"])
def test_a_captured_launch_replays(queue):
    assert "3 replays right" in launchers("graph", variables={"TASK_QUEUE_ENABLE": queue})


@pytest.mark.parametrize("queue", QUEUES)
def test_a_refusal_of_phase_1_is_an_error_of_the_call(queue):
    planned = f"{NORM}GetWorkspaceSize:1:561002"
    assert "refused, then right" in launchers(
        "refused", fail=planned, variables={"TASK_QUEUE_ENABLE": queue}
    )


def test_a_failing_launch_is_an_error_of_the_call():
    planned = f"{NORM}:1:361001"
    assert "failed, then right" in launchers(
        "failed", fail=planned, variables={"TASK_QUEUE_ENABLE": "0"}
    )


def test_other_machines_can_be_asked_about():
    assert "answer for other machines" in launchers("candidates")
