"""Tensors bit by bit, and as arrays of ml_dtypes' types."""

import ml_dtypes
import torch
from seeds import generator


def bits(tensor):
    return tensor.contiguous().view(
        {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    )


def as_numpy(tensor):
    """numpy array of a float8, bf16 or fp32 tensor, in ml_dtypes' types: no conversion by torch."""
    names = {
        torch.float8_e4m3fn: "float8_e4m3fn",
        torch.float8_e8m0fnu: "float8_e8m0fnu",
        torch.bfloat16: "bfloat16",
    }
    if tensor.dtype not in names:
        return tensor.numpy()
    return bits(tensor).numpy().view(getattr(ml_dtypes, names[tensor.dtype]))


def same_bits(got, want):
    return (
        got.dtype == want.dtype and got.shape == want.shape and torch.equal(bits(got), bits(want))
    )


def spread(*shape, seed=0):
    source = generator(seed)
    rows = torch.randint(-12, 12, (*shape[:-1], 1), generator=source).float().exp2()
    return torch.randn(shape, generator=source) * rows
