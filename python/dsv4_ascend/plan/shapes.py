"""Parameters and layers of a model by class, counted from the tensors its configuration implies."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from dsv4_ascend.checkpoint.config import V4Config
from dsv4_ascend.checkpoint.layout import layout

_CLASSES = {
    "q_a": r"\.attn\.wq_a\.",
    "q_b": r"\.attn\.wq_b\.",
    "kv": r"\.attn\.wkv\.",
    "o_a": r"\.attn\.wo_a\.",
    "o_b": r"\.attn\.wo_b\.",
    "compressor": r"\.attn\.compressor\.(wkv|wgate)\.",
    "index_compressor": r"\.indexer\.compressor\.(wkv|wgate)\.",
    "index_q": r"\.indexer\.wq_b\.",
    "index_w": r"\.indexer\.weights_proj\.",
    "gate": r"\.ffn\.gate\.weight",
    "shared": r"\.shared_experts\.",
    "experts": r"\.ffn\.experts\.",
    "mhc": r"(^|\.)hc_\w+$",
    "embed": r"^embed\.",
    "head": r"^head\.",
    "draft": r"\.[eh]_proj\.|\.main_proj\.|\.markov_head\.|\.confidence_head\.",
    "tables": r"\.tid2eid$",
}
"""Class -> names of its tensors. What none of them is counts as `norms`: norms, sinks, biases."""
_NAMES = {name: re.compile(pattern) for name, pattern in _CLASSES.items()}

CLASSES = (*_CLASSES, "norms")
SHARDED = ("q_b", "o_a", "o_b", "index_q", "index_w", "embed", "head")
"""What tensor parallelism divides (planner.md 2)."""
DENSE = (
    "q_a", "q_b", "kv", "o_a", "o_b", "compressor", "index_compressor", "index_q", "index_w",
    "gate", "shared",
)  # fmt: skip
"""Weights that every row of a step is multiplied with, layer by layer."""


@dataclass(frozen=True)
class Shapes:
    """main, draft: parameters by class of the model and of its draft blocks;
    csa, hca, swa: numbers of layers of each kind.
    """

    config: V4Config
    main: Mapping[str, int]
    draft: Mapping[str, int]
    csa: int
    hca: int
    swa: int

    @property
    def layers(self) -> int:
        """Layers without drafts."""
        return self.config.num_hidden_layers

    @property
    def can_draft(self) -> bool:
        """Whether MTP blocks can draft; DSpark's time is not modelled."""
        return bool(self.config.num_nextn_predict_layers) and self.config.dspark is None


@lru_cache(maxsize=8)
def shapes(config: V4Config) -> Shapes:
    """Count a configuration's tensors."""
    main: Counter[str] = Counter(dict.fromkeys(CLASSES, 0))
    draft: Counter[str] = Counter(dict.fromkeys(CLASSES, 0))
    for name, entry in layout(config).items():
        counted = draft if name.startswith("mtp.") else main
        counted[class_of(name)] += prod(entry.shape)
    kinds = Counter(config.layer_kinds[: config.num_hidden_layers])
    return Shapes(config, main, draft, kinds["csa"], kinds["hca"], kinds["swa"])


def class_of(name: str) -> str:
    """The class of a tensor's official name."""
    return next((one for one, pattern in _NAMES.items() if pattern.search(name)), "norms")
