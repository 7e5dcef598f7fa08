"""What a start of vLLM asks for, and what of it our classes do: the rest is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig

from dsv4_ascend.checkpoint.kinds import declared_kinds
from dsv4_ascend.model.model import chosen_profile
from dsv4_ascend.model.profile import Profile
from dsv4_backend.errors import ArgumentError, UnsupportedError

SECTION = "dsv4"
"""Our part of `--additional-config`."""

_OVERRIDES = {"architectures"}
_LOADS_FILES = {"auto", "hf", "safetensors"}


def profile_of(config: VllmConfig) -> Profile:
    """`--additional-config '{"dsv4": {"profile": NAME}}'`, or the one that a converted folder is
    for, or the one that --dtype names.

    ArgumentError for other keys and names, or a profile of another dtype.
    """
    given = (config.additional_config or {}).get(SECTION, {})
    if not isinstance(given, dict) or given.keys() - {"profile"}:
        raise ArgumentError(
            f'--additional-config: found {SECTION!r}: {given!r:.80}, expected {{"profile": NAME}}'
        )
    name = given.get("profile")
    dtype = config.model_config.dtype
    if name is None and dtype not in (torch.bfloat16, torch.float32):
        raise ArgumentError(f"--dtype: found {dtype}, expected bfloat16 or float32")
    folder = folder_of(config.model_config)
    kinds = declared_kinds(folder)
    return chosen_profile(folder, kinds, name, None if name is None and kinds else dtype)


def folder_of(config: Any) -> Path:
    """The checkpoint's folder. config: vLLM's ModelConfig."""
    folder = Path(config.model)
    if not folder.is_dir():
        raise ArgumentError(
            f"--model: found {config.model!r:.80}, expected a folder; download it first, for "
            f"example with `hf download {config.model} --local-dir FOLDER`"
        )
    return folder


def check_options(config: VllmConfig) -> None:
    """UnsupportedError that names every option of this start that our classes do not do."""
    if wrong := list(_unsupported(config)):
        raise UnsupportedError(
            "dsv4-ascend in vLLM: " + "; ".join(wrong) + " (DSV4_VLLM=0 leaves DeepSeek V4 to "
            "vLLM's own class)"
        )


def _unsupported(config: VllmConfig) -> Iterator[str]:
    ranks, caches, spec = config.parallel_config, config.cache_config, config.speculative_config
    if config.lora_config is not None:
        yield "--enable-lora: found LoRA, expected none"
    for option in ("pipeline", "prefill-context", "decode-context"):
        count = getattr(ranks, f"{option.replace('-', '_')}_parallel_size", 1)
        if count > 1:
            yield f"--{option}-parallel-size: found {count}, expected 1"
    if ranks.data_parallel_size > 1:
        yield (
            f"--data-parallel-size: found {ranks.data_parallel_size}, expected 1; start one server "
            "for each data group"
        )
    for option in ("enable_eplb", "enable_dbo"):
        if getattr(ranks, option, False):
            yield f"--{option.replace('_', '-')}: found it, expected none"
    if caches.cache_dtype != "auto":
        yield (
            f"--kv-cache-dtype: found {caches.cache_dtype}, expected auto; byte caches come with a "
            """profile: --additional-config '{"dsv4": {"profile": "a2a3-int8"}}' or "a5-mx\""""
        )
    if config.scheduler_config.disable_hybrid_kv_cache_manager:
        yield "--disable-hybrid-kv-cache-manager: found it, expected none"
    if config.kv_transfer_config is not None:
        yield "--kv-transfer-config: found one, expected none; it has not been tried"
    if spec is not None and spec.method != "mtp":
        yield f"--speculative-config: found method {spec.method}, expected mtp"
    if spec is not None and not config.scheduler_config.enable_chunked_prefill:
        yield (
            "--speculative-config: found it without chunked prefill, which vLLM turns off on CPUs "
            "without AMX and then never schedules long prompts; set VLLM_MLA_DISABLE=1"
        )
    yield from _of_model(config)


def _of_model(config: VllmConfig) -> Iterator[str]:
    model, load = config.model_config, config.load_config
    if str(load.load_format) not in _LOADS_FILES:
        expected = ", ".join(sorted(_LOADS_FILES))
        yield f"--load-format: found {load.load_format}, expected one of {expected}"
    overrides = model.hf_overrides
    others = sorted(overrides.keys() - _OVERRIDES) if isinstance(overrides, dict) else []
    if others:
        yield (
            f"--hf-overrides: found {', '.join(others)}, expected {' or '.join(_OVERRIDES)} alone: "
            "the network reads the folder's config.json"
        )
    if not model.enforce_eager and torch.device(config.device_config.device).type != "cpu":
        yield "--enforce-eager: found none, expected it: steps are not captured as graphs yet"
