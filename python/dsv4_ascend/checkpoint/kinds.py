"""How msModelSlim stores quantised weights, and what a folder declares of each.

Names, shapes and dtypes are those that vllm-ascend's schemes register (spec/ascend-operators.md 6;
`vllm_ascend/quantization/methods`, September 2026).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dsv4_ascend.checkpoint.names import to_official
from dsv4_ascend.checkpoint.safetensors_file import checkpoint_error
from dsv4_ascend.checkpoint.strict_json import FileProblem, read_object

DESCRIPTION = "quant_model_description.json"
PLAIN = "FLOAT"
"""What a description says of a tensor that is not quantised."""
OFFSET, BIAS = ".weight_offset", ".scale_bias"
"""Endings of what stands beside a weight and is not read: zeros, as codes are symmetric, and an
intermediate sum of one kernel.
"""
_MAX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Kind:
    """A stored form of a matrix [N, K]: `weight`, and `weight_scale`.

    dtypes, scales: what both may be in a file. packed: how many codes a byte holds along N and
    along K. block: inputs that share a scale; 0 for a scale per row [N, 1], with offsets beside it.
    bias: whether `scale_bias` stands beside it too.
    """

    name: str
    dtypes: tuple[str, ...]
    scales: tuple[str, ...]
    packed: tuple[int, int] = (1, 1)
    block: int = 0
    bias: bool = False

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in the file of a logical shape."""
        return shape[0] // self.packed[0], shape[1] // self.packed[1]

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The shape of the scale."""
        return shape[0], -(-shape[1] // self.block) if self.block else 1


_FLOATS, _BYTES = ("F32", "BF16"), ("U8", "F8_E8M0")
W8A8 = Kind("W8A8_DYNAMIC", ("I8",), _FLOATS)
W4A8 = Kind("W4A8_DYNAMIC", ("I8",), _FLOATS, packed=(2, 1), bias=True)
"""Two rows in a byte, the even one in the low half."""
MXFP8 = Kind("W8A8_MXFP8", ("F8_E4M3",), _BYTES, block=32)
MXFP4 = Kind("W4A8_MXFP", ("U8", "I8"), _BYTES, packed=(1, 2), block=32)
KINDS = {kind.name: kind for kind in (W8A8, W4A8, MXFP8, MXFP4)}

Kinds = Mapping[str, Kind]
"""Official names of quantised weights -> how they are stored."""


def declared_kinds(folder: Path) -> Kinds:
    """What the folder's description says of its weights; nothing where it has none.

    CheckpointError for a description that is no unambiguous JSON object, or names a kind that is
    not read.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        return {}
    try:
        raw = read_object(path, _MAX_BYTES)
    except FileProblem as problem:
        raise checkpoint_error(folder, [f"{DESCRIPTION}: {problem}"]) from None
    told = {name: kind for name, kind in raw.items() if name.endswith(".weight")}
    unknown = {
        name: kind for name, kind in told.items() if kind != PLAIN and str(kind) not in KINDS
    }
    if unknown:
        name, kind = next(iter(unknown.items()))
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise checkpoint_error(
            folder,
            [
                f"{DESCRIPTION}: tensor {ascii(name)[:100]}{more}: found {ascii(kind)[:40]}, "
                f"expected {PLAIN} or one of {', '.join(KINDS)}"
            ],
        )
    return {to_official(name): KINDS[str(kind)] for name, kind in told.items() if kind != PLAIN}
