"""How cache parts are declared, and in which blocks, by the interface that this vLLM has.

vLLM tells rows that hold several tokens by `tokens_per_state`; vLLM 0.27, which vllm-ascend builds
on, by `compress_ratio`. vllm-ascend's runner shapes caches of its own two classes alone, and plans
memory by pages: those of entries of CSA and of HCA have to be equal, others may be smaller.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from dsv4_ascend.integrations.serving import BLOCKS, Blocks, CachePart, ascend_blocks
from dsv4_ascend.integrations.vllm.versions import unfit
from dsv4_backend.errors import ArgumentError

try:
    from vllm.config import VllmConfig
    from vllm.platforms import current_platform
    from vllm.v1.kv_cache_interface import (
        KVCacheSpec,
        MLAAttentionSpec,
        SlidingWindowMLASpec,
    )
except ImportError as error:
    raise unfit(error) from error

ASCEND_ROWS = 32, 64, 128
"""Rows of a page of vllm-ascend: its --block-size."""


class Declared(NamedTuple):
    """Classes for parts that keep all tokens and for those that keep some, and what their fields
    are called. ratio: tokens of a row. whole: fields that say caches are whole on every rank.
    """

    full: type[KVCacheSpec]
    windowed: type[KVCacheSpec]
    ratio: str
    whole: dict[str, Any]


def on_ascend() -> bool:
    """Whether this vLLM runs on vllm-ascend's platform."""
    return str(current_platform.device_type) == "npu"


def _declared() -> Declared:
    full, windowed = MLAAttentionSpec, SlidingWindowMLASpec
    if on_ascend():
        try:
            from vllm_ascend.core import kv_cache_interface as ascend
        except ImportError as error:
            raise unfit(error) from error
        full, windowed = ascend.AscendMLAAttentionSpec, ascend.AscendSlidingWindowMLASpec
    fields = full.__dataclass_fields__
    if "tokens_per_state" in fields:
        return Declared(
            full, windowed, "tokens_per_state", {"max_tp_shards": 1, "dcp_sharded": False}
        )
    if "compress_ratio" in fields:
        return Declared(full, windowed, "compress_ratio", {})
    raise unfit("MLAAttentionSpec.tokens_per_state or compress_ratio")


_DECLARED = _declared()


def spec_of(part: CachePart) -> KVCacheSpec:
    """What vLLM has to know of a part."""
    common: dict[str, Any] = {
        "block_size": part.block,
        "num_kv_heads": 1,
        "head_size": part.width,
        "dtype": part.dtype,
        **_DECLARED.whole,
    }
    if part.window is None:
        return _DECLARED.full(**common, **{_DECLARED.ratio: part.tokens})
    return _DECLARED.windowed(**common, sliding_window=part.window)


def blocks_of(config: VllmConfig) -> Blocks:
    """Of this start: on vllm-ascend pages of --block-size rows."""
    if not on_ascend():
        return BLOCKS
    rows = config.cache_config.block_size
    if rows not in ASCEND_ROWS:
        raise ArgumentError(f"--block-size: found {rows}, expected one of {ASCEND_ROWS}")
    return ascend_blocks(rows)
