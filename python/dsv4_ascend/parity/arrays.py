"""Tensors as NumPy arrays for oracles and back: by bits, never by torch's casts."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

_BY_BITS = {
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
    torch.float8_e8m0fnu: ml_dtypes.float8_e8m0fnu,
}
_BITS = {1: torch.uint8, 2: torch.int16}
_TORCH_TYPES = {np.dtype(array): tensor for tensor, array in _BY_BITS.items()}


def to_array(argument: Any) -> Any:
    """A copy of a tensor as an array: fp32 widened to float64,
    other floats in the type of the same bits.

    What is no tensor stays as it is.
    """
    if not isinstance(argument, torch.Tensor):
        return argument
    tensor = argument.detach().contiguous()
    if tensor.dtype in _BY_BITS:
        bits: NDArray[Any] = tensor.view(_BITS[tensor.element_size()]).numpy()
        return bits.view(_BY_BITS[tensor.dtype]).copy()
    array = tensor.numpy()
    return array.astype(np.float64) if array.dtype == np.float32 else array.copy()


def to_tensor(array: Any) -> Any:
    """The tensor of an oracle's result; None stays None."""
    if array is None:
        return None
    array = np.ascontiguousarray(array)
    if array.dtype in _TORCH_TYPES:
        bits = array.view(np.uint8 if array.itemsize == 1 else np.int16)
        return torch.from_numpy(bits.copy()).view(_TORCH_TYPES[array.dtype])
    return torch.from_numpy(array.copy())
