"""Operands of the grouped products: quantised values as the device takes them, and as numbers."""

import numpy as np
import torch
import torch_npu
from fused_check import A5, array, rng

torch.npu.config.allow_internal_format = not A5
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def i8(*shape):
    return torch.tensor(rng.integers(-128, 128, shape), dtype=torch.int8)


def i4(*shape):
    return torch.tensor(rng.integers(-8, 8, shape), dtype=torch.int8)


def fp8(*shape, dtype=torch.float8_e4m3fn):
    return torch.tensor(rng.standard_normal(shape), dtype=torch.float32).to(dtype)


def e8m0(*shape):
    return torch.tensor(rng.integers(120, 132, shape), dtype=torch.uint8)


def positive(*shape, dtype=torch.float32):
    return torch.tensor(rng.uniform(0.01, 0.1, shape), dtype=dtype)


def pack4(nibbles):
    """Two values to a byte, the even one in the low half."""
    return (nibbles[..., 0::2] & 15 | (nibbles[..., 1::2] & 15) << 4).to(torch.uint8)


def as_int32(values):
    """int4 values, eight to an int32."""
    return pack4(values).contiguous().view(torch.int32)


def codes4(*shape):
    return torch.tensor(rng.integers(0, 16, shape), dtype=torch.uint8)


def exponent(codes):
    return 2.0 ** (np.asarray(codes, dtype=float) - 127)


def low64(scale):
    """fp32 in the low half of an int64."""
    return torch.tensor(np.asarray(scale, dtype=np.float32).view(np.uint32).astype(np.int64))


def nz(weight):
    return torch_npu.npu_format_cast(weight.npu(), 29)


def tiles(x, width):
    """[E, K, N] -> [E, N / width, K / 16, 16, width]."""
    e, k, n = x.shape
    return x.reshape(e, k // 16, 16, n // width, width).permute(0, 3, 1, 2, 4).contiguous()


def spans(groups, kind):
    """(expert, start, end) of each group."""
    groups = array(groups)
    if kind == 2:
        ends = np.cumsum(groups[:, 1])
        return [(int(e), int(end - n), int(end)) for (e, n), end in zip(groups, ends, strict=True)]
    ends = np.cumsum(groups) if kind == 1 else groups
    return [(i, int(ends[i - 1]) if i else 0, int(end)) for i, end in enumerate(ends)]


def as_ends(groups, kind):
    return spans(
        torch.tensor(np.maximum.accumulate(array(groups).astype(int))) if kind == 1 else groups,
        1 - kind,
    )


def lost_last(groups, kind):
    found = spans(groups, kind)
    return [span for span in found if span[2] != max(end for _, _, end in found)]


GROUP_FAULTS = {
    "ends and counts swapped": dict(
        spans=lambda groups, kind: spans(groups, kind) if kind == 2 else as_ends(groups, kind)
    ),
    "first weight for all": dict(
        spans=lambda groups, kind: [(0, s, e) for _, s, e in spans(groups, kind)]
    ),
    "weights rotated": dict(
        spans=lambda groups, kind: [
            ((w + 1) % len(groups), s, e) for w, s, e in spans(groups, kind)
        ]
    ),
    "one row more": dict(
        spans=lambda groups, kind: [
            (w, s + (i > 0), e + (i == 0)) for i, (w, s, e) in enumerate(spans(groups, kind))
        ]
    ),
    "last group lost": dict(spans=lost_last),
}
"""Faults that every grouped operator could have."""
COUNT_FAULTS = {
    name: replaced for name, replaced in GROUP_FAULTS.items() if name != "ends and counts swapped"
}
