"""Hadamard rotation of indexer queries and keys (spec/v4.md 4.5)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dsv4_backend.contract import Case, Draw, Tolerance, compute, operator
from dsv4_backend.mutants import add_output_faults

_DTYPES = {"ideal": torch.float32, "official": torch.bfloat16}


@operator(
    "hadamard(Tensor x) -> Tensor",
    rows=(11,),
    arguments={"x": "float [..., n]"},
    tolerance=Tolerance(
        reason="fp32 sums of up to 512 terms of size 4 in any order stay within 4e-6; "
        "the one cast to bf16 may then land on the other neighbour (2^-8)",
        ideal=(4e-6, 1e-6),
        official=(4e-6, 2**-7),
    ),
)
def hadamard(x: torch.Tensor) -> torch.Tensor:
    """`H_n x / sqrt(n)` over the last dimension: H_1 = [1], H_2m = [[H, H], [H, -H]] (Sylvester, natural order).

    x: [..., n] float, n a power of two. Returns [..., n] in x's dtype: fp32 inside, one cast at the end. Applying it
    twice gives x back. NaN or infinity in a row spreads over the row. Source: spec/v4.md 4.5 item 2 [OFF-M].
    """
    return _transform(x)


def _transform(x: torch.Tensor) -> torch.Tensor:
    wide = compute(x)
    scale: float = x.shape[-1] ** -0.5
    return (wide @ sylvester(wide) * scale).to(x.dtype)


def sylvester(like: torch.Tensor) -> torch.Tensor:
    """The matrix H_n, [n, n] of +-1, in the dtype and on the device of `like` [..., n]."""
    h = torch.ones(1, 1, dtype=like.dtype, device=like.device)
    while h.shape[0] < like.shape[-1]:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


@hadamard.shapes
def _(x: torch.Tensor) -> None:
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise hadamard.reject("x", f"{n} channels", "a power of two")


@hadamard.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in _DTYPES.items():
        for shape in ((0, 128), (1, 1), (3, 2), (5, 16), (7, 128), (2, 64, 128), (2, 512)):
            yield Case("x".join(map(str, shape)), profile, (draw.normal(*shape, dtype=dtype),))
        yield Case("strided rows and channels", profile, (draw.normal(128, 6, dtype=dtype).T[::2],))
        special = draw.normal(4, 128, dtype=dtype)
        special[0, 3], special[1, 5], special[2] = torch.nan, torch.inf, 0.0
        yield Case("NaN, infinity, zero row", profile, (special,))
        large = draw.normal(3, 128, dtype=dtype, scale=2.0**-10) + 1
        yield Case("first coefficient alone", profile, (large,))


add_output_faults(hadamard, "last token zero", "stale tail of channels", "one NaN", "tokens shifted by one")


@hadamard.fault("not normalised")
def _(x: torch.Tensor) -> torch.Tensor:
    return (compute(x) @ sylvester(compute(x))).to(x.dtype)


@hadamard.fault("divided by n instead of its root")
def _(x: torch.Tensor) -> torch.Tensor:
    return (compute(x) @ sylvester(compute(x)) / x.shape[-1]).to(x.dtype)


@hadamard.fault("bit-reversed order")
def _(x: torch.Tensor) -> torch.Tensor:
    bits = x.shape[-1].bit_length() - 1
    order = [int(f"{i:0{bits}b}"[::-1], 2) for i in range(x.shape[-1])]
    return _transform(x)[..., order]


@hadamard.fault("sequency (Walsh) order")
def _(x: torch.Tensor) -> torch.Tensor:
    changes = (sylvester(x).diff(dim=0) != 0).sum(0)
    return _transform(x)[..., changes.argsort()]


@hadamard.fault("last butterfly left out")
def _(x: torch.Tensor) -> torch.Tensor:
    if x.shape[-1] == 1:
        return _transform(x)
    return torch.cat([_transform(half) for half in x.chunk(2, -1)], -1)


@hadamard.fault("random signs before the transform")
def _(x: torch.Tensor) -> torch.Tensor:
    signs = 1 - 2 * (torch.arange(x.shape[-1]) * 5 // 3 % 2)
    return _transform(x * signs.to(x.dtype))


@hadamard.fault("left out")
def _(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@hadamard.fault("every butterfly rounded to bf16")
def _(x: torch.Tensor) -> torch.Tensor:
    y, scale = x.bfloat16(), float(x.shape[-1] ** -0.5)
    width = 1
    while width < x.shape[-1]:
        pair = y.reshape(-1, x.shape[-1] // (2 * width), 2, width)
        y = torch.stack([pair[:, :, 0] + pair[:, :, 1], pair[:, :, 0] - pair[:, :, 1]], 2)
        width *= 2
    return (y.reshape(x.shape).float() * scale).to(x.dtype)
