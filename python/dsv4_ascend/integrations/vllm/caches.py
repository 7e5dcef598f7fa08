"""Cache parts as layers of vLLM, and the tables that it gives back.

Each part is a layer without computation whose specification says what it keeps; vLLM's own
scheduler owns the blocks, so that prefix caching, preemption and admission are its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from dsv4_ascend.integrations.serving import CachePart, StepTables, layer_caches, scratch_step
from dsv4_ascend.integrations.vllm.specs import spec_of
from dsv4_ascend.integrations.vllm.versions import unfit
from dsv4_ascend.model.step import Step
from dsv4_ascend.model.transformer import Transformer
from dsv4_backend.errors import UnsupportedError

try:
    from vllm.config import VllmConfig, get_current_vllm_config
    from vllm.forward_context import get_forward_context
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.v1.attention.backend import (
        AttentionBackend,
        AttentionImplBase,
        AttentionMetadataBuilder,
        CommonAttentionMetadata,
        MultipleOf,
    )
    from vllm.v1.kv_cache_interface import KVCacheSpec
except ImportError as error:
    raise unfit(error) from error

if TYPE_CHECKING:
    from vllm.v1.kv_cache_layout import KVCacheLayout


@dataclass
class Tables:
    """Metadata of one part in one step: the step, and the blocks int32 [R, columns]."""

    step: StepTables
    blocks: torch.Tensor


class TablesBuilder(AttentionMetadataBuilder[Tables]):
    """Hands vLLM's tables on as they are."""

    def __init__(
        self,
        kv_cache_spec: KVCacheSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Tables:
        """See vLLM's."""
        given = common_attn_metadata
        step = StepTables(
            given.query_start_loc,
            given.seq_lens,
            given.num_actual_tokens,
            given.max_query_len,
            given.max_seq_len,
        )
        return Tables(step, given.block_table_tensor)


class PartBackend(AttentionBackend):
    """The "attention" of a cache part: only its tables and its place in memory."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        """See vLLM's."""
        return "DSV4_CACHE_PART"

    @staticmethod
    def get_impl_cls() -> type[AttentionImplBase]:
        """None: the network computes attention."""
        raise UnsupportedError("vllm: a cache part of dsv4-ascend computes nothing by itself")

    @staticmethod
    def get_builder_cls() -> type[TablesBuilder]:
        """See vLLM's."""
        return TablesBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> list[int | MultipleOf]:
        """Any: operators take any number of rows per block."""
        return [MultipleOf(1)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Blocks outermost: pages of different sizes are then packed, and blocks keep their sizes.

        In others vLLM makes all pages as large as the largest by larger blocks: prefixes would be
        found every 16,384 tokens.
        """
        from vllm.v1.kv_cache_layout import KVCacheLayout

        return (KVCacheLayout.BLNHC, KVCacheLayout.BLHNC)

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """See vLLM's, before layouts had names; block_size: rows."""
        return num_blocks, block_size, head_size

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """See vLLM's, before layouts had names: blocks outermost."""
        return (1, 0, 2, 3) if include_num_layers_dimension else (0, 1, 2)


class PartLayer(torch.nn.Module, AttentionLayerBase):
    """A cache part in vLLM's list of layers."""

    kv_cache: Any
    """What vLLM bound: one tensor, which vllm-ascend puts into lists."""

    def __init__(self, part: CachePart) -> None:
        super().__init__()
        self.part = part

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """See vLLM's."""
        return spec_of(self.part)

    def get_attn_backend(self) -> type[AttentionBackend]:
        """See vLLM's."""
        return PartBackend

    @property
    def pages(self) -> torch.Tensor:
        """[num_blocks, rows, width], strided between blocks; vLLM's may have one head, before or
        behind the rows.
        """
        found = self.kv_cache
        while not isinstance(found, torch.Tensor):
            (found,) = found
        return found if found.dim() == 3 else found.squeeze(1 if found.shape[1] == 1 else 2)


class PartLayers(torch.nn.Module):
    """The cache parts of a network, made known to vLLM in their order."""

    def __init__(self, parts: Iterable[CachePart]) -> None:
        super().__init__()
        self._layers = {part: PartLayer(part) for part in parts}
        known = get_current_vllm_config().compilation_config.static_forward_context
        for part, layer in self._layers.items():
            known[part.key] = layer

    def step(self, network: Transformer, input_ids: torch.Tensor) -> Step:
        """What vLLM's metadata says of this forward pass; a step of nobody's where there is none,
        as when memory is measured.
        """
        found = get_forward_context().attn_metadata
        if found is None:
            return scratch_step(network, input_ids)
        metadata = {part: found[part.key] for part in self._layers}
        step = next(iter(metadata.values())).step
        pages = {part: layer.pages for part, layer in self._layers.items()}
        tables = {part: of.blocks for part, of in metadata.items()}
        return Step(step.batch(input_ids), layer_caches(self._layers, pages, tables))
