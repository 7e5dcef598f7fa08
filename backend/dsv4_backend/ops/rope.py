"""Partial interleaved rotary embedding and its frequency tables (spec/v4.md 3.2, 3.3)."""

from __future__ import annotations

import math

import torch

from dsv4_backend.contract import Tolerance, compute, operator
from dsv4_backend.errors import argument_error
from dsv4_backend.relations import require


def rope_frequencies(rope_head_dim: int, theta: float) -> torch.Tensor:
    """Inverse frequencies `theta^(-2i / rope_head_dim)`: fp32 [rope_head_dim / 2] on the CPU.

    ArgumentError unless rope_head_dim is even and positive and theta > 1. Source:
    spec/v4.md 3.2 [OFF-M].
    """
    if rope_head_dim < 2 or rope_head_dim % 2:
        raise argument_error(
            "rope_frequencies", "rope_head_dim", rope_head_dim, "an even number >= 2"
        )
    if not theta > 1:
        raise argument_error("rope_frequencies", "theta", theta, "a number > 1")
    return 1.0 / theta ** (torch.arange(0, rope_head_dim, 2, dtype=torch.float32) / rope_head_dim)


def yarn_range(
    rope_head_dim: int,
    theta: float,
    original_max_position_embeddings: int,
    beta_fast: float,
    beta_slow: float,
) -> tuple[int, int]:
    """First and last index of the YaRN blend: below it frequencies stay,
    above it they are divided by the factor.
    """

    def index(rotations: float) -> float:
        wavelengths = original_max_position_embeddings / (2 * math.pi * rotations)
        return rope_head_dim * math.log(wavelengths) / (2 * math.log(theta))

    return max(math.floor(index(beta_fast)), 0), min(math.ceil(index(beta_slow)), rope_head_dim - 1)


def yarn_frequencies(
    rope_head_dim: int,
    theta: float,
    factor: float,
    original_max_position_embeddings: int,
    beta_fast: float,
    beta_slow: float,
) -> torch.Tensor:
    """`rope_frequencies` with YaRN's blend towards `frequency / factor`,
    no magnitude scaling: fp32, on the CPU.

    ArgumentError for a factor, length or beta that is not positive. Source: spec/v4.md 3.2 [OFF-M].
    """
    positive = {
        "factor": factor,
        "original_max_position_embeddings": original_max_position_embeddings,
        "beta_fast": beta_fast,
        "beta_slow": beta_slow,
    }
    for name, value in positive.items():
        if not value > 0:
            raise argument_error("yarn_frequencies", name, value, "a number > 0")
    frequencies = rope_frequencies(rope_head_dim, theta)
    low, high = yarn_range(
        rope_head_dim, theta, original_max_position_embeddings, beta_fast, beta_slow
    )
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(rope_head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return frequencies / factor * ramp + frequencies * (1 - ramp)


def rotation_angles(positions: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """One fp32 product per pair, even for fp64 golden values: the model was trained with it.
    fp32 [T, F].
    """
    return positions.float().unsqueeze(-1) * inv_freq.float()


def rotate_tail(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate the adjacent pairs of the last 2F channels by angles [T, F];
    the other channels are copied.
    """
    wide = compute(x)
    pairs = angles.shape[-1]
    kept = x.shape[-1] - 2 * pairs
    angles = angles.to(wide.dtype).view(x.shape[0], *(1 for _ in x.shape[1:-1]), pairs)
    cos, sin = angles.cos(), angles.sin()
    even, odd = wide[..., kept:].unflatten(-1, (pairs, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
    return torch.cat((x[..., :kept], rotated.to(x.dtype)), -1)


_ROW_PER_TOKEN = require(
    "x", "rank(x) >= 2 and size(x, 0) == T", "shape {sizes(x)}", "[T, ..., D] with T = {T}"
)


@operator(
    "rope(Tensor x, Tensor positions, Tensor inv_freq, bool inverse=False) -> Tensor",
    rows=(6,),
    arguments={"x": "float [..., D]", "positions": "int [T] in [0, inf)", "inv_freq": "f32 [F]"},
    relations=(
        _ROW_PER_TOKEN,
        require("inv_freq", "2 <= 2 * F <= D", "{F} frequencies", "1 to D/2 of them, D = {D}"),
    ),
    tolerance=Tolerance(
        reason="the angle is one exactly rounded fp32 product, so only fp32 cos, sin (1 ulp each) "
        "and two products may differ; the one cast to bf16 may land on the other "
        "neighbour (2^-7)",
        ideal=(2e-6, 1e-6),
        official=(2e-6, 2**-7),
    ),
)
def rope(
    x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, inverse: bool = False
) -> torch.Tensor:
    """Rotate the last 2F channels of x in adjacent pairs (2i, 2i+1)
    by `positions[t] * inv_freq[i]`.

    x: [T, ..., D] float with D >= 2F; positions: int [T], >= 0; inv_freq: fp32 [F]; inverse: rotate
    by minus the angle. The angle is one fp32 product (never fp64); cos, sin and rotation are fp32,
    one cast to x's dtype at the end. Returns a new tensor of x's shape and dtype; the first D - 2F
    channels are copied bit for bit. No magnitude scaling. T = 0 gives an empty result. Source:
    spec/v4.md 3.3 [OFF-M].
    """
    angles = rotation_angles(positions, inv_freq)
    return rotate_tail(x, -angles if inverse else angles)


def rotation_rows(
    positions: torch.Tensor, inv_freq: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) of every position as `apply_rope` takes them: fp32 [T, 2F] each."""
    angles = rotation_angles(positions, inv_freq)
    if angles.device.type == "cpu":
        # On Arm a value of torch's fp32 cosine depends on where in the tensor it stands.
        angles = angles.double()
    cos, sin = angles.cos().float(), angles.sin().float()
    return cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)


@operator(
    "apply_rope(Tensor(a!) x, Tensor cos, Tensor sin) -> ()",
    rows=(6,),
    arguments={"x": "float [..., D]", "cos": "f32 [T, r]", "sin": "f32 [T, r]"},
    relations=(
        _ROW_PER_TOKEN,
        require(
            "cos",
            "r % 2 == 0 and 2 <= r <= D",
            "{r} channels",
            "an even number of channels, 2 to D = {D}",
        ),
    ),
    tolerance=Tolerance(
        reason="two fp32 products and their sum; the one cast to bf16 may land on the other "
        "neighbour (2^-7)",
        ideal=(2e-6, 1e-6),
        official=(2e-6, 2**-7),
    ),
)
def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """`rope` in place, by rows that all layers of a step share (`rotation_rows`).

    x: [T, ..., D] float with D >= r, mutated; cos, sin: fp32 [T, r], r even, the value of pair
    (2i, 2i+1) of the last r channels at 2i and again at 2i+1. With -sin it rotates back. fp32
    inside, one cast to x's dtype; the first D - r channels keep their bits. Zero tokens change
    nothing. Source: spec/v4.md 3.3 [OFF-M].
    """
    tail = x[..., x.shape[-1] - cos.shape[-1] :]
    wide = compute(tail).clone()  # of fp32 too: gradients read it after it was overwritten
    turned = torch.stack((-wide[..., 1::2], wide[..., 0::2]), -1).flatten(-2)
    cos, sin = (_per_head(rows, x.dim()) for rows in (cos, sin))
    tail.copy_((wide * cos + turned * sin).to(x.dtype))


def _per_head(rows: torch.Tensor, dims: int) -> torch.Tensor:
    """[T, r] with as many dimensions as the tensor that it multiplies."""
    return rows.view(rows.shape[0], *(1 for _ in range(dims - 2)), rows.shape[1])
