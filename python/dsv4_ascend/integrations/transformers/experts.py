"""The experts function "dsv4" of transformers' registry, on our dispatch, products and SwiGLU."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dsv4_ascend.integrations.transformers.seams import NAME
from dsv4_backend.errors import UnsupportedError
from dsv4_backend.ops.gemm import grouped_gemm
from dsv4_backend.ops.moe import moe_combine, moe_dispatch
from dsv4_backend.ops.swiglu import swiglu


def forward(
    module: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Sum of each token's weighted experts: [T, d] in the dtype of hidden_states [T, d].

    top_k_index: int [T, k] in [0, E); top_k_weights: [T, k]; module: `DeepseekV4Experts` or of its
    form, gate_up_proj [E, 2m, d] and down_proj [E, d, m]. The weight multiplies before the second
    product, not behind it: rounding only. UnsupportedError for experts of another form.
    """
    _check(module)
    rows, offsets, order = moe_dispatch(hidden_states, top_k_index, module.num_experts)
    gate, up = grouped_gemm(rows, module.gate_up_proj, offsets).chunk(2, -1)
    weights = top_k_weights.float().flatten()[order.long()]
    hidden = swiglu(gate, up, weights, float(module.limit))
    out = grouped_gemm(hidden, module.down_proj, offsets)
    return moe_combine(out, order, top_k_index.shape[1]).to(hidden_states.dtype)


def _check(module: Any) -> None:
    """UnsupportedError, naming what this module has that V4's experts have not."""
    facts = {
        "a parallel plan of experts": getattr(module, "_is_expert_parallel", False),
        "biases": getattr(module, "has_bias", False),
        "transposed weights": getattr(module, "is_transposed", False),
        "interleaved gate and up": not getattr(module, "is_concatenated", True),
        "a norm behind them": getattr(module, "has_post_expert_norm", False),
        "no gate": not getattr(module, "has_gate", True),
        "no clamp (`limit`)": not hasattr(module, "limit"),
        "an activation that is not SiLU": not _is_silu(getattr(module, "act_fn", None)),
    }
    found = [name for name, holds in facts.items() if holds]
    if found:
        raise UnsupportedError(
            f"experts {NAME!r} are DeepSeek V4's; {type(module).__name__} has {', '.join(found)}: "
            'use experts_implementation="eager" or "grouped_mm"'
        )


def _is_silu(activation: object) -> bool:
    return isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"
