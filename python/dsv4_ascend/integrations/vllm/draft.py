"""The MTP block as vLLM's draft model."""

from __future__ import annotations

import torch
from vllm.config import VllmConfig

from dsv4_ascend.integrations.vllm.model import Served
from dsv4_backend import dispatch
from dsv4_backend.errors import ArgumentError, UnsupportedError


class V4Draft(Served):
    """MTP block 0, run again for every further draft. vLLM puts the target's embedding and head in
    place of its own.
    """

    drafts = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if not len(self.network.mtp):
            raise UnsupportedError(
                "--speculative-config: found method mtp, expected none: this checkpoint has no MTP "
                "block that runs here"
            )

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        intermediate_tensors: object = None,
        inputs_embeds: torch.Tensor | None = None,
        spec_step_idx: int = 0,
    ) -> torch.Tensor:
        """Ids int [rows] after those of the streams [rows, hc_mult * d] -> the block's streams."""
        if input_ids is None or inputs_embeds is not None:
            raise ArgumentError("forward: found embeddings, expected ids, which are embedded here")
        network = self.network
        network.embed, network.head = self.model.embed_tokens, self.lm_head  # the target's
        streams = hidden_states.unflatten(1, (self.streams, -1))
        with dispatch.use(check_contents=False):
            step = self.caches.step(network, input_ids)
            return network.run_mtp(0, input_ids, streams, *step).flatten(1)

    def compute_logits(self, hidden_states: torch.Tensor, spec_step_idx: int = 0) -> torch.Tensor:
        """Streams [T, hc_mult * d] -> logits fp32 [T, V]."""
        return self.network.logits(hidden_states.unflatten(1, (self.streams, -1)), depth=0)
