"""FLOAT8, FLOAT4 and INT4 in NumPy, by tables of their values: independent of any cast of torch."""

import numpy as np


def _magnitudes(exponent_bits, mantissa_bits, count, bias):
    code = np.arange(count)
    exponent, mantissa = code >> mantissa_bits, (code & (2**mantissa_bits - 1)) / 2**mantissa_bits
    return np.where(
        exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent - bias)
    )


# Magnitudes by code; the codes behind the last one are NaN or infinite.
MAGNITUDES = {
    "e4m3": _magnitudes(4, 3, 0x7F, 7),
    "e5m2": _magnitudes(5, 2, 0x7C, 15),
    "e2m1": _magnitudes(2, 1, 8, 1),
}
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0, "e2m1": 6.0}
LARGEST_EXPONENT = {"e4m3": 8, "e5m2": 15, "e2m1": 2}


def encode(x, kind, mode="rint", overflow="largest"):
    """Codes (one to a byte) of x, whose overflow is the largest value, or NaN.
    Modes: rint (ties to even), round (ties away), floor, trunc.
    """
    table = MAGNITUDES[kind]
    x = np.asarray(x, np.float64)
    size = np.minimum(np.nan_to_num(np.abs(x), posinf=np.inf), table[-1])
    below = np.searchsorted(table, size, "right") - 1
    above = np.minimum(below + 1, len(table) - 1)
    rest, half = size - table[below], (table[above] - table[below]) / 2
    up = (rest > half) | ((rest == half) & (half > 0) & (above % 2 == 0))
    if mode == "round":
        up = (rest >= half) & (half > 0)
    if mode == "floor":
        up = np.signbit(x) & (rest > 0)
    if mode == "trunc":
        up = np.zeros(x.shape, bool)
    sign = 8 if kind == "e2m1" else 128
    code = np.where(up, above, below) + sign * np.signbit(x)
    if overflow == "NaN" and kind != "e2m1":
        code = np.where(np.abs(x) > table[-1], 0x7F, code)
    return np.where(np.isnan(x), 0 if kind == "e2m1" else 0x7F, code).astype(np.uint8)


def decode(code, kind):
    sign = 8 if kind == "e2m1" else 128
    table = MAGNITUDES[kind]
    size = np.concatenate([table, np.full(sign - len(table), np.nan)])[code % sign]
    return np.where(code >= sign, -size, size)


def scale_of(byte):
    """FLOAT8_E8M0: a power of two, 255 is NaN."""
    return np.where(byte == 255, np.nan, 2.0 ** (byte.astype(float) - 127))


def pack(nibbles, swapped=False):
    pairs = (np.asarray(nibbles).astype(np.int64) & 15).reshape(*nibbles.shape[:-1], -1, 2)
    low, high = (pairs[..., 1], pairs[..., 0]) if swapped else (pairs[..., 0], pairs[..., 1])
    return (low | high << 4).astype(np.uint8)


def unpack(bytes_):
    return np.stack([bytes_ & 15, bytes_ >> 4], -1).reshape(*bytes_.shape[:-1], -1)


def signed(nibbles):
    return nibbles.astype(np.int64) - 16 * (nibbles > 7)
