"""DeepSeek V4 as vLLM runs it: our network over vLLM's caches."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from vllm.config import VllmConfig

from dsv4_ascend.integrations.serving import Share, cache_parts, parts_here
from dsv4_ascend.integrations.vllm.caches import PartLayers
from dsv4_ascend.integrations.vllm.options import check_options, folder_of, profile_of
from dsv4_ascend.integrations.vllm.parallel import parallel_of
from dsv4_ascend.integrations.vllm.specs import blocks_of
from dsv4_ascend.model.model import chip_of
from dsv4_ascend.weights.linear import Linear
from dsv4_backend import dispatch
from dsv4_backend.errors import ArgumentError

_log = logging.getLogger("vllm.dsv4_ascend")


class Shared(torch.nn.Module):
    """Where vLLM looks for an embedding that a draft may share with its target."""

    def __init__(self, embed_tokens: Linear) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens


class Served(torch.nn.Module):
    """A share of the network, its caches as vLLM's layers, and its weights. Hidden states are the
    streams flattened, [rows, hc_mult * d]: drafts take them as they are.
    """

    drafts = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        check_options(vllm_config)
        self.device = torch.device(vllm_config.device_config.device)
        folder = folder_of(vllm_config.model_config)
        profile, parallel = profile_of(vllm_config), parallel_of(vllm_config)
        self._share = Share(folder, profile, parallel, chip_of(self.device), self.drafts)
        self.network = self._share.network
        self.streams = self.network.config.hc_mult
        parts = cache_parts(self.network.share, profile, blocks_of(vllm_config))
        self.caches = PartLayers(parts_here(parts, self.network))
        self.model, self.lm_head = Shared(self.network.embed), self.network.head
        for note in self._share.notes if parallel.leads else ():
            _log.info("%s: %s", folder, note)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Ids [T] -> [T, d]."""
        network = self.network
        return network.vocabulary.embed(input_ids, network.embed.weight, 1).squeeze(1)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Map the folder's files, whatever `weights` would give; the names of all parameters."""
        self._share.load(self.device)
        return {name for name, _ in self.named_parameters()}


class V4ForCausalLM(Served):
    """The layers and the head."""

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: object = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Ids int [rows] -> streams [rows, hc_mult * d]; positions follow from the tables."""
        if input_ids is None or inputs_embeds is not None:
            raise ArgumentError("forward: found embeddings, expected ids, which route experts")
        with dispatch.use(check_contents=False):
            step = self.caches.step(self.network, input_ids)
            return self.network.run_layers(*step).flatten(1)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Streams [T, hc_mult * d] -> logits fp32 [T, V]."""
        return self.network.logits(hidden_states.unflatten(1, (self.streams, -1)))

    def get_mtp_target_hidden_states(self) -> None:
        """Nothing beside what `forward` gives: vLLM's runners take that, at its width."""
