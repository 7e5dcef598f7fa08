"""The network: blocks under hyper-connections, the head, the multi-token-prediction block.
spec/v4.md 2, 5, 8.1.

Module paths equal the official checkpoint names (spec section 7), so a weight is found by its name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from dsv4_ascend.checkpoint.config import V4Config
from dsv4_ascend.model.attention import Attention
from dsv4_ascend.model.batch import Batch
from dsv4_ascend.model.expert_parallel import experts_of
from dsv4_ascend.model.paged import LayerCache
from dsv4_ascend.model.parallel import ALONE, Parallel
from dsv4_ascend.model.profile import Profile
from dsv4_ascend.model.sharding import attention_share
from dsv4_ascend.model.vocabulary import vocabulary_of
from dsv4_ascend.weights.activations import UNQUANTISED
from dsv4_ascend.weights.experts import Experts
from dsv4_ascend.weights.formats import Chosen
from dsv4_ascend.weights.linear import Linear, RMSNormWeight, SharedExpert, empty_parameter
from dsv4_backend import dispatch
from dsv4_backend.ops.gate import (
    fold_gate,
    gate_hash,
    gate_hash_folded,
    gate_topk,
    gate_topk_folded,
)
from dsv4_backend.ops.hyper import hc_post
from dsv4_backend.ops.mtp import mtp_combine
from dsv4_backend.ops.norm import rms_norm

_DONE, _LAYERS, _DRAFT = 0, 1, 2
"""What ranks that exchange rows agree on before each run; drafts count on by depth."""


class Gate(nn.Module):
    """Router: by score with a selection bias,
    or by token id (`tid2eid`) in the first num_hash_layers layers (5.1).
    """

    def __init__(self, config: V4Config, hashed: bool) -> None:
        super().__init__()
        self.k, self.route_scale = config.num_experts_per_tok, config.routed_scaling_factor
        self.weight = empty_parameter(config.n_routed_experts, config.hidden_size)
        self.by_table, self.by_score = gate_hash, gate_topk
        if hashed:
            table = torch.empty(config.vocab_size, self.k, dtype=torch.int64, device="meta")
            self.tid2eid = nn.Parameter(table, requires_grad=False)
        else:
            self.bias = empty_parameter(config.n_routed_experts)
        self.hashed = hashed

    def forward(
        self, x: torch.Tensor, input_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """X [T, d] -> weights fp32 [T, k], expert ids int32 [T, k]."""
        if self.hashed:
            return self.by_table(x, self.weight, input_ids, self.tid2eid, self.route_scale)
        return self.by_score(x, self.weight, self.bias, self.k, self.route_scale)

    def folding_saves(self) -> bool:
        """Whether the device makes both forms by the same function, around which the folded form
        launches less; where the plain form has a function of its own, that takes logits as they
        are.
        """
        x, ids = self.weight[:1], self.weight.new_zeros(1, dtype=torch.int64)
        call: tuple[torch.Tensor | int | float, ...]
        if self.hashed:
            names = "gate_hash", "gate_hash_folded"
            call = x, self.weight, ids, self.tid2eid, self.route_scale
        else:
            names = "gate_topk", "gate_topk_folded"
            call = x, self.weight, self.bias, self.k, self.route_scale
        answers = [dispatch.support(name, *call) for name in names]
        functions = {answer.reason.partition("/")[2] if answer else "" for answer in answers}
        return len(functions) == 1

    def fold(self) -> None:
        """Divide weight and bias as the folded gates take them, with the same results."""
        weight, bias = fold_gate(self.weight, None if self.hashed else self.bias)
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)
        self.by_table, self.by_score = gate_hash_folded, gate_topk_folded


class MoE(nn.Module):
    """Routed experts plus the shared expert (5)."""

    def __init__(
        self, config: V4Config, hashed: bool, profile: Profile, parallel: Parallel = ALONE
    ) -> None:
        super().__init__()
        d, m = config.hidden_size, config.moe_intermediate_size
        here = config.n_routed_experts // parallel.layout.ep
        self.gate = Gate(config, hashed)
        self.across = experts_of(parallel)
        self.experts = Experts(here, d, m, profile.activations)
        self.shared_experts = SharedExpert(d, m, profile.activations)
        self.limit = config.swiglu_limit

    def forward(self, x: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """X [T, d] (normed) -> [T, d]."""
        chosen = Chosen(*self.gate(x, input_ids))
        return self.across.layer(self.experts, self.shared_experts, x, chosen, self.limit)

    def stand_by(self, x: torch.Tensor) -> None:
        """Take part in the layer without tokens: x [0, d]."""
        self.across.stand_by(self.experts, x, self.gate.k, self.limit)


class HeadOwner(nn.Module):
    """What collapses streams before the LM head,
    under checkpoint names (2.4): the network and each MTP block.
    """

    hc_head_fn: nn.Parameter
    hc_head_base: nn.Parameter
    hc_head_scale: nn.Parameter

    def add_head(self, config: V4Config, profile: Profile) -> None:
        """Add the collapse parameters and the final norm."""
        n, d = config.hc_mult, config.hidden_size
        self.hc_head_fn, self.hc_head_base = empty_parameter(n, n * d), empty_parameter(n)
        self.hc_head_scale = empty_parameter(1)
        self.norm, self.mixing = RMSNormWeight(d), profile.mixing
        self.hc_eps, self.norm_eps = config.hc_eps, config.rms_norm_eps

    def collapse(self, x: torch.Tensor) -> torch.Tensor:
        """Streams [T, n, d] -> normed hidden state [T, d], ready for the LM head."""
        y = self.mixing.head(
            x, self.hc_head_fn, self.hc_head_base, self.hc_head_scale, self.norm_eps, self.hc_eps
        )
        return rms_norm(y, self.norm.weight, self.norm_eps)


class Block(nn.Module):
    """Attention then MoE, each wrapped by hyper-connections (2.1)."""

    def __init__(
        self,
        config: V4Config,
        kind: str,
        ratio: int,
        hashed: bool,
        profile: Profile,
        parallel: Parallel,
    ) -> None:
        super().__init__()
        n, d = config.hc_mult, config.hidden_size
        self.attn = Attention(config, kind, ratio, profile, parallel)
        self.ffn = MoE(config, hashed, profile, parallel)
        self.attn_norm, self.ffn_norm = RMSNormWeight(d), RMSNormWeight(d)
        mixes = n * (n + 2)
        for site in ("attn", "ffn"):
            self.register_parameter(f"hc_{site}_fn", empty_parameter(mixes, n * d))
            self.register_parameter(f"hc_{site}_base", empty_parameter(mixes))
            self.register_parameter(f"hc_{site}_scale", empty_parameter(3))
        self.sinkhorn_iters, self.mixing = config.hc_sinkhorn_iters, profile.mixing
        self.hc_eps, self.norm_eps = config.hc_eps, config.rms_norm_eps

    def _pre(self, x: torch.Tensor, site: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        fn, base, scale = (getattr(self, f"hc_{site}_{part}") for part in ("fn", "base", "scale"))
        y, post, comb = self.mixing.pre(
            x, fn, base, scale, self.sinkhorn_iters, self.norm_eps, self.hc_eps
        )
        return rms_norm(y, getattr(self, f"{site}_norm").weight, self.norm_eps), post, comb

    def run(
        self, x: torch.Tensor, input_ids: torch.Tensor, cache: LayerCache, batch: Batch
    ) -> torch.Tensor:
        """Streams [T, n, d] -> [T, n, d]. input_ids route the hash layers."""
        y, post, comb = self._pre(x, "attn")
        x = hc_post(self.attn(y, cache, batch), x, post, comb)
        y, post, comb = self._pre(x, "ffn")
        return hc_post(self.ffn(y, input_ids), x, post, comb)


class MTPBlock(Block, HeadOwner):
    """Predicts the token after next from the next token's embedding
    and the main model's streams (8.1).
    """

    def __init__(
        self, config: V4Config, kind: str, ratio: int, profile: Profile, parallel: Parallel
    ) -> None:
        super().__init__(config, kind, ratio, hashed=False, profile=profile, parallel=parallel)
        d = config.hidden_size
        self.e_proj, self.h_proj = (Linear(d, d, profile.activations) for _ in range(2))
        self.enorm, self.hnorm = RMSNormWeight(d), RMSNormWeight(d)
        self.add_head(config, profile)

    def combine(self, embedded: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Embedded [T, d] of the next tokens,
        streams x [T, n, d] -> the block's input streams [T, n, d].
        """
        e = rms_norm(embedded, self.enorm.weight, self.norm_eps)
        h = rms_norm(x, self.hnorm.weight, self.norm_eps)
        hidden: torch.Tensor = self.h_proj(h.flatten(0, 1))
        return mtp_combine(self.e_proj(e), hidden.view(h.shape))


class Transformer(HeadOwner):
    """The network of `config` in `profile`, built on the meta device;
    weights are assigned by name (weights.py).

    parallel: this rank's share of it (sharding.py). share: `config` as attention and caches of this
    rank have it.
    """

    def __init__(self, config: V4Config, profile: Profile, parallel: Parallel = ALONE) -> None:
        super().__init__()
        self.config, self.profile, self.parallel = config, profile, parallel
        self.share = attention_share(config, parallel.layout)
        self.vocabulary = vocabulary_of(parallel)
        self.across = experts_of(parallel)
        self.add_head(config, profile)
        v, d, n_layers = config.vocab_size, config.hidden_size, config.num_hidden_layers
        rows = v // parallel.layout.tp
        self.embed, self.head = (Linear(rows, d, UNQUANTISED) for _ in range(2))
        shapes = list(zip(config.layer_kinds, config.compress_ratios, strict=True))
        self.layers = nn.ModuleList(
            Block(config, kind, ratio, i < config.num_hash_layers, profile, parallel)
            for i, (kind, ratio) in enumerate(shapes[:n_layers])
        )
        # DSpark's stages are not run yet.
        blocks = shapes[n_layers:] if config.dspark is None else []
        self.mtp = nn.ModuleList(
            MTPBlock(config, kind, ratio, profile, parallel) for kind, ratio in blocks
        )

    def run_layers(self, batch: Batch, layers: Sequence[LayerCache]) -> torch.Tensor:
        """Tokens of `batch` -> streams [rows, n, d] after the last layer, zeros behind the tokens.

        layers: the caches of the layers in order, updated in place; those of MTP blocks may follow.
        """
        self._join(_LAYERS, len(batch.positions))
        x = self.vocabulary.embed(batch.input_ids, self.embed.weight, self.config.hc_mult)
        x = x.to(self.profile.dtype)
        with batch.running():
            for block, layer_cache in zip(self.layers, layers[: len(self.layers)], strict=True):
                assert isinstance(block, Block)
                x = block.run(x, batch.input_ids, layer_cache, batch)
        return batch.padded(x)

    def run_mtp(
        self,
        depth: int,
        next_ids: torch.Tensor,
        x: torch.Tensor,
        batch: Batch,
        layers: Sequence[LayerCache],
    ) -> torch.Tensor:
        """One MTP block on streams x [rows, n, d] and the ids [rows] after them -> its streams.

        layers: the caches of all blocks, MTP blocks last, or of these alone.
        Zeros behind the tokens, as in `run_layers`.
        """
        self._join(_DRAFT + depth, len(batch.positions))
        block = self.mtp[depth]
        assert isinstance(block, MTPBlock)
        next_ids, x = batch.own_rows(next_ids), batch.own_rows(x)
        embedded = self.vocabulary.embed(next_ids, self.embed.weight, 1).squeeze(1).to(x.dtype)
        layer_cache = layers[depth - len(self.mtp)]
        with batch.running():
            x = block.run(block.combine(embedded, x), next_ids, layer_cache, batch)
        return batch.padded(x)

    def logits(self, x: torch.Tensor, depth: int | None = None) -> torch.Tensor:
        """Streams [T, n, d] -> logits fp32 [T, V];
        `depth` chooses the MTP block's own collapse and norm.
        """
        owner = self if depth is None else self.mtp[depth]
        assert isinstance(owner, HeadOwner)
        return self.vocabulary.logits(owner.collapse(x), self.head.weight)

    def finish(self) -> None:
        """Take part in what ranks with other tokens still run, until none of them has any left.

        Without it, a rank that has run its steps would be waited for in the next exchange.
        """
        self._join(_DONE, 0)

    def _join(self, wanted: int, tokens: int) -> None:
        while (kind := self.across.begin(wanted, tokens, self.embed.weight.device)) != wanted:
            none = self.embed.weight.new_zeros(0, self.config.hidden_size, dtype=self.profile.dtype)
            for block in self.layers if kind == _LAYERS else [self.mtp[kind - _DRAFT]]:
                assert isinstance(block, Block)
                block.ffn.stand_by(none)
