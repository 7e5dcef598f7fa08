"""Expert dispatch and combination (spec/v4.md 5.3)."""

from __future__ import annotations

import torch

from dsv4_backend.contract import Tolerance, compute, operator
from dsv4_backend.relations import distinct, require

MAX_EXPERTS = 1 << 16
"""More than any V4 has by far (384): a larger number is a mistake,
and the offsets would only waste memory.
"""

CHOSEN = require("ids", "k >= 1", "shape {sizes(ids)}", "at least 1 expert per token")
"""Of ids [T, k], which experts a token has."""


@operator(
    "moe_dispatch(Tensor x, Tensor ids, int num_experts) -> "
    "(Tensor rows, Tensor expert_offsets, Tensor order)",
    rows=(20,),
    arguments={
        "x": "float|e4m3|e8m0 [...]",
        "ids": "int [T, k] in [0, num_experts)",
        "num_experts": f"1 to {MAX_EXPERTS}",
    },
    relations=(
        CHOSEN,
        require(
            "x",
            "rank(x) >= 1 and size(x, 0) == T",
            "shape {sizes(x)}",
            "[T, ...] with T = {T} as in ids",
        ),
    ),
    tolerance=Tolerance(reason="copies and integers: bit equality"),
)
def moe_dispatch(
    x: torch.Tensor, ids: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each token's row once per chosen expert, sorted by expert;
    rows of one expert in order of (token, j).

    x: [T, ...] of any float, e4m3 or e8m0 dtype (activations or their scales); ids: [T, k] int in
    [0, num_experts). Returns rows [T*k, ...] in x's dtype; expert_offsets int32 [E+1], expert e
    owning rows offsets[e] .. offsets[e+1]-1; order int32 [T*k], the flat index t*k+j of each row,
    which `moe_combine` undoes. Experts nobody chose get no rows. Zero tokens give zero rows and all
    offsets 0. Gradients reach x. Source: spec/v4.md 5.3.
    """
    flat = ids.flatten()
    sorted_ids, order = flat.sort(stable=True)
    experts = torch.arange(num_experts + 1, device=flat.device, dtype=flat.dtype)
    return x[order // ids.shape[1]], torch.searchsorted(sorted_ids, experts).int(), order.int()


def sum_choices(choices: torch.Tensor) -> torch.Tensor:
    """[T, k, d] -> [T, d], added in the order of the choices."""
    total = choices[:, 0].clone()
    for j in range(1, choices.shape[1]):
        total = total + choices[:, j]
    return total


@operator(
    "moe_combine(Tensor y, Tensor order, int k) -> Tensor",
    rows=(20,),
    arguments={"y": "float [M, d]", "order": "int [M] in [0, M)", "k": f"1 to {MAX_EXPERTS}"},
    relations=(
        require("y", "M % k == 0", "{M} rows", "a multiple of k = {k}"),
        distinct("order", "a permutation of 0..{M - 1}"),
    ),
    tolerance=Tolerance(
        reason="the order of the fp32 additions is promised, so every bit is decided"
    ),
)
def moe_combine(y: torch.Tensor, order: torch.Tensor, k: int) -> torch.Tensor:
    """Sum over each token's k expert outputs: row i belongs to token `order[i] // k`,
    choice `order[i] % k`.

    y: [M, d] float, M = T*k rows in dispatch order; order: [M] int, the permutation from
    `moe_dispatch`; k >= 1. Returns fp32 [T, d], added in the order j = 0 .. k-1 in fp32 whatever
    expert came first, so that the bits do not depend on the other tokens of the batch. Zero rows
    give an empty result. Source: spec/v4.md 5.3 [OFF-M MoE].
    """
    return sum_choices(compute(y[order.argsort()]).unflatten(0, (-1, k)))
