"""Expert routing by score and by token hash (spec/v4.md 5.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dsv4_backend.contract import Tolerance, compute, operator
from dsv4_backend.relations import looked_up_in, require

_TOLERANCE = Tolerance(
    reason="fp32 dot products of up to 7168 terms in any order keep a logit to 1e-6 of the sum of "
    "its absolute terms, softplus and root do not widen that; the inputs are upcast, so "
    "both profiles share one limit. Ids are exact: the cases keep scores either equal by "
    "exact arithmetic or further apart than that",
    ideal=(1e-7, 1e-5),
    official=(1e-7, 1e-5),
)
_ROUTE_SCALE = "a finite number > 0 that fp32 holds"
_ROUTER = {"x": "float [T, d]", "weight": "float [E, d]", "route_scale": _ROUTE_SCALE}
_BY_SCORE = {**_ROUTER, "bias": "f32 [E]", "k": "1 to E"}
_BY_TABLE = {**_ROUTER, "input_ids": "int [T] in [0, V)", "tid2eid": "int [V, k]"}
_TABLE = (
    require("tid2eid", "k >= 1", "0 experts per token", "at least 1"),
    looked_up_in("tid2eid", "input_ids", "0", "E", "values in [0, {E})"),
)


def sqrt_softplus(logits: torch.Tensor) -> torch.Tensor:
    """`sqrt(ln(1 + e^l))`, the identity inside the root above 20; float in, same dtype out."""
    return F.softplus(logits).sqrt()


def expert_scores(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Scores `[T, E]` of every expert for x `[T, d]` and weight `[E, d]`, both upcast first."""
    wide = compute(x)
    return sqrt_softplus(wide @ weight.to(wide.dtype).T)


def select_largest(values: torch.Tensor, k: int) -> torch.Tensor:
    """Indices int64 `[T, k]` of the k largest of `[T, E]`,
    best first, ties smaller index first, NaN largest.
    """
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def normalise(scores: torch.Tensor, ids: torch.Tensor, route_scale: float) -> torch.Tensor:
    """Scores `[T, E]` gathered at ids `[T, k]`, divided by their sum, times route_scale."""
    chosen = scores.gather(1, ids)
    return chosen / chosen.sum(-1, keepdim=True) * route_scale


@operator(
    "gate_topk(Tensor x, Tensor weight, Tensor bias, int k, float route_scale) -> "
    "(Tensor weights, Tensor ids)",
    rows=(18,),
    arguments=_BY_SCORE,
    tolerance=_TOLERANCE,
)
def gate_topk(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, k: int, route_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k experts with the largest `sqrt(softplus(W x)) + bias`,
    weighted by their score without the bias.

    x: [T, d] float; weight: [E, d] float; bias: [E] fp32, used for the selection only; 1 <= k <= E;
    route_scale: > 0. Returns weights fp32 [T, k], `route_scale * s_j / sum_j s_j` with no epsilon,
    and ids int32 [T, k], best first. x and weight are upcast to fp32 and everything is fp32 from
    there. Ties take the smaller expert id. A NaN score counts as the largest; if all chosen scores
    are 0 (logits below -100) the weights are NaN. Zero tokens give an empty result. Gradients reach
    x and weight through the gathered scores, never the bias. Source: spec/v4.md 5.1 [OFF-M Gate].
    """
    return _route(expert_scores(x, weight), bias, k, route_scale)


def _route(
    scores: torch.Tensor, bias: torch.Tensor, k: int, route_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    ids = select_largest(scores.detach() + bias, k)
    return normalise(scores, ids, route_scale), ids.int()


@operator(
    "gate_hash(Tensor x, Tensor weight, Tensor input_ids, Tensor tid2eid, float route_scale) "
    "-> (Tensor weights, Tensor ids)",
    rows=(18,),
    arguments=_BY_TABLE,
    relations=_TABLE,
    tolerance=_TOLERANCE,
)
def gate_hash(
    x: torch.Tensor,
    weight: torch.Tensor,
    input_ids: torch.Tensor,
    tid2eid: torch.Tensor,
    route_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k experts that the table gives to each token id, weighted by their score.

    x: [T, d] float; weight: [E, d] float; input_ids: [T] int, token ids in [0, V); tid2eid: [V, k]
    int, expert ids in [0, E) in the rows that are looked up; route_scale: > 0. Returns weights fp32
    [T, k],
    `route_scale * s_j / sum_j s_j` with `s = sqrt(softplus(W x))` in fp32 and no epsilon, and ids
    int32 [T, k] in the table's order; a repeated expert counts as often as it stands there. There
    is no bias. If all chosen scores are 0 (logits below -100) the weights are NaN. Zero tokens give
    an empty result. Source: spec/v4.md 5.1 [OFF-M Gate].
    """
    ids = tid2eid[input_ids].long()
    return normalise(expert_scores(x, weight), ids, route_scale), ids.int()


LOGIT_UNIT, SCORE_UNIT = 4096.0, 64.0
"""What the folded gates divide logits and scores by: powers of two, the second the first's root."""


def fold_gate(
    weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of a gate as `gate_topk_folded` and `gate_hash_folded` take them; exact."""
    return weight / LOGIT_UNIT, None if bias is None else bias / SCORE_UNIT


def unfolded_scores(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`expert_scores` for a folded weight."""
    wide = compute(x)
    return sqrt_softplus(wide @ weight.to(wide.dtype).T * LOGIT_UNIT)


@operator(
    "gate_topk_folded(Tensor x, Tensor weight, Tensor bias, int k, float route_scale) -> "
    "(Tensor weights, Tensor ids)",
    rows=(18,),
    arguments=_BY_SCORE,
    tolerance=_TOLERANCE,
)
def gate_topk_folded(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, k: int, route_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gate_topk` of a weight divided by 4096 and a bias divided by 64 (`fold_gate`).

    Arguments and results as there. The division is exact, so are weights and ids those of
    `gate_topk`. CANN's gate of A2 and A3 knows the sigmoid: softplus with beta 4096 of the folded
    logit, its root and logit() are what it takes, without a further product. Source: spec/v4.md 5.1
    [OFF-M Gate], spec/ascend-operators.md 4.13.
    """
    return _route(unfolded_scores(x, weight), bias * SCORE_UNIT, k, route_scale)


@operator(
    "gate_hash_folded(Tensor x, Tensor weight, Tensor input_ids, Tensor tid2eid, "
    "float route_scale) -> (Tensor weights, Tensor ids)",
    rows=(18,),
    arguments=_BY_TABLE,
    relations=_TABLE,
    tolerance=_TOLERANCE,
)
def gate_hash_folded(
    x: torch.Tensor,
    weight: torch.Tensor,
    input_ids: torch.Tensor,
    tid2eid: torch.Tensor,
    route_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gate_hash` of a weight divided by 4096 (`fold_gate`).

    Arguments and results as there, with the same values, as the division is exact. Source:
    spec/v4.md 5.1 [OFF-M Gate], spec/ascend-operators.md 4.13.
    """
    ids = tid2eid[input_ids].long()
    return normalise(unfolded_scores(x, weight), ids, route_scale), ids.int()
