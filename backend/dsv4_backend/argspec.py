"""Argument specifications: one line per tensor that says its dtypes, its shape and the range of its values.

Grammar: ``[list(NAME)] DTYPES [DIM, DIM, ...] [in [LOW, HIGH)]``

* list(NAME): the argument is a list of such tensors, and NAME its length.
* DTYPES: names joined by ``|``, from `DTYPES` (``float`` and ``int`` are groups).
* DIM: an integer, a name (bound by its first use, then checked), or a product such as ``n*d``, ``d/2`` (exact half)
  or ``K^32`` (ceiling division). A leading ``...`` stands for any number of dimensions.
* LOW, HIGH: integers or names bound by any argument.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from dsv4_backend.errors import argument_error

DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "f64": (torch.float64,),
    "f32": (torch.float32, torch.float64),  # f64 is how parity computes its golden values
    "bf16": (torch.bfloat16,),
    "f16": (torch.float16,),
    "float": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "e4m3": (torch.float8_e4m3fn,),
    "e8m0": (torch.float8_e8m0fnu,),
    "i8": (torch.int8,),
    "u8": (torch.uint8,),
    "i32": (torch.int32,),
    "i64": (torch.int64,),
    "int": (torch.int32, torch.int64),
}

_SPEC = re.compile(
    r"^(?:list\((?P<length>\w+)\) )?(?P<dtypes>[\w|]+) \[(?P<shape>[^\]]*)\]"
    r"(?: in \[(?P<low>-?\w+), ?(?P<high>\w+)\))?$"
)
_TERM = re.compile(r"([*/^]?)(\w+)")


@dataclass(frozen=True)
class TensorSpec:
    """What one tensor argument must look like."""

    text: str
    length: str | None
    dtypes: tuple[torch.dtype, ...]
    shape: tuple[str, ...]
    any_leading: bool
    low: str | None
    high: str | None

    @classmethod
    def parse(cls, text: str) -> TensorSpec:
        """Parse one specification line; ValueError names the line when it does not follow the grammar."""
        match = _SPEC.match(text)
        if match is None:
            raise ValueError(
                f"argument specification {text!r} is not 'DTYPES [DIMS]' or 'DTYPES [DIMS] in [LOW, HIGH)'"
            )
        dims = tuple(d.strip() for d in match["shape"].split(",") if d.strip())
        any_leading = bool(dims) and dims[0] == "..."
        dtypes = tuple(dict.fromkeys(t for name in match["dtypes"].split("|") for t in DTYPES[name]))
        return cls(
            text, match["length"], dtypes, dims[1:] if any_leading else dims, any_leading, match["low"], match["high"]
        )


Sizes = dict[str, int]


def _evaluate(term: str, sizes: Mapping[str, int]) -> int | None:
    """Value of a dimension term, or None while a name in it is unbound."""
    value = 1
    for operator, word in _TERM.findall(term):
        factor = int(word) if word.isdigit() else sizes.get(word)
        if factor is None:
            return None
        if operator == "^":
            value = (value + factor - 1) // factor
        elif operator == "/":
            value = value // factor
        else:
            value = value * factor
    return value


class _Checker:
    """State of one check: the sizes bound so far, the device of the first tensor, terms that wait for a name."""

    def __init__(self, operator: str) -> None:
        self.operator = operator
        self.sizes: Sizes = {}
        self.device: torch.device | None = None
        self.pending: list[tuple[str, TensorSpec, torch.Tensor, str, int]] = []

    def tensor(self, name: str, spec: TensorSpec, tensor: object) -> None:
        if not isinstance(tensor, torch.Tensor):
            raise argument_error(self.operator, name, type(tensor).__name__, f"a tensor {spec.text}")
        if tensor.layout != torch.strided:
            raise argument_error(self.operator, name, f"layout {tensor.layout}", "a strided tensor")
        if tensor.dtype not in spec.dtypes:
            raise argument_error(self.operator, name, str(tensor.dtype), spec.text)
        rank_fits = tensor.dim() >= len(spec.shape) if spec.any_leading else tensor.dim() == len(spec.shape)
        if not rank_fits:
            raise argument_error(self.operator, name, f"shape {tuple(tensor.shape)}", spec.text)
        if self.device is None:
            self.device = tensor.device
        elif tensor.device != self.device:
            raise argument_error(self.operator, name, f"device {tensor.device}", f"{self.device} like the first tensor")
        for axis, term in enumerate(spec.shape, start=tensor.dim() - len(spec.shape)):
            self.dimension(name, spec, tensor, term, tensor.shape[axis])

    def dimension(self, name: str, spec: TensorSpec, tensor: torch.Tensor, term: str, size: int) -> None:
        expected = _evaluate(term, self.sizes)
        if expected is None and term.isidentifier():
            self.sizes[term] = size
        elif expected is None:
            self.pending.append((name, spec, tensor, term, size))
        elif size != expected:
            found = f"shape {tuple(tensor.shape)}"
            raise argument_error(self.operator, name, found, f"{spec.text} with {term} = {expected}")

    def finish(self) -> Sizes:
        pending, self.pending = self.pending, []
        for item in pending:
            self.dimension(*item)
        return self.sizes


def check_tensors(
    operator: str, specs: Mapping[str, TensorSpec], arguments: Mapping[str, object], optional: Collection[str]
) -> Sizes:
    """Check dtype, rank, shape and device of every specified argument; return the sizes that the names stand for.

    Works on fake and meta tensors too. An argument in `optional` may be None. Raises ArgumentError at the first that
    does not fit.
    """
    checker = _Checker(operator)
    for name, spec in specs.items():
        value = arguments[name]
        if value is None and name in optional:
            continue
        if spec.length is None:
            checker.tensor(name, spec, value)
            continue
        if not isinstance(value, list | tuple):
            raise argument_error(operator, name, type(value).__name__, f"a list of tensors {spec.text}")
        if checker.sizes.setdefault(spec.length, len(value)) != len(value):
            expected = f"{spec.text} with {spec.length} = {checker.sizes[spec.length]}"
            raise argument_error(operator, name, f"{len(value)} tensors", expected)
        for i, tensor in enumerate(value):
            checker.tensor(f"{name}[{i}]", spec, tensor)
    return checker.finish()


def check_aliasing(operator: str, written: Collection[str], arguments: Mapping[str, object]) -> None:
    """Check that no element of a written argument is in memory twice, in itself or in another argument.

    Conservative: memory from a tensor's first to its last element counts as its own.
    """
    if not written:
        return
    spans = {name: _span(value) for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    for name in written:
        tensor = arguments[name]
        assert isinstance(tensor, torch.Tensor)
        if _overlaps_itself(tensor):
            found = f"strides {tensor.stride()} of shape {tuple(tensor.shape)}"
            raise argument_error(operator, name, found, "elements that share no memory, because they are written")
        start, end = spans[name]
        for other, (other_start, other_end) in spans.items():
            if other != name and max(start, other_start) < min(end, other_end):
                raise argument_error(operator, other, f"memory of '{name}'", "its own, because the other is written")


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte of a tensor and the byte after its last; equal when it is empty."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and tensor.numel():
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def check_values(
    operator: str, specs: Mapping[str, TensorSpec], arguments: Mapping[str, object], sizes: Mapping[str, int]
) -> None:
    """Check that every index argument lies in its range. Reads values: call it on real host tensors only."""
    for name, spec in specs.items():
        tensor = arguments[name]
        if spec.low is None or spec.high is None or not isinstance(tensor, torch.Tensor) or tensor.numel() == 0:
            continue
        low, high = (_bound(bound, sizes) for bound in (spec.low, spec.high))
        smallest, largest = tensor.min().item(), tensor.max().item()
        if smallest < low or largest >= high:
            bad = ((tensor < low) | (tensor >= high)).nonzero()[0].tolist()
            value = tensor[tuple(bad)].item()
            raise argument_error(operator, name, f"{value} at {bad}", f"values in [{low}, {high})")


def _bound(bound: str, sizes: Mapping[str, int]) -> float:
    if bound.lstrip("-").isdigit():
        return int(bound)
    return sizes.get(bound, math.inf)
