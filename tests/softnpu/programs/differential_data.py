"""Random arguments of the calls of differential_calls.py: values, views,
and pairs of tensors that live on both devices.
"""

import random

import torch
import torch_npu  # noqa: F401
from seeds import seed

rng = random.Random(seed())
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def values(shape, dtype):
    if dtype == torch.bool:
        return torch.rand(shape) > 0.5
    if dtype in INTS:
        return torch.randint(0, 7, shape).to(dtype)
    return (torch.randn(shape) * 2).to(dtype)


def view(base):
    """A random view of a tensor: permuted, sliced, with an offset, expanded, or as it is."""
    kind = rng.choice(["as-is", "permute", "slice", "step", "select", "expand", "flat"])
    if kind == "permute" and base.dim() > 1:
        return base.permute(*rng.sample(range(base.dim()), base.dim()))
    if kind == "slice" and base.dim() and base.shape[0] > 1:
        return base[1:]
    if kind == "step" and base.dim() and base.shape[-1] > 2:
        return base[..., ::2]
    if kind == "select" and base.dim() > 1 and base.shape[1]:
        return base.select(1, base.shape[1] - 1)
    if kind == "expand" and base.dim() < 4:
        return base.unsqueeze(0).expand(2, *base.shape)
    return base.reshape(-1) if kind == "flat" else base


class Pair:
    """The same view of the same storage on both devices."""

    def __init__(self, dtype=None, shape=None, plain=False):
        self.dtype = dtype or rng.choice(FLOATS + INTS + (torch.bool, torch.float64))
        shape = (
            [
                rng.choice((0, 1, 2, 3, 4, 5, 7)) if rng.random() < 0.15 else rng.randint(1, 6)
                for _ in range(rng.randint(0, 4))
            ]
            if shape is None
            else shape
        )
        base = values(shape, self.dtype)
        state = rng.getstate()
        self.cpu = base if plain else view(base)
        rng.setstate(state)
        self.npu = base.npu() if plain else view(base.npu())
        assert self.npu.shape == self.cpu.shape and self.npu.stride() == self.cpu.stride()


def floats(**k):
    return Pair(rng.choice(FLOATS), **k)


def like(pair, plain=True):
    return Pair(pair.dtype, list(pair.cpu.shape), plain=plain)


def dim_of(pair):
    return rng.randrange(-pair.cpu.dim(), pair.cpu.dim()) if pair.cpu.dim() else 0
