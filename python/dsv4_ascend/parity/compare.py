"""Comparison of one tensor with what it should be.

Order: shape and dtype; then places of NaN and infinities; then |got - want| <= atol + rtol * |want|
for every element. No element is exempt. Integer, float8 and zero-limit tensors are compared by
value bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

Limits = tuple[float, float]

_WIDE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Comparison:
    """How far one tensor is from its golden values.

    limit_use: largest error / limit over the elements, 0 exact, above 1 a failure, infinite where
    no limit applies (shape, dtype, NaN, bits). mean_use: its mean over the elements. pass_rate:
    share of elements within the limit.
    detail: the worst element or the reason of failure, in words; empty when exact.
    """

    limit_use: float
    mean_use: float
    pass_rate: float
    detail: str = ""

    @property
    def ok(self) -> bool:
        """Whether every element is within its limit."""
        return self.limit_use <= 1.0


def compare(got: object, want: object, limits: Limits) -> Comparison:
    """Compare an output with its golden value. fp64 golden values stand for fp32 outputs;
    None equals None only.

    limits: (atol, rtol); (0, 0) demands bit equality.
    """
    different = unlike(got, want)
    if different is not None:
        return different
    if not isinstance(got, torch.Tensor) or not isinstance(want, torch.Tensor):
        return Comparison(0, 0, 1)
    if want.numel() == 0:
        return Comparison(0, 0, 1)
    got, want = got.detach().cpu(), want.detach().cpu()
    use = _limit_use(got, want, limits) if want.dtype in _WIDE else _bits_differ(got, want)
    return _summarise(use, got, want)


def unlike(got: object, want: object) -> Comparison | None:
    """What an output's kind, shape or dtype has against it; None when values decide."""
    if not isinstance(got, torch.Tensor) or not isinstance(want, torch.Tensor):
        same = got is None and want is None
        return None if same else _mismatch(f"got {_kind(got)}, want {_kind(want)}")
    if got.shape != want.shape:
        return _mismatch(f"got shape {list(got.shape)}, want {list(want.shape)}")
    if got.dtype != want.dtype and (got.dtype, want.dtype) != (torch.float32, torch.float64):
        return _mismatch(f"got {got.dtype}, want {want.dtype}")
    return None


def _kind(value: object) -> str:
    return "nothing" if value is None else type(value).__name__


def _mismatch(reason: str) -> Comparison:
    return Comparison(math.inf, math.inf, 0, reason)


def raised(error: str) -> Comparison:
    """Of a call that gave no output but an error."""
    return _mismatch(f"raised {error}")


def miscounted(got: int, want: int) -> Comparison:
    """Of a call that gave another number of outputs."""
    return _mismatch(f"got {got} outputs and written arguments, want {want}")


def _bits_differ(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """0 where the bits agree, infinity elsewhere: fp64 of the tensors' shape."""
    if got.dtype.is_floating_point:
        got, want = got.view(torch.uint8), want.view(torch.uint8)
    return torch.where(got == want, 0.0, math.inf).double()


def _limit_use(got: torch.Tensor, want: torch.Tensor, limits: Limits) -> torch.Tensor:
    """Error / limit of every element, infinity where a special value sits at the wrong place."""
    rounded = want.to(got.dtype)  # an fp64 golden value beyond fp32's range is an infinity there
    g, w = got.double(), want.double()
    special = ~(torch.isfinite(g) & torch.isfinite(rounded))
    same_special = (g == rounded.double()) | (g.isnan() & rounded.isnan())
    error = (g - w).abs()
    if limits == (0.0, 0.0):
        use = torch.where((error == 0) & (g.signbit() == w.signbit()), 0.0, math.inf)
    else:
        use = torch.where(error == 0, 0.0, error / (limits[0] + limits[1] * w.abs()))
    return torch.where(special, torch.where(same_special, 0.0, math.inf), use)


def _summarise(use: torch.Tensor, got: torch.Tensor, want: torch.Tensor) -> Comparison:
    flat = use.flatten()
    worst = int(flat.argmax())
    largest = float(flat[worst])
    detail = ""
    if largest > 0:
        where = [int(i) for i in torch.unravel_index(torch.tensor(worst), use.shape)]
        detail = (
            f"worst at {where}: got {_value(got, where)}, want {_value(want, where)}, "
            f"error/limit {largest:.3g}"
        )
    return Comparison(largest, float(flat.mean()), float((flat <= 1).double().mean()), detail)


def _value(tensor: torch.Tensor, where: list[int]) -> str:
    element = tensor[tuple(where)]
    return (
        f"{element.double().item():.9g}" if tensor.dtype.is_floating_point else str(element.item())
    )
