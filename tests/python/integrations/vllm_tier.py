"""Whether vLLM can be tested here, in the environment that ci/serve makes beside this one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from tier import lacking

REQUIRED = "VLLM_REQUIRED"
"""ci/test --long sets it: what is skipped here was then not tested at all."""

PYTHON = Path(os.environ.get("VLLM_PYTHON", Path(sys.prefix) / "vllm" / "bin" / "python"))
PROGRAMS = Path(__file__).parent / "programs"
ENVIRON = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_MLA_DISABLE": "1",
    "VLLM_PLUGINS": "dsv4",
}


def python() -> str:
    """vLLM's Python; without one the running test is skipped, or fails where it is required."""
    if PYTHON.is_file():
        return str(PYTHON)
    lacking(f"{PYTHON} is not there: ci/serve --install makes it", REQUIRED)


def run(program: str, question: Any, seconds: int = 300, **environ: str) -> Any:
    """The JSON behind ANSWER that a program of `programs` prints; workers print beside it."""
    command = [python(), str(PROGRAMS / f"{program}.py"), json.dumps(question)]
    done = subprocess.run(
        command,
        env={**os.environ, **ENVIRON, **environ},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    (answer,) = re.findall(r"^ANSWER (.+)$", done.stdout, re.MULTILINE)
    return json.loads(answer)
