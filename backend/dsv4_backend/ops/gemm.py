"""Block-scaled FP8 and FP4 matrix products, dense and grouped by expert (spec/v4.md 6.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from dsv4_backend.contract import PROFILES, Case, Draw, Operator, Reference, Tolerance, compute, operator
from dsv4_backend.mutants import add_output_faults
from dsv4_backend.ops.formats import e4m3_values, scale_values
from dsv4_backend.ops.quant import act_quant, dequantize_fp4, dequantize_fp8, quantize_weight_fp4, quantize_weight_fp8

_TOLERANCE = Tolerance(
    reason="fp32 sums of up to 1024 products, sums and terms up to size 8, in any order stay within 5e-6; "
    "the one cast to bf16 may then land on the other neighbour (2^-8)",
    ideal=(5e-6, 5e-6),
    official=(5e-6, 2**-7),
)
_ACTIVATIONS = {"x": "e4m3|f32 [T, K]", "x_scale": "e8m0 [T, K^128]"}
_DTYPES = {"ideal": torch.float32, "official": torch.bfloat16}
Weights = Sequence[torch.Tensor]
Quantise = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def dequantize_rows(x: torch.Tensor, x_scale: torch.Tensor | None) -> torch.Tensor:
    """fp32 values of e4m3 rows [T, K] with one E8M0 scale per 128 channels; without a scale, x as it is."""
    if x_scale is None:
        return x
    return e4m3_values(x) * scale_values(x_scale).repeat_interleave(128, -1)[:, : x.shape[-1]]


def _output_dtype(x: torch.Tensor, x_scale: torch.Tensor | None) -> torch.dtype:
    return x.dtype if x_scale is None else torch.bfloat16


@operator(
    "fp8_gemm(Tensor x, Tensor? x_scale, Tensor weight, Tensor weight_scale) -> Tensor",
    rows=(9,),
    arguments={**_ACTIVATIONS, "weight": "e4m3 [N, K]", "weight_scale": "e8m0 [N^128, K^128]"},
    tolerance=_TOLERANCE,
)
def fp8_gemm(
    x: torch.Tensor, x_scale: torch.Tensor | None, weight: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor:
    """`x W^T` with an FP8 weight of 128x128 tiles.

    x: float8_e4m3fn [T, K] with x_scale float8_e8m0fnu [T, ceil(K/128)] (`act_quant`): bf16 [T, N] out of fp32 sums,
    cast once; or fp32 [T, K] without x_scale: fp32 [T, N], no quantisation of activations.
    weight: float8_e4m3fn [N, K]; weight_scale: float8_e8m0fnu [ceil(N/128), ceil(K/128)]. Zero tokens give [0, N].
    Differentiable in fp32 x. Source: spec/v4.md 6.3 [OFF-K].
    """
    rows = dequantize_rows(x, x_scale)
    return (rows @ dequantize_fp8(weight, weight_scale).to(rows.dtype).T).to(_output_dtype(x, x_scale))


@operator(
    "fp8_grouped_gemm(Tensor x, Tensor? x_scale, Tensor[] weight, Tensor[] weight_scale, Tensor expert_offsets)"
    " -> Tensor",
    rows=(10,),
    arguments={
        **_ACTIVATIONS,
        "weight": "list(E) e4m3 [N, K]",
        "weight_scale": "list(E) e8m0 [N^128, K^128]",
        "expert_offsets": "i32 [O]",
    },
    tolerance=_TOLERANCE,
)
def fp8_grouped_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: Weights,
    weight_scale: Weights,
    expert_offsets: torch.Tensor,
) -> torch.Tensor:
    """`fp8_gemm` of every row with the weight of its expert: rows expert_offsets[e] .. expert_offsets[e+1]-1 are e's.

    x, x_scale: as for `fp8_gemm`, rows sorted by expert; weight, weight_scale: one pair per expert;
    expert_offsets: int32 [E+1], from 0 to T, never falling. Returns [T, N], bf16 or fp32 as `fp8_gemm`.
    Source: spec/v4.md 5.2, 6.3.
    """
    rows = dequantize_rows(x, x_scale)
    product = grouped_product(
        rows, weight, expert_offsets, lambda e: dequantize_fp8(weight[e], weight_scale[e]).to(rows.dtype)
    )
    return product.to(_output_dtype(x, x_scale))


@operator(
    "fp4_grouped_gemm(Tensor x, Tensor? x_scale, Tensor[] weight, Tensor[] weight_scale, Tensor expert_offsets)"
    " -> Tensor",
    rows=(10,),
    arguments={
        **_ACTIVATIONS,
        "weight": "list(E) i8 [N, K/2]",
        "weight_scale": "list(E) e8m0 [N, K/32]",
        "expert_offsets": "i32 [O]",
    },
    tolerance=_TOLERANCE,
)
def fp4_grouped_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: Weights,
    weight_scale: Weights,
    expert_offsets: torch.Tensor,
) -> torch.Tensor:
    """`x W^T` of every row with the FP4 weight of its expert.

    x, x_scale, expert_offsets: as for `fp8_grouped_gemm`, K a multiple of 32; weight: per expert int8 [N, K/2],
    e2m1 codes, low nibble = even k; weight_scale: per expert float8_e8m0fnu [N, K/32].
    Returns [T, N], bf16 or fp32 as `fp8_gemm`. Source: spec/v4.md 6.3.
    """
    rows = dequantize_rows(x, x_scale)
    product = grouped_product(
        rows, weight, expert_offsets, lambda e: dequantize_fp4(weight[e], weight_scale[e]).to(rows.dtype)
    )
    return product.to(_output_dtype(x, x_scale))


@operator(
    "grouped_gemm(Tensor x, Tensor[] weight, Tensor expert_offsets) -> Tensor",
    rows=(10,),
    arguments={"x": "float [T, K]", "weight": "list(E) float [N, K]", "expert_offsets": "i32 [O]"},
    tolerance=_TOLERANCE,
)
def grouped_gemm(x: torch.Tensor, weight: Weights, expert_offsets: torch.Tensor) -> torch.Tensor:
    """`x W^T` of every row with the float weight of its expert.

    x: [T, K] float, rows sorted by expert; weight: one [N, K] float per expert; expert_offsets: int32 [E+1], from 0 to
    T, never falling. Returns [T, N] in x's dtype: fp32 sums, one cast. Differentiable; an expert without rows gets a
    zero gradient. Source: spec/v4.md 5.2, 6.3.
    """
    rows = compute(x)
    return grouped_product(rows, weight, expert_offsets, lambda e: weight[e].to(rows.dtype)).to(x.dtype)


def grouped_product(
    rows: torch.Tensor, weight: Weights, expert_offsets: torch.Tensor, matrix: Callable[[int], torch.Tensor]
) -> torch.Tensor:
    """[T, N]: every row times the transposed matrix(e) [N, K] of its expert e; N and E are those of `weight`."""
    n = weight[0].shape[0]
    if _has_values(expert_offsets):
        parts = rows.split(expert_offsets.diff().tolist())
        # An expert without rows is not widened, but a trained one takes part, to get its zero gradient.
        active = [e for e, part in enumerate(parts) if part.shape[0] or weight[e].requires_grad]
        return torch.cat([rows.new_zeros(0, n), *(parts[e] @ matrix(e).T for e in active)])
    expert = torch.searchsorted(
        expert_offsets[1:], torch.arange(rows.shape[0], device=rows.device, dtype=torch.int32), right=True
    )
    product = rows.new_zeros(rows.shape[0], n)
    for e in range(len(weight)):
        product = torch.where((expert == e).unsqueeze(-1), rows @ matrix(e).T, product)
    return product


def _has_values(tensor: torch.Tensor) -> bool:
    return type(tensor) is torch.Tensor and tensor.device.type != "meta"


def _check_activations(op: Operator, x: torch.Tensor, x_scale: torch.Tensor | None) -> None:
    if (x.dtype == torch.float8_e4m3fn) != (x_scale is not None):
        found = "None" if x_scale is None else "a scale"
        raise op.reject("x_scale", f"{found} with x {x.dtype}", "a scale exactly if x is float8_e4m3fn")


def _check_experts(op: Operator, weight: Weights, expert_offsets: torch.Tensor) -> None:
    if not weight:
        raise op.reject("weight", "an empty list", "one weight per expert")
    if expert_offsets.shape[0] != len(weight) + 1:
        raise op.reject("expert_offsets", f"{expert_offsets.shape[0]} offsets", f"{len(weight) + 1} (experts + 1)")


def _check_offsets(op: Operator, expert_offsets: torch.Tensor, rows: int) -> None:
    offsets = expert_offsets.tolist()
    if offsets[0] != 0 or offsets[-1] != rows or offsets != sorted(offsets):
        raise op.reject("expert_offsets", offsets, f"offsets from 0 to the number of rows {rows}, never falling")


@fp8_gemm.shapes
def _(x: torch.Tensor, x_scale: torch.Tensor | None, weight: torch.Tensor, weight_scale: torch.Tensor) -> None:
    _check_activations(fp8_gemm, x, x_scale)


@fp8_grouped_gemm.shapes
def _(
    x: torch.Tensor, x_scale: torch.Tensor | None, weight: Weights, weight_scale: Weights, offsets: torch.Tensor
) -> None:
    _check_activations(fp8_grouped_gemm, x, x_scale)
    _check_experts(fp8_grouped_gemm, weight, offsets)


@fp8_grouped_gemm.contents
def _(
    x: torch.Tensor, x_scale: torch.Tensor | None, weight: Weights, weight_scale: Weights, offsets: torch.Tensor
) -> None:
    _check_offsets(fp8_grouped_gemm, offsets, x.shape[0])


@fp4_grouped_gemm.shapes
def _(
    x: torch.Tensor, x_scale: torch.Tensor | None, weight: Weights, weight_scale: Weights, offsets: torch.Tensor
) -> None:
    _check_activations(fp4_grouped_gemm, x, x_scale)
    _check_experts(fp4_grouped_gemm, weight, offsets)
    if x.shape[1] % 32:
        raise fp4_grouped_gemm.reject("x", f"{x.shape[1]} channels", "a multiple of 32, one weight scale per 32")


@fp4_grouped_gemm.contents
def _(
    x: torch.Tensor, x_scale: torch.Tensor | None, weight: Weights, weight_scale: Weights, offsets: torch.Tensor
) -> None:
    _check_offsets(fp4_grouped_gemm, offsets, x.shape[0])


@grouped_gemm.shapes
def _(x: torch.Tensor, weight: Weights, offsets: torch.Tensor) -> None:
    _check_experts(grouped_gemm, weight, offsets)


@grouped_gemm.contents
def _(x: torch.Tensor, weight: Weights, offsets: torch.Tensor) -> None:
    _check_offsets(grouped_gemm, offsets, x.shape[0])


def _weight(draw: Draw, n: int, k: int) -> torch.Tensor:
    """Rows of norm 1 or so, with a different scale in every 32 channels and 64 rows."""
    spread = torch.exp2(draw.integers(-(-n // 64), -(-k // 32), low=-3, high=2))
    spread = spread.repeat_interleave(64, 0)[:n].repeat_interleave(32, 1)[:, :k]
    return draw.normal(n, k, scale=k**-0.5) * spread


def _activations(draw: Draw, profile: str, t: int, k: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    spread = torch.exp2(draw.integers(t, -(-k // 128), low=-2, high=2)).repeat_interleave(128, 1)[:, :k]
    x = draw.normal(t, k) * spread
    if profile == "ideal":
        return x, None
    q, scale = act_quant.reference(x.bfloat16(), 128)
    return q, scale


def _quantised(draw: Draw, quantise: Quantise, sizes: tuple[int, int, int]) -> tuple[Weights, Weights]:
    pairs = [quantise(_weight(draw, *sizes[1:])) for _ in range(sizes[0])]
    return [w for w, _ in pairs], [s for _, s in pairs]


def _offsets(*rows: int) -> torch.Tensor:
    return torch.tensor([0, *rows]).cumsum(0).int()


# Rows of every expert, N, K.
_GROUPS: tuple[tuple[tuple[int, ...], int, int], ...] = (
    ((0, 0, 0), 64, 128),
    ((1,), 32, 32),
    ((0, 3, 0, 0, 5, 1, 0, 2), 96, 160),
    ((4, 1, 7), 144, 384),
    ((0, 0, 9, 0), 130, 256),
    ((2, 2, 2), 128, 1024),
)


@fp8_gemm.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile in PROFILES:
        for t, n, k in ((0, 128, 128), (1, 256, 1024), (3, 5, 7), (5, 192, 320), (17, 130, 512), (4, 300, 129)):
            x, x_scale = _activations(draw, profile, t, k)
            yield Case(f"{t}x{n}x{k}", profile, (x, x_scale, *quantize_weight_fp8(_weight(draw, n, k))))
        x, x_scale = _activations(draw, profile, 6, 256)
        weight, scale = quantize_weight_fp8(_weight(draw, 256, 256))
        strided = (x[::2], None if x_scale is None else x_scale[::2], weight.T.contiguous().T, scale.T)
        yield Case("strided", profile, strided)
        weight, scale = weight.clone(), scale.clone()
        weight[3, 4], scale[1, 0] = torch.nan, torch.nan
        yield Case("NaN weight, NaN scale", profile, (x, x_scale, weight, scale))


@fp8_grouped_gemm.cases
def _(draw: Draw) -> Iterator[Case]:
    yield from _grouped_cases(draw, quantize_weight_fp8)


@fp4_grouped_gemm.cases
def _(draw: Draw) -> Iterator[Case]:
    yield from _grouped_cases(draw, quantize_weight_fp4)


def _grouped_cases(draw: Draw, quantise: Quantise) -> Iterator[Case]:
    for profile in PROFILES:
        for rows, n, k in _GROUPS:
            x, x_scale = _activations(draw, profile, sum(rows), k)
            weight, scale = _quantised(draw, quantise, (len(rows), n, k))
            yield Case(f"{rows} {n}x{k}", profile, (x, x_scale, weight, scale, _offsets(*rows)))
        x, x_scale = _activations(draw, profile, 8, 256)
        weight, scale = _quantised(draw, quantise, (2, 64, 256))
        strided = (x[::2], None if x_scale is None else x_scale[::2], weight, scale, _offsets(1, 3))
        yield Case("strided", profile, strided)
        broken = [scale[0], torch.full_like(scale[1], torch.nan)]
        yield Case("NaN scale of one expert", profile, (x, x_scale, weight, broken, _offsets(5, 3)))


@grouped_gemm.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in _DTYPES.items():
        for rows, n, k in (*_GROUPS, ((2, 0, 3), 5, 7)):
            weight = [_weight(draw, n, k).to(dtype) for _ in rows]
            yield Case(f"{rows} {n}x{k}", profile, (draw.normal(sum(rows), k, dtype=dtype), weight, _offsets(*rows)))
        x = draw.normal(24, 8, dtype=dtype).T[::2]
        weight = [_weight(draw, 24, 10).to(dtype).T for _ in range(3)]
        yield Case("strided", profile, (x, weight, _offsets(1, 2, 1)))
        x = x.clone()
        x[1, 3] = torch.nan
        broken = [*weight[:2], torch.full_like(weight[2], torch.nan)]
        yield Case("NaN row, NaN expert", profile, (x, broken, _offsets(2, 1, 1)))


def _edit(op: Operator, argument: int, edit: Callable[[torch.Tensor], torch.Tensor]) -> Reference:
    """Mutant that edits one argument (every tensor of a list) and then computes as the reference does."""

    def mutant(*args: Any) -> Any:
        changed = list(args)
        value = args[argument]
        if value is not None:
            changed[argument] = [edit(t) for t in value] if isinstance(value, list | tuple) else edit(value)
        return op.reference(*changed)

    return mutant


def _bits(edit: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda t: edit(t.contiguous().view(torch.uint8)).to(torch.uint8).view(t.dtype)


_SCALE_EDITS = {
    "moved by one block": _bits(lambda b: b.roll(1, -1)),
    "of the first block for all": _bits(lambda b: b[:, :1].expand_as(b).contiguous()),
    "cast as numbers": lambda s: s.view(torch.uint8).float().to(torch.float8_e8m0fnu),
    "left out": lambda s: torch.ones_like(s, dtype=torch.float32).to(s.dtype),
}
_OUTPUT_FAULTS = ("last token zero", "stale tail of channels", "one NaN", "tokens shifted by one")
_OFFSET_EDITS = {
    "boundary rows to the next expert": lambda o: torch.cat([o[:1], (o[1:-1] - 1).clamp(min=0), o[-1:]]),
    "boundary rows to the expert before": lambda o: torch.cat([o[:1], (o[1:-1] + 1).clamp(max=int(o[-1])), o[-1:]]),
    "every row to the first expert": lambda o: torch.cat([o[:1], o[-1:].expand(len(o) - 1)]),
    "experts without rows not counted": lambda o: torch.cat([o.unique(), o[-1:].expand(len(o) - len(o.unique()))]),
    "experts reversed": lambda o: torch.cat([o[:1], o.diff().flip(0).cumsum(0).int()]),
}


def _add_scale_faults(op: Operator[..., torch.Tensor]) -> None:
    for name, change in _SCALE_EDITS.items():
        op.fault(f"activation scales {name}")(_edit(op, 1, change))
        op.fault(f"weight scales {name}")(_edit(op, 3, change))
    op.fault("weight scales of the first rows for all")(_edit(op, 3, _bits(lambda b: b[:1].expand_as(b).contiguous())))
    op.fault("last channel left out")(_edit(op, 0, lambda x: torch.cat([x[:, :-1], torch.zeros_like(x[:, -1:])], 1)))
    op.fault("activations rounded to bf16")(_edit(op, 0, lambda x: x.bfloat16().to(x.dtype)))


def _add_offset_faults(op: Operator[..., torch.Tensor], argument: int) -> None:
    for name, change in _OFFSET_EDITS.items():
        op.fault(name)(_edit(op, argument, change))


_add_scale_faults(fp8_gemm)
_add_scale_faults(fp8_grouped_gemm)
_add_scale_faults(fp4_grouped_gemm)
_add_offset_faults(fp8_grouped_gemm, 4)
_add_offset_faults(fp4_grouped_gemm, 4)
_add_offset_faults(grouped_gemm, 2)
add_output_faults(fp8_gemm, *_OUTPUT_FAULTS)
add_output_faults(fp8_grouped_gemm, *_OUTPUT_FAULTS)
add_output_faults(fp4_grouped_gemm, *_OUTPUT_FAULTS)
add_output_faults(grouped_gemm, *_OUTPUT_FAULTS)
fp8_gemm.fault("weight exponent bias of FNUZ")(_edit(fp8_gemm, 2, lambda w: (w.float() / 2).to(w.dtype)))
fp4_grouped_gemm.fault("nibbles swapped")(_edit(fp4_grouped_gemm, 2, _bits(lambda b: b << 4 | b >> 4)))
fp4_grouped_gemm.fault("sign bits lost")(_edit(fp4_grouped_gemm, 2, _bits(lambda b: b & 0x77)))
fp4_grouped_gemm.fault("code 7 read as 5")(
    _edit(fp4_grouped_gemm, 2, _bits(lambda b: b - 2 * (b & 7 == 7).to(b.dtype)))
)
grouped_gemm.fault("weights rounded to fp8")(_edit(grouped_gemm, 1, lambda w: w.to(torch.float8_e4m3fn).to(w.dtype)))
grouped_gemm.fault("activations rounded to fp8")(
    _edit(grouped_gemm, 0, lambda x: x.to(torch.float8_e4m3fn).to(x.dtype))
)


@fp8_gemm.fault("partial sums of 128 rounded to bf16")
def _(x: torch.Tensor, x_scale: torch.Tensor | None, weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    rows, matrix = dequantize_rows(x, x_scale), dequantize_fp8(weight, weight_scale)
    y = rows.new_zeros(rows.shape[0], matrix.shape[0], dtype=torch.bfloat16)
    for a, b in zip(rows.split(128, 1), matrix.split(128, 1), strict=True):
        y = (y + a @ b.T).bfloat16()
    return y.to(_output_dtype(x, x_scale))
