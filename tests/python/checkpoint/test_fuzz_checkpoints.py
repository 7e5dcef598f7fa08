"""Thousands of mutated checkpoint folders: a typed error or a correct load,
nothing else happens (R14, R15).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COUNT = 1000


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.long)])
def test_mutated_folders(seed):
    script = Path(__file__).with_name("fuzz_checkpoints.py")
    helpers = script.parents[1] / "model"
    done = subprocess.run(
        [sys.executable, script, str(COUNT), str(seed)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(helpers)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["events"] == {}
    assert sum(result["outcome"].values()) == COUNT
    assert (
        min(result["outcome"][kind] for kind in ("loaded", "ConfigError", "CheckpointError"))
        > COUNT // 30
    )
    assert result["grown_mb"] < 64
    assert result["slowest"] < 5
