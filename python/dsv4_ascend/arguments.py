"""Rules for values that users hand to the Python interface: flags,
whole numbers, numbers, token ids.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
import torch

from dsv4_backend.errors import ArgumentError

MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1
"""What torch.Generator.manual_seed takes: any number of 64 bits, with or without a sign."""
MAX_SIZE = 2**31 - 1
"""Of what is counted in tokens or blocks: kernels index them with 32 bits."""


def flag(name: str, value: object) -> bool:
    """The bool that `value` is; ArgumentError for anything else, whatever its truth value."""
    if not isinstance(value, bool):
        raise ArgumentError(f"{name}: found {value!r:.40}, expected True or False")
    return value


def integer(name: str, value: object, low: int, high: int | None = None) -> int:
    """The whole number that `value` is, NumPy's included;
    ArgumentError for another type, a bool, or out of range.
    """
    number = _index(value)
    if number is None or number < low or (high is not None and number > high):
        limits = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise ArgumentError(f"{name}: found {value!r:.40}, expected an integer {limits}")
    return number


def _index(value: object) -> int | None:
    """The value as an int, or None: a bool is no number here."""
    if isinstance(value, bool | np.bool_) or (
        isinstance(value, torch.Tensor) and value.dtype == torch.bool
    ):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def number(
    name: str, value: object, *, above: float = -math.inf, low: float = 0.0, high: float = math.inf
) -> float:
    """The finite number that `value` is, with low <= value <= high and value > above;
    else ArgumentError.
    """
    real = _real(value)
    if real is None or not math.isfinite(real) or not low <= real <= high or real <= above:
        limits = f"in ({above:g}, {high:g}]" if math.isfinite(high) else f">= {low:g}"
        raise ArgumentError(f"{name}: found {value!r:.40}, expected a finite number {limits}")
    return real


def _real(value: object) -> float | None:
    if isinstance(value, bool | np.bool_ | str | bytes) or not isinstance(value, SupportsFloat):
        return None
    if isinstance(value, torch.Tensor) and value.dtype == torch.bool:
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def folder_of(name: str, value: object) -> Path:
    """The path that a string or a path object names;
    ArgumentError for another type, or a null character in it.
    """
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str) or "\0" in path:
        raise ArgumentError(
            f"{name}: found {value!r:.40}, expected the path of a folder, as str or Path"
        )
    return Path(path)


def ids_of(name: str, values: object, vocab_size: int) -> frozenset[int]:
    """A set of token ids from any collection of them; ArgumentError for anything else."""
    listed = as_list(values) if not isinstance(values, set | frozenset) else list(values)
    if not isinstance(listed, list):
        raise ArgumentError(f"{name}: found {values!r:.40}, expected a collection of token ids")
    return frozenset(integer(name, value, 0, vocab_size - 1) for value in listed)


def names_of(name: str, values: object) -> frozenset[str]:
    """A set of names from a list, tuple or set of strings;
    ArgumentError for anything else, one string too.
    """
    listed = (
        list(values)
        if isinstance(values, Sequence | Set) and not isinstance(values, str | bytes)
        else [None]
    )
    if not all(isinstance(value, str) for value in listed):
        raise ArgumentError(f"{name}: found {values!r:.40}, expected a list of strings")
    return frozenset(map(str, listed))


def sequences_of(name: str, values: object, vocab_size: int) -> list[list[int]]:
    """Token ids of one sequence or of several (see `TokenIds`) as lists;
    ArgumentError names sequence and position.
    """
    rows = as_list(values)
    if not isinstance(rows, list):
        raise ArgumentError(f"{name}: found {rows!r:.40}, expected token ids")
    rows = [as_list(row) for row in rows]
    if rows and not any(isinstance(row, list) for row in rows):
        rows = [rows]
    for sequence, row in enumerate(rows):
        if not isinstance(row, list):
            raise ArgumentError(
                f"{name}: found {row!r:.40} as sequence {sequence}, expected a list of token ids"
            )
    return [_sequence(name, row, sequence, vocab_size) for sequence, row in enumerate(rows)]


def _sequence(name: str, row: Iterable[object], sequence: int, vocab_size: int) -> list[int]:
    ids = []
    for position, value in enumerate(row):
        token = _index(value)
        if token is None or not 0 <= token < vocab_size:
            where = f"in sequence {sequence} at {position}"
            raise ArgumentError(
                f"{name}: found {value!r:.40} {where}, expected an id in [0, {vocab_size})"
            )
        ids.append(token)
    return ids


def as_list(value: Any) -> Any:
    """Arrays, tensors and sequences as lists; anything else, text too, as it is."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return value.tolist()
    return (
        list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else value
    )
