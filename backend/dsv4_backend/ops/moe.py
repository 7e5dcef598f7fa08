"""Expert dispatch and combination (spec/v4.md 5.3)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from dsv4_backend.contract import Case, Draw, Tolerance, compute, operator
from dsv4_backend.mutants import add_output_faults

MAX_EXPERTS = 1 << 16
"""More than any V4 has by far (384): a larger number is a mistake, and the offsets would only waste memory."""


@operator(
    "moe_dispatch(Tensor x, Tensor ids, int num_experts) -> (Tensor rows, Tensor expert_offsets, Tensor order)",
    rows=(20,),
    arguments={"x": "float|e4m3|e8m0 [...]", "ids": "int [T, k]"},
    tolerance=Tolerance(reason="copies and integers: bit equality"),
)
def moe_dispatch(
    x: torch.Tensor, ids: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each token's row once per chosen expert, sorted by expert; rows of one expert in order of (token, j).

    x: [T, ...] of any float, e4m3 or e8m0 dtype (activations or their scales); ids: [T, k] int in [0, num_experts).
    Returns rows [T*k, ...] in x's dtype; expert_offsets int32 [E+1], expert e owning rows offsets[e] .. offsets[e+1]-1;
    order int32 [T*k], the flat index t*k+j of each row, which `moe_combine` undoes. Experts nobody chose get no rows.
    Zero tokens give zero rows and all offsets 0. Gradients reach x. Source: spec/v4.md 5.3.
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
    arguments={"y": "float [M, d]", "order": "int [M] in [0, M)"},
    tolerance=Tolerance(
        reason="fp32 sums of up to 8 rows of unit scale stay within 4e-6 of the fp64 sum; official rows are compared "
        "with the reference's own fp32 sum, whose order is promised: every bit is decided",
        ideal=(4e-6, 1e-6),
    ),
)
def moe_combine(y: torch.Tensor, order: torch.Tensor, k: int) -> torch.Tensor:
    """Sum over each token's k expert outputs: row i belongs to token `order[i] // k`, choice `order[i] % k`.

    y: [M, d] float, M = T*k rows in dispatch order; order: [M] int, the permutation from `moe_dispatch`; k >= 1.
    Returns fp32 [T, d], added in the order j = 0 .. k-1 in fp32 whatever expert came first, so that the bits do not
    depend on the other tokens of the batch. Zero rows give an empty result. Source: spec/v4.md 5.3 [OFF-M MoE].
    """
    return sum_choices(compute(y[order.argsort()]).unflatten(0, (-1, k)))


@moe_dispatch.shapes
def _(x: torch.Tensor, ids: torch.Tensor, num_experts: int) -> None:
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise moe_dispatch.reject("num_experts", num_experts, f"1 to {MAX_EXPERTS}")
    if ids.shape[1] < 1:
        raise moe_dispatch.reject("ids", f"shape {tuple(ids.shape)}", "at least 1 expert per token")
    if x.dim() < 1 or x.shape[0] != ids.shape[0]:
        raise moe_dispatch.reject("x", f"shape {tuple(x.shape)}", f"[T, ...] with T = {ids.shape[0]} as in ids")


@moe_dispatch.contents
def _(x: torch.Tensor, ids: torch.Tensor, num_experts: int) -> None:
    bad = ((ids < 0) | (ids >= num_experts)).nonzero()
    if len(bad):
        where = bad[0].tolist()
        raise moe_dispatch.reject("ids", f"{ids[tuple(where)].item()} at {where}", f"values in [0, {num_experts})")


@moe_combine.shapes
def _(y: torch.Tensor, order: torch.Tensor, k: int) -> None:
    if not 1 <= k <= MAX_EXPERTS:
        raise moe_combine.reject("k", k, f"1 to {MAX_EXPERTS}")
    if y.shape[0] % k != 0:
        raise moe_combine.reject("y", f"{y.shape[0]} rows", f"a multiple of k = {k}")


@moe_combine.contents
def _(y: torch.Tensor, order: torch.Tensor, k: int) -> None:
    repeated = (order.long().bincount(minlength=y.shape[0]) > 1).nonzero()
    if len(repeated):
        raise moe_combine.reject(
            "order", f"{repeated[0].item()} more than once", f"a permutation of 0..{len(order) - 1}"
        )


def _draw_ids(draw: Draw, tokens: int, k: int, experts: int) -> torch.Tensor:
    """Distinct experts per token, the first experts more often than the last."""
    favoured = draw.uniform(tokens, experts) * torch.linspace(1.5, 1.0, experts)
    return favoured.argsort(dim=1, descending=True)[:, :k].int()


_ROUTINGS = ((0, 5, 2, 4), (1, 1, 1, 1), (3, 7, 3, 5), (13, 16, 6, 32), (33, 24, 2, 256), (40, 9, 6, 6))
"""(T, d, k, E)."""


@moe_dispatch.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in (("ideal", torch.float32), ("official", torch.bfloat16)):
        for tokens, d, k, experts in _ROUTINGS:
            x, ids = draw.normal(tokens, d, dtype=dtype), _draw_ids(draw, tokens, k, experts)
            yield Case(f"{tokens}x{d}, {k} of {experts}", profile, (x, ids, experts))
        middle = torch.full((6, 2), 3, dtype=torch.int64)
        yield Case("one expert takes all", profile, (draw.normal(6, 8, dtype=dtype), middle, 7))
        strided = draw.normal(12, 10, dtype=dtype)[::2, ::2], _draw_ids(draw, 6, 4, 8).t().contiguous().t()
        yield Case("strided", profile, (*strided, 8))
    ids = _draw_ids(draw, 9, 3, 8)
    yield Case("e4m3 rows", "official", (draw.normal(9, 16, dtype=torch.float8_e4m3fn), ids, 8))
    scales = draw.integers(9, 2, low=100, high=150).to(torch.uint8).view(torch.float8_e8m0fnu)
    yield Case("E8M0 scales", "official", (scales, ids, 8))
    yield Case("stack of streams", "official", (draw.normal(9, 4, 6, dtype=torch.bfloat16), ids, 8))


Dispatched = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@moe_dispatch.fault("later tokens first within an expert")
def _(x: torch.Tensor, ids: torch.Tensor, num_experts: int) -> Dispatched:
    rows, offsets, order = moe_dispatch.reference(x.flip(0), ids.flip(0, 1), num_experts)
    return rows, offsets, ids.numel() - 1 - order


@moe_dispatch.fault("choice before token within an expert")
def _(x: torch.Tensor, ids: torch.Tensor, num_experts: int) -> Dispatched:
    tokens, k = ids.shape
    order = ids.t().flatten().argsort(stable=True)
    token, choice = order % max(tokens, 1), order // max(tokens, 1)
    return x[token], moe_dispatch.reference(x, ids, num_experts)[1], (token * k + choice).int()


@moe_dispatch.fault("counts instead of offsets")
def _(x: torch.Tensor, ids: torch.Tensor, num_experts: int) -> Dispatched:
    rows, offsets, order = moe_dispatch.reference(x, ids, num_experts)
    return rows, offsets.diff(prepend=offsets[:1]), order


@moe_dispatch.fault("offsets of the expert after")
def _(x: torch.Tensor, ids: torch.Tensor, num_experts: int) -> Dispatched:
    rows, offsets, order = moe_dispatch.reference(x, ids, num_experts)
    return rows, torch.cat([offsets[1:], offsets[-1:]]), order


@moe_dispatch.fault("inverse order")
def _(x: torch.Tensor, ids: torch.Tensor, num_experts: int) -> Dispatched:
    rows, offsets, order = moe_dispatch.reference(x, ids, num_experts)
    return rows, offsets, order.argsort().int()


@moe_dispatch.fault("order counts tokens")
def _(x: torch.Tensor, ids: torch.Tensor, num_experts: int) -> Dispatched:
    rows, offsets, order = moe_dispatch.reference(x, ids, num_experts)
    return rows, offsets, order // ids.shape[1]


@moe_dispatch.fault("rows left in token order")
def _(x: torch.Tensor, ids: torch.Tensor, num_experts: int) -> Dispatched:
    _, offsets, order = moe_dispatch.reference(x, ids, num_experts)
    return x.repeat_interleave(ids.shape[1], dim=0), offsets, order


@moe_dispatch.fault("last expert forgotten")
def _(x: torch.Tensor, ids: torch.Tensor, num_experts: int) -> Dispatched:
    rows, offsets, order = moe_dispatch.reference(x, ids, num_experts)
    return rows, torch.cat([offsets[:-1], offsets[-2:-1]]), order


@moe_dispatch.fault("flat index modulo tokens")
def _(x: torch.Tensor, ids: torch.Tensor, num_experts: int) -> Dispatched:
    _, offsets, order = moe_dispatch.reference(x, ids, num_experts)
    return x[order % max(ids.shape[0], 1)], offsets, order


add_output_faults(moe_dispatch, "last token zero", "tokens shifted by one")


@moe_combine.cases
def _(draw: Draw) -> Iterator[Case]:
    for tokens, d, k in ((0, 5, 2), (1, 1, 1), (3, 7, 3), (13, 256, 6), (9, 24, 8), (40, 9, 6)):
        order = draw.permutation(tokens * k).int()
        name = f"{tokens}x{d}, {k} choices"
        yield Case(name, "ideal", (draw.normal(tokens * k, d), order, k))
        scales = torch.exp2(draw.integers(tokens * k, 1, low=-12, high=13).float())
        rows = (draw.normal(tokens * k, d) * scales).bfloat16()
        yield Case(name, "official", (rows, order, k))
    special = draw.normal(12, 8, dtype=torch.bfloat16)
    special[3, 1], special[5, 2] = math.nan, math.inf
    yield Case("NaN, infinity, strided", "official", (special[::2], draw.permutation(6), 2))


@moe_combine.fault("order applied forwards")
def _(y: torch.Tensor, order: torch.Tensor, k: int) -> torch.Tensor:
    return sum_choices(compute(y)[order].unflatten(0, (-1, k)))


@moe_combine.fault("rows taken in dispatch order")
def _(y: torch.Tensor, order: torch.Tensor, k: int) -> torch.Tensor:
    return sum_choices(compute(y).unflatten(0, (-1, k)))


@moe_combine.fault("summed by expert, not by choice")
def _(y: torch.Tensor, order: torch.Tensor, k: int) -> torch.Tensor:
    return torch.zeros_like(compute(y)[::k]).index_add(0, order // k, compute(y))


@moe_combine.fault("summed last choice first")
def _(y: torch.Tensor, order: torch.Tensor, k: int) -> torch.Tensor:
    return sum_choices(compute(y)[order.argsort()].unflatten(0, (-1, k)).flip(1))


@moe_combine.fault("bf16 accumulator")
def _(y: torch.Tensor, order: torch.Tensor, k: int) -> torch.Tensor:
    return compute(sum_choices(y[order.argsort()].bfloat16().unflatten(0, (-1, k))))


@moe_combine.fault("mean instead of sum")
def _(y: torch.Tensor, order: torch.Tensor, k: int) -> torch.Tensor:
    return moe_combine.reference(y, order, k) / k


@moe_combine.fault("last choice forgotten")
def _(y: torch.Tensor, order: torch.Tensor, k: int) -> torch.Tensor:
    return sum_choices(compute(y)[order.argsort()].unflatten(0, (-1, k))[:, :-1])


@moe_combine.fault("choices of one token spread over all")
def _(y: torch.Tensor, order: torch.Tensor, k: int) -> torch.Tensor:
    return sum_choices(compute(y)[order.argsort()].unflatten(0, (k, -1)).transpose(0, 1))


add_output_faults(moe_combine, "last token zero", "stale tail of channels", "one NaN", "tokens shifted by one")
