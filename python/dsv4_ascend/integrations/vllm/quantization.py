"""The quantisation of V4 as vLLM is told of it: none of its business, our network has the formats.

Without it vLLM would build a configuration of its own for `fp8` checkpoints, and refuse fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

NAME = "dsv4"


class V4Quantization(QuantizationConfig):
    """Stands for the formats of a V4 checkpoint; gives vLLM no method for any layer."""

    def get_name(self) -> str:
        """See vLLM's."""
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Those of profiles."""
        return [torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """See vLLM's: of GPUs, which do not run it."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None beside config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> V4Quantization:
        """See vLLM's; the folder is read by the network."""
        return cls()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> None:
        """No layer of vLLM's is used."""

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """`dsv4` for models whose architecture our class owns, and for their drafts."""
        if user_quant == NAME:
            return NAME
        if user_quant is not None or getattr(hf_config, "model_type", None) != "deepseek_v4":
            return None
        return NAME if owns(getattr(hf_config, "architectures", None) or ()) else None


def owns(architectures: list[str] | tuple[str, ...]) -> bool:
    """Whether vLLM's registry has our model for the first of these names."""
    from vllm import ModelRegistry

    from dsv4_ascend.integrations.vllm import MODEL

    found = ModelRegistry.models.get(architectures[0]) if architectures else None
    return f"{getattr(found, 'module_name', '')}:{getattr(found, 'class_name', '')}" == MODEL


def register() -> None:
    """Tell vLLM of it, once."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    if NAME not in QUANTIZATION_METHODS:
        register_quantization_config(NAME)(V4Quantization)
