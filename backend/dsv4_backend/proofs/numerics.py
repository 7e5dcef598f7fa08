"""Number formats for oracles,
by ml_dtypes and NumPy alone: nothing here is shared with the references.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BF16 = np.dtype(ml_dtypes.bfloat16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
E2M1 = np.dtype(ml_dtypes.float4_e2m1fn)
_LARGEST = {E4M3: 448.0, E2M1: 6.0}


def wide(x: Array) -> Array:
    """`x` in float64; exact for every format here."""
    return x.astype(np.float64)


def round_to(dtype: Any, x: Array) -> Array:
    """`x` rounded to nearest even in a type, back in float64.
    float64 itself rounds nothing (profile `ideal`).
    """
    if np.dtype(dtype) == np.float64:
        return wide(x)
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(np.float32).astype(dtype).astype(np.float64)


def cast(dtype: Any, x: Array) -> Array:
    """`x` as an array of a type, rounded once, by way of fp32 as the operators do;
    float64 stays as it is.
    """
    return round_to(dtype, x).astype(dtype)


def power_of_two_scale(amax: Array, largest: float, floor: float) -> Array:
    """Smallest 2^e with max(amax, floor) / 2^e <= largest, NaN where amax is not finite;
    float64 (spec 6.1, 6.2).
    """
    bounded = np.maximum(wide(amax), floor)
    mantissa, exponent = np.frexp(bounded / largest)
    power = np.where(mantissa == 0.5, exponent - 1, exponent)
    return np.where(np.isfinite(wide(amax)), np.ldexp(1.0, power), np.nan)


def quantise(dtype: Any, x: Array, block_size: int, floor: float) -> tuple[Array, Array]:
    """(codes of E4M3 or E2M1 [..., K], float64 scales [..., ceil(K / block_size)]) (spec 6.1, 6.2).

    A block with NaN or infinity has a NaN scale and codes cast from +NaN; the last may be short.
    """
    largest = _LARGEST[np.dtype(dtype)]
    codes = np.empty(x.shape, dtype)
    scales = np.empty((*x.shape[:-1], -(-x.shape[-1] // block_size)))
    for number in range(scales.shape[-1]):
        channels = slice(number * block_size, (number + 1) * block_size)
        block = wide(x[..., channels])
        scale = power_of_two_scale(np.abs(block).max(-1), largest, floor)[..., None]
        ratio = np.where(np.isnan(scale), np.nan, np.clip(block / scale, -largest, largest))
        codes[..., channels], scales[..., number] = cast(dtype, ratio), scale[..., 0]
    return codes, scales


def per_channel(scales: Array, block_size: int, channels: int) -> Array:
    """Scales [..., B] of blocks, repeated for each of their channels: [..., channels]."""
    return scales[..., np.arange(channels) // block_size]


def quantise_fp8(x: Array, block_size: int) -> tuple[Array, Array]:
    """(e4m3 codes [..., K], float64 scales) of activations (spec 6.1)."""
    return quantise(E4M3, x, block_size, 1e-4)


def quantise_fp4(x: Array, block_size: int) -> tuple[Array, Array]:
    """(e2m1 codes [..., K], float64 scales); codes under a NaN scale are +0 (spec 6.2)."""
    codes, scales = quantise(E2M1, x, block_size, 6 * 2.0**-126)
    unknown = np.isnan(per_channel(scales, block_size, x.shape[-1]))
    return np.where(unknown, np.zeros_like(codes), codes), scales


def dequantise(codes: Array, scales: Array, block_size: int) -> Array:
    """Codes times the scales of their blocks in fp32 (too large is infinite), as float64."""
    with np.errstate(over="ignore"):
        values = wide(codes) * per_channel(scales, block_size, codes.shape[-1])
        return wide(values.astype(np.float32))


def fp4_values(packed: Array) -> Array:
    """int8 [..., K/2] -> float64 e2m1 values [..., K], low nibble first (spec 6.3)."""
    codes = packed.view(np.uint8)
    both = np.stack([codes & 15, codes >> 4], -1).reshape(*packed.shape[:-1], -1)
    return wide(both.astype(np.uint8).view(E2M1))


def tile_values(values: Array, scale: Array, tile: tuple[int, int]) -> Array:
    """Matrix [N, K] times the scale of each element's tile; float64 (spec 6.3)."""
    product, (height, width) = wide(values), tile
    for n, k in np.ndindex(*scale.shape):
        rows, columns = slice(n * height, (n + 1) * height), slice(k * width, (k + 1) * width)
        product[rows, columns] *= wide(scale[n, k])
    return product


def fp8_quantised(x: Array, block: int) -> Array:
    """`x` [..., K] through e4m3 and back, float64; a block with a NaN or infinity is NaN (6.1)."""
    return dequantise(*quantise_fp8(x, block), block)


def _from_ties(steps: Array) -> Array:
    """How far values are from the middle of two integers."""
    return np.asarray(np.abs(np.abs(steps - np.floor(steps)) - 0.5))


def _bf16_steps(values: Array) -> Array:
    """From each value to its next bf16 neighbour, if it is one."""
    exponents = np.floor(np.log2(np.maximum(np.abs(values), 2.0**-120)))
    return np.asarray(np.exp2(exponents - 7))


def far_from_ties(steps: Array, margin: float = 2.0**-12) -> bool:
    """Whether no value lies so near the middle of two integers that the last bits of fp32 decide
    which one it rounds to.
    """
    return bool((_from_ties(steps) >= margin).all())


def far_from_bf16_ties(values: Array) -> bool:
    """The same for the middle of two bf16 neighbours."""
    return far_from_ties(values / _bf16_steps(values), 2.0**-13)


_SUM_ERROR = 2.0**-22
"""Of an fp32 sum in any usual order, beside the sum of its terms' magnitudes."""


def decided_products(rows: Array, weight: Array) -> Array:
    """Of which products of rows [M, K] with weight [N, K] fp32 sums in any usual order round to the
    same bf16 value: bool [M, N].
    """
    exact, terms = rows @ weight.T, np.abs(rows) @ np.abs(weight).T
    steps = _bf16_steps(exact)
    decided = terms * _SUM_ERROR < _from_ties(exact / steps) * steps
    return np.asarray(decided | (terms == 0))


def rms_normed(x: Array, weight: Array, eps: float) -> Array:
    """float64 of rows [.., D] times the weight [D] over their length (spec 3.1)."""
    length = np.sqrt(np.square(wide(x)).mean(-1, keepdims=True) + eps)
    return np.asarray(wide(x) / length * wide(weight))


def hadamard_signs(n: int) -> Array:
    """Sylvester's matrix: entry (i, j) is -1 to the number of bits that i and j share."""
    shared = np.arange(n)[:, None] & np.arange(n)
    signs = np.array([1.0 - 2.0 * (bin(bits).count("1") % 2) for bits in range(n)])
    return np.asarray(signs[shared])
