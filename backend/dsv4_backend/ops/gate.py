"""Expert routing by score and by token hash (spec/v4.md 5.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from dsv4_backend.contract import Case, Draw, Tolerance, compute, operator
from dsv4_backend.mutants import add_output_faults

_TOLERANCE = Tolerance(
    reason="fp32 dot products of up to 7168 terms in any order keep a logit to 1e-6 of the sum of its absolute terms, "
    "softplus and root do not widen that; the inputs are upcast, so both profiles share one limit. Ids are exact: "
    "the cases keep scores either equal by exact arithmetic or further apart than that",
    ideal=(1e-7, 1e-5),
    official=(1e-7, 1e-5),
)


def sqrt_softplus(logits: torch.Tensor) -> torch.Tensor:
    """`sqrt(ln(1 + e^l))`, the identity inside the root above 20; float in, same dtype out."""
    return F.softplus(logits).sqrt()


def expert_scores(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Scores `[T, E]` of every expert for x `[T, d]` and weight `[E, d]`, both upcast first."""
    wide = compute(x)
    return sqrt_softplus(wide @ weight.to(wide.dtype).T)


def select_largest(values: torch.Tensor, k: int) -> torch.Tensor:
    """Indices int64 `[T, k]` of the k largest of `[T, E]`, best first, ties smaller index first, NaN largest."""
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def normalise(scores: torch.Tensor, ids: torch.Tensor, route_scale: float) -> torch.Tensor:
    """Scores `[T, E]` gathered at ids `[T, k]`, divided by their sum, times route_scale."""
    chosen = scores.gather(1, ids)
    return chosen / chosen.sum(-1, keepdim=True) * route_scale


@operator(
    "gate_topk(Tensor x, Tensor weight, Tensor bias, int k, float route_scale) -> (Tensor weights, Tensor ids)",
    rows=(18,),
    arguments={"x": "float [T, d]", "weight": "float [E, d]", "bias": "f32 [E]"},
    tolerance=_TOLERANCE,
)
def gate_topk(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, k: int, route_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k experts with the largest `sqrt(softplus(W x)) + bias`, weighted by their score without the bias.

    x: [T, d] float; weight: [E, d] float; bias: [E] fp32, used for the selection only; 1 <= k <= E.
    Returns weights fp32 [T, k], `route_scale * s_j / sum_j s_j` with no epsilon, and ids int32 [T, k], best first.
    x and weight are upcast to fp32 and everything is fp32 from there. Ties take the smaller expert id. A NaN score
    counts as the largest; if all chosen scores are 0 (logits below -100) the weights are NaN. Zero tokens give an
    empty result. Gradients reach x and weight through the gathered scores, never the bias.
    Source: spec/v4.md 5.1 [OFF-M Gate].
    """
    return _route(expert_scores(x, weight), bias, k, route_scale)


def _route(scores: torch.Tensor, bias: torch.Tensor, k: int, route_scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    ids = select_largest(scores.detach() + bias, k)
    return normalise(scores, ids, route_scale), ids.int()


@operator(
    "gate_hash(Tensor x, Tensor weight, Tensor input_ids, Tensor tid2eid, float route_scale) "
    "-> (Tensor weights, Tensor ids)",
    rows=(18,),
    arguments={
        "x": "float [T, d]",
        "weight": "float [E, d]",
        "input_ids": "int [T] in [0, V)",
        "tid2eid": "int [V, k]",
    },
    tolerance=_TOLERANCE,
)
def gate_hash(
    x: torch.Tensor, weight: torch.Tensor, input_ids: torch.Tensor, tid2eid: torch.Tensor, route_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k experts that the table gives to each token id, weighted by their score.

    x: [T, d] float; weight: [E, d] float; input_ids: [T] int, token ids in [0, V); tid2eid: [V, k] int, expert ids
    in [0, E) in the rows that are looked up.
    Returns weights fp32 [T, k], `route_scale * s_j / sum_j s_j` with `s = sqrt(softplus(W x))` in fp32 and no epsilon,
    and ids int32 [T, k] in the table's order; a repeated expert counts as often as it stands there. There is no bias.
    If all chosen scores are 0 (logits below -100) the weights are NaN. Zero tokens give an empty result.
    Source: spec/v4.md 5.1 [OFF-M Gate].
    """
    ids = tid2eid[input_ids].long()
    return normalise(expert_scores(x, weight), ids, route_scale), ids.int()


@gate_topk.shapes
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, k: int, route_scale: float) -> None:
    if not 1 <= k <= weight.shape[0]:
        raise gate_topk.reject("k", k, f"1 to the number of experts {weight.shape[0]}")


@gate_hash.shapes
def _(
    x: torch.Tensor, weight: torch.Tensor, input_ids: torch.Tensor, tid2eid: torch.Tensor, route_scale: float
) -> None:
    if tid2eid.shape[1] < 1:
        raise gate_hash.reject("tid2eid", "0 experts per token", "at least 1")


@gate_hash.contents
def _(
    x: torch.Tensor, weight: torch.Tensor, input_ids: torch.Tensor, tid2eid: torch.Tensor, route_scale: float
) -> None:
    chosen, experts = tid2eid[input_ids], weight.shape[0]
    bad = ((chosen < 0) | (chosen >= experts)).nonzero()
    if len(bad):
        token, j = bad[0].tolist()
        found = f"{chosen[token, j].item()} at [{input_ids[token].item()}, {j}]"
        raise gate_hash.reject("tid2eid", found, f"values in [0, {experts})")


_SHAPES = ((0, 64, 8, 2), (1, 1, 1, 1), (3, 7, 5, 5), (5, 130, 9, 2), (17, 64, 256, 6), (4, 512, 384, 6))
"""(T, d, E, k)."""
_GOLDEN_LOGITS = (-50.0, -20.0, -5.0, -1.0, 0.0, 1.0, 5.0, 20.0, 25.0, 100.0)


def _router(draw: Draw, tokens: int, d: int, experts: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """X and weight with logits of about unit variance."""
    return draw.normal(tokens, d, dtype=dtype), draw.normal(experts, d, scale=d**-0.5, dtype=dtype)


@gate_topk.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in (("ideal", torch.float32), ("official", torch.bfloat16)):
        for tokens, d, experts, k in _SHAPES:
            x, weight = _router(draw, tokens, d, experts, dtype)
            bias = draw.normal(experts, scale=0.3)
            yield Case(f"{tokens}x{d}, {k} of {experts}", profile, (x, weight, bias, k, 1.5))
        logits = torch.tensor(_GOLDEN_LOGITS, dtype=dtype).unsqueeze(1)
        golden = (torch.ones(2, 1, dtype=dtype), logits, torch.zeros(len(logits)), len(logits), 2.5)
        yield Case("golden logits", profile, golden)
        small = draw.integers(12, 6, low=-1, high=2).to(dtype), draw.integers(16, 6, low=-1, high=2).to(dtype)
        yield Case("many ties", profile, (*small, torch.zeros(16), 6, 1.5))
        x, weight = _router(draw, 14, 32, 16, dtype)
        yield Case("bias decides, strided", profile, (x[::2], weight, draw.normal(16, scale=3.0), 4, 1.5))
        special = draw.normal(3, 32, dtype=dtype)
        special[1, 4] = float("nan")
        yield Case("NaN token", profile, (special, weight, draw.normal(16), 4, 2.5))


@gate_hash.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in (("ideal", torch.float32), ("official", torch.bfloat16)):
        for tokens, d, experts, k in _SHAPES:
            x, weight = _router(draw, tokens, d, experts, dtype)
            table = torch.stack([draw.permutation(experts)[:k] for _ in range(29)])
            ids = draw.integers(tokens, high=29)
            yield Case(f"{tokens}x{d}, {k} of {experts}", profile, (x, weight, ids, table, 1.5))
        logits = torch.tensor(_GOLDEN_LOGITS, dtype=dtype).unsqueeze(1)
        table = draw.permutation(len(logits)).int().unsqueeze(0)
        golden = (torch.ones(2, 1, dtype=dtype), logits, torch.zeros(2, dtype=torch.int64), table, 2.5)
        yield Case("golden logits", profile, golden)
        x, weight = _router(draw, 14, 32, 16, dtype)
        repeated = torch.tensor([[3, 3, 1], [0, 2, 0], [15, 15, 15]], dtype=torch.int32)
        yield Case("repeated experts, strided", profile, (x[::2], weight, draw.integers(7, high=3), repeated, 1.5))
        special = draw.normal(3, 32, dtype=dtype)
        special[1, 4] = float("nan")
        yield Case("NaN token", profile, (special, weight, draw.integers(3, high=3), repeated, 2.5))


Scores = Callable[[torch.Tensor], torch.Tensor]
Outputs = tuple[torch.Tensor, torch.Tensor]

_WRONG_SCORES: dict[str, Scores] = {
    "sigmoid scores": torch.sigmoid,
    "softmax scores": lambda logits: logits.softmax(-1),
    "root left out": F.softplus,
    "softplus that overflows": lambda logits: logits.exp().log1p().sqrt(),
    "ReLU instead of softplus": lambda logits: F.relu(logits).sqrt(),
    "scores rounded to bf16": lambda logits: sqrt_softplus(logits).bfloat16().to(logits.dtype),
    "logits rounded to bf16": lambda logits: sqrt_softplus(logits.bfloat16().to(logits.dtype)),
}


def _wrong_topk(change: Scores) -> Callable[..., Outputs]:
    return lambda x, weight, bias, k, route_scale: _route(change(compute(x) @ compute(weight).T), bias, k, route_scale)


def _wrong_hash(change: Scores) -> Callable[..., Outputs]:
    def mutant(
        x: torch.Tensor, weight: torch.Tensor, input_ids: torch.Tensor, tid2eid: torch.Tensor, route_scale: float
    ) -> Outputs:
        ids = tid2eid[input_ids].long()
        return normalise(change(compute(x) @ compute(weight).T), ids, route_scale), ids.int()

    return mutant


for _name, _change in _WRONG_SCORES.items():
    gate_topk.fault(_name)(_wrong_topk(_change))
    gate_hash.fault(_name)(_wrong_hash(_change))
for _contract in (gate_topk, gate_hash):
    add_output_faults(_contract, "last token zero", "one NaN", "tokens shifted by one")


@gate_topk.fault("bias enters the weights")
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, k: int, route_scale: float) -> Outputs:
    return _route(expert_scores(x, weight) + bias, torch.zeros_like(bias), k, route_scale)


@gate_topk.fault("bias ignored in the selection")
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, k: int, route_scale: float) -> Outputs:
    return _route(expert_scores(x, weight), torch.zeros_like(bias), k, route_scale)


@gate_topk.fault("bias added to the logits")
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, k: int, route_scale: float) -> Outputs:
    logits = compute(x) @ compute(weight).T
    ids = select_largest(sqrt_softplus(logits + bias), k)
    return normalise(sqrt_softplus(logits), ids, route_scale), ids.int()


@gate_topk.fault("ties take the larger expert id")
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, k: int, route_scale: float) -> Outputs:
    weights, ids = gate_topk.reference(x, weight.flip(0), bias.flip(0), k, route_scale)
    return weights, weight.shape[0] - 1 - ids


@gate_topk.fault("ids in rising order")
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, k: int, route_scale: float) -> Outputs:
    scores = expert_scores(x, weight)
    ids = select_largest(scores + bias, k).sort(-1).values
    return normalise(scores, ids, route_scale), ids.int()


@gate_topk.fault("normalised over all experts")
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, k: int, route_scale: float) -> Outputs:
    scores = expert_scores(x, weight)
    ids = select_largest(scores + bias, k)
    return scores.gather(1, ids) / scores.sum(-1, keepdim=True) * route_scale, ids.int()


@gate_topk.fault("route_scale left out")
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, k: int, route_scale: float) -> Outputs:
    return gate_topk.reference(x, weight, bias, k, 1.0)


@gate_hash.fault("route_scale left out")
def _(
    x: torch.Tensor, weight: torch.Tensor, input_ids: torch.Tensor, tid2eid: torch.Tensor, route_scale: float
) -> Outputs:
    return gate_hash.reference(x, weight, input_ids, tid2eid, 1.0)


@gate_hash.fault("experts chosen by score")
def _(
    x: torch.Tensor, weight: torch.Tensor, input_ids: torch.Tensor, tid2eid: torch.Tensor, route_scale: float
) -> Outputs:
    scores = expert_scores(x, weight)
    return _route(scores, torch.zeros_like(scores[:1]), tid2eid.shape[1], route_scale)


@gate_hash.fault("experts of the token before")
def _(
    x: torch.Tensor, weight: torch.Tensor, input_ids: torch.Tensor, tid2eid: torch.Tensor, route_scale: float
) -> Outputs:
    return gate_hash.reference(x, weight, input_ids.roll(1), tid2eid, route_scale)


@gate_hash.fault("position instead of token id")
def _(
    x: torch.Tensor, weight: torch.Tensor, input_ids: torch.Tensor, tid2eid: torch.Tensor, route_scale: float
) -> Outputs:
    positions = torch.arange(x.shape[0]) % tid2eid.shape[0]
    return gate_hash.reference(x, weight, positions, tid2eid, route_scale)


@gate_hash.fault("equal weights")
def _(
    x: torch.Tensor, weight: torch.Tensor, input_ids: torch.Tensor, tid2eid: torch.Tensor, route_scale: float
) -> Outputs:
    weights, ids = gate_hash.reference(x, weight, input_ids, tid2eid, route_scale)
    return torch.full_like(weights, route_scale / ids.shape[1]), ids


@gate_hash.fault("ids in rising order")
def _(
    x: torch.Tensor, weight: torch.Tensor, input_ids: torch.Tensor, tid2eid: torch.Tensor, route_scale: float
) -> Outputs:
    return gate_hash.reference(x, weight, input_ids, tid2eid.sort(-1).values, route_scale)
