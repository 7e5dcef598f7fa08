"""What the proofs of the V4 family's norms, products and quantisers share (see fused_check.py)."""

import ml_dtypes
import numpy as np
import torch
from aclnn import BUILTIN, typed
from fused_check import CANN, refused

FAMILY = CANN >= (9, 1)
STEP = 0.9e-4
"""A quantised value counts as this much: one step fits into a tolerance of 1e-4, two do not."""


FP8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)


def on_npu(value):
    if isinstance(value, list):
        return [on_npu(v) for v in value]
    if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
        return value
    return value.view(torch.uint8).npu().view(value.dtype) if value.dtype in FP8 else value.npu()


def empty(*shape, dtype=torch.float32):
    """An output that a kernel has not written: NaN, or all bits set."""
    x = torch.empty(shape, dtype=dtype, device="npu")
    x.view(torch.uint8).fill_(255)
    return x


def launch(symbol, library=BUILTIN, **arguments):
    library.call(symbol, **{name: on_npu(value) for name, value in arguments.items()})


def refuse(symbol, good, argument, code=161002, **replaced):
    """The call `good()` gives, with arguments replaced, is refused and names `argument`."""
    refused(symbol, lambda: launch(symbol, **{**good(), **replaced}), argument, code)


def absent(symbol, good):
    """The operator is refused as one that does not exist here."""
    refused(symbol, lambda: launch(symbol, **good()), "does not exist", 161002)


def bits(x):
    return np.ascontiguousarray(x, np.float32).view(np.uint32)


def hf32(x):
    """Cut to 10 explicit mantissa bits (spec/v4.md 2.4)."""
    return (bits(x) & 0xFFFFE000).view(np.float32).reshape(np.shape(x)).astype(float)


def rounded_hf32(x):
    """To the nearest of 10 explicit mantissa bits, ties to even: what HF32 does not do."""
    b = bits(x).astype(np.uint64)
    b = (b + 0xFFF + (b >> 13 & 1)) & 0xFFFFE000
    return b.astype(np.uint32).view(np.float32).reshape(np.shape(x)).astype(float)


def as_bf16(x):
    return np.asarray(x).astype(ml_dtypes.bfloat16).astype(float)


def as_f16(x):
    return np.asarray(x).astype(np.float16).astype(float)


def as_e4m3(x):
    return np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(float)


def round_up_exponent(scale):
    """The smallest power of two that is not below a positive fp32."""
    b = bits(scale).astype(np.int64)
    return (b >> 23) - 127 + ((b & 0x7FFFFF) != 0)


def int8_rows(x, top=127):
    """[scale of each row times `top`, quantised values times STEP]"""
    peak = np.abs(x).max(-1)
    scale = np.where(peak == 0, 1, peak / top)[..., None]
    return [peak, np.clip(np.rint(x / scale), -top - 1, top) * STEP]


def shown_int8(y, scale, top=127):
    return [scale * top, y.float() * STEP]


def e8m0(scale):
    """Exponents of E8M0 bytes, as numbers that `check` compares."""
    return scale.view(torch.uint8).cpu().float() - 127


def tiled(weight, dtype=2):
    """[..., K, N] int8 on the CPU as an NZ argument: tiles of 16 by 32, padded with zeros."""
    *batch, k, n = weight.shape
    tiles = (*batch, -(-n // 32), -(-k // 16), 16, 32)
    padded = np.zeros((*batch, tiles[-3] * 16, tiles[-4] * 32), np.int8)
    padded[..., :k, :n] = weight.numpy()
    split = padded.reshape(*batch, tiles[-3], 16, tiles[-4], 32)
    flat = torch.tensor(np.moveaxis(split, -2, -4).copy()).npu().flatten()
    return typed(flat[: weight.numel()].view(weight.shape), dtype, format=29, storage=tiles)


def from_fp8(x):
    return x.view(torch.uint8).cpu().view(x.dtype).float()


def randint8(rng, *shape):
    return torch.tensor(rng.integers(-127, 128, shape), dtype=torch.int8)
