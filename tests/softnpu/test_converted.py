"""Converted folders run through the launchers on softnpu with the CPU's tokens."""

import os
import subprocess
import sys

import pytest
import tier

from dsv4_ascend.convert.job import convert
from dsv4_ascend.convert.targets import TARGETS
from dsv4_ascend.tiny.release import SHIPPED

A3, A5 = "Ascend910_9382", "Ascend950PR_9579"


@pytest.mark.long  # docs/converting.md has a line that runs one of them in the default tier
@pytest.mark.parametrize(("target", "soc"), [("a2a3-int8", A3), ("a2a3-w4a8", A3), ("a5-mx", A5)])
def test_a_converted_folder_on_npu(tmp_path, target, soc):
    if what := tier.missing():
        tier.lacking(what)
    folder = tmp_path / target
    convert(SHIPPED, folder, TARGETS[target])
    command = [sys.executable, "-m", "dsv4_ascend"]
    line = ["generate", "--checkpoint", folder, "--temperature", "0", "--max-new-tokens", "12"]
    on_npu = [*command, "softnpu", "--soc", soc, "--", *command, *line, "--device", "npu"]
    texts = []
    for arguments in ([*command, *line], on_npu):
        environ = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            arguments, capture_output=True, text=True, env=environ, timeout=500, check=False
        )
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout)
    assert texts[0] == texts[1]
    assert len(texts[0]) > 8  # that of w4a8 ends early
