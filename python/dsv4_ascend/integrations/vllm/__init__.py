"""vLLM's way in: `register` is its general plugin (entry point group `vllm.general_plugins`).

vLLM calls it in every process, with every model. It names our classes by strings, imports none of
them, and does nothing with `DSV4_VLLM=0` in the environment, where vLLM's own class serves
DeepSeek V4. What is missing for ours is an error when a V4 model starts, never before
(docs/serving.md).
"""

from __future__ import annotations

import os

SWITCH = "DSV4_VLLM"
"""Environment variable: 0 leaves vLLM as it is."""

MODEL = "dsv4_ascend.integrations.vllm.model:V4ForCausalLM"
DRAFT = "dsv4_ascend.integrations.vllm.draft:V4Draft"
OWN = "Dsv4ForCausalLM"
"""Our own name of the architecture, which no other plugin claims."""

ARCHITECTURES = {"DeepseekV4ForCausalLM": MODEL, "DeepSeekV4MTPModel": DRAFT, OWN: MODEL}


def register() -> None:
    """Claim DeepSeek V4's architectures in vLLM's registry; may be called again."""
    if os.environ.get(SWITCH) == "0":
        return
    from vllm import ModelRegistry

    from dsv4_ascend.integrations.vllm import quantization

    for name, place in ARCHITECTURES.items():
        ModelRegistry.register_model(name, place)
    quantization.register()
