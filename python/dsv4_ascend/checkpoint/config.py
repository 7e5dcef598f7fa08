"""What a V4 model is: sizes, layer kinds, RoPE, routing (spec/v4.md section 1).
Field names are the hub's.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from dsv4_ascend.checkpoint.problems import listed
from dsv4_backend.errors import ConfigError

LayerKind = Literal["swa", "csa", "hca"]
"""swa: window only. csa: overlapped compression and an indexer (official ratio 4).
hca: compression, no indexer.
"""

EXPERT_DTYPES = ("fp4", "fp8")


@dataclass(frozen=True)
class RopeScaling:
    """YaRN of the compressed layers (spec 3.2): `beta_fast`,
    `beta_slow` in rotations over the original length.
    """

    factor: float = 16.0
    original_max_position_embeddings: int = 65536
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class DSpark:
    """The drafter of the releases since June 2026 (spec/v41.md 1.1), which replaces the MTP blocks.

    Its stages are the `mtp.N` blocks, `num_nextn_predict_layers` of them. markov_rank: R of
    `markov_head`; targets: how many layers' streams `main_proj` reads. The rest is None where only
    the tensors tell of a drafter.
    """

    markov_rank: int
    targets: int
    target_layer_ids: tuple[int, ...] | None = None
    block_size: int | None = None
    noise_token_id: int | None = None


@dataclass(frozen=True, kw_only=True)
class V4Config:
    """One model. Construction raises ConfigError listing every contradiction by field name.

    `compress_ratios` and `layer_kinds` have one entry per layer, then one per draft layer, which is
    always "swa": an MTP block, or one of DSpark's stages if `dspark` is there. `swiglu_limit`
    infinity means no clamp. `rope_scaling` None means plain RoPE everywhere. `quantized` False
    means that every weight is BF16 or F32; `expert_dtype` None leaves FP4 or FP8 experts to the
    checkpoint. Ids may be absent (None, ()).
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_hash_layers: int
    routed_scaling_factor: float
    swiglu_limit: float
    compress_ratios: tuple[int, ...]
    layer_kinds: tuple[LayerKind, ...]
    rope_theta: float
    compress_rope_theta: float
    rope_scaling: RopeScaling | None
    num_nextn_predict_layers: int
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 1048576
    bos_token_id: int | None = 0
    eos_token_ids: tuple[int, ...] = (1,)
    quantized: bool = False
    expert_dtype: str | None = field(default=None)
    dspark: DSpark | None = None

    def __post_init__(self) -> None:
        problems = contradictions({f.name: getattr(self, f.name) for f in fields(self)})
        if problems:
            raise config_error("V4Config", problems)

    @classmethod
    def flash(cls) -> V4Config:
        """DeepSeek-V4-Flash (spec 1.1, 1.2): 43 layers, 2 SWA, 21 CSA, 20 HCA."""
        return cls(
            hidden_size=4096, num_hidden_layers=43, num_attention_heads=64, q_lora_rank=1024,
            o_groups=8, index_topk=512, n_routed_experts=256, moe_intermediate_size=2048,
            routed_scaling_factor=1.5, **_schedule([0, 0] + [4, 128] * 20 + [4, 0]), **_FAMILY,
        )  # fmt: skip

    @classmethod
    def pro(cls) -> V4Config:
        """DeepSeek-V4-Pro (spec 1.1, 1.2): 61 layers, 30 CSA, 31 HCA."""
        return cls(
            hidden_size=7168, num_hidden_layers=61, num_attention_heads=128, q_lora_rank=1536,
            o_groups=16, index_topk=1024, n_routed_experts=384, moe_intermediate_size=3072,
            routed_scaling_factor=2.5, **_schedule([128, 128] + [4, 128] * 29 + [4, 0]), **_FAMILY,
        )  # fmt: skip

    @property
    def eos_token_id(self) -> int | None:
        """The first end-of-sequence id, or None."""
        return self.eos_token_ids[0] if self.eos_token_ids else None

    def ratio(self, layer: int) -> int:
        """Compression ratio of a layer, 0 for "swa";
        MTP layer j is layer `num_hidden_layers + j`.
        """
        return self.compress_ratios[layer]

    def kind(self, layer: int) -> LayerKind:
        """Attention kind of a layer; MTP layer j is layer `num_hidden_layers + j`."""
        return self.layer_kinds[layer]

    def is_hash_layer(self, layer: int) -> bool:
        """Whether experts come from the token-id table; never for MTP layers (spec 1.2)."""
        return layer < self.num_hash_layers

    def with_drafts(self, count: int, dspark: DSpark | None = None) -> V4Config:
        """The same model with `count` draft layers: DSpark's stages,
        or MTP blocks if `dspark` is None.
        """
        kept = self.num_hidden_layers
        windows: list[LayerKind] = ["swa"] * count
        return replace(
            self,
            num_nextn_predict_layers=count,
            compress_ratios=self.compress_ratios[:kept] + (0,) * count,
            layer_kinds=(*self.layer_kinds[:kept], *windows),
            dspark=dspark,
        )

    def with_layers(self, ratios: Sequence[int]) -> V4Config:
        """The same widths in layers of these compression ratios, without draft layers."""
        return replace(self.without_mtp(), num_hidden_layers=len(ratios), **_schedule(ratios))

    def without_mtp(self) -> V4Config:
        """The same model without its draft layers."""
        return self.with_drafts(0)


def kinds_of_ratios(ratios: Sequence[int]) -> tuple[LayerKind, ...]:
    """The official meaning of `compress_ratios`: 0 is "swa",
    4 is "csa", anything else "hca" (spec 1.2, 4.3).
    """
    return tuple("swa" if ratio == 0 else "csa" if ratio == 4 else "hca" for ratio in ratios)


def _schedule(ratios: Sequence[int]) -> dict[str, Any]:
    return {"compress_ratios": tuple(ratios), "layer_kinds": kinds_of_ratios(ratios)}


_FAMILY: dict[str, Any] = {
    "vocab_size": 129280, "head_dim": 512, "qk_rope_head_dim": 64, "o_lora_rank": 1024,
    "sliding_window": 128, "index_n_heads": 64, "index_head_dim": 128, "num_experts_per_tok": 6,
    "num_hash_layers": 3, "swiglu_limit": 10.0, "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0, "rope_scaling": RopeScaling(), "num_nextn_predict_layers": 1,
    "quantized": True, "expert_dtype": "fp4",
}  # fmt: skip
"""Values that Flash and Pro share."""


def config_error(where: str, problems: Sequence[str]) -> ConfigError:
    """One ConfigError for all problems of one configuration."""
    return ConfigError(listed(where, problems))


def found(name: str, value: object, expected: str) -> str:
    """The standard line of a problem; long values are cut."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        text = "a huge integer"
    return f"{name}: found {text if len(text) <= 80 else text[:77] + '...'}, expected {expected}"


_POSITIVE_INTS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim",
    "qk_rope_head_dim", "q_lora_rank", "o_groups", "o_lora_rank", "sliding_window", "index_n_heads",
    "index_head_dim", "index_topk", "n_routed_experts", "num_experts_per_tok",
    "moe_intermediate_size", "hc_mult", "hc_sinkhorn_iters", "max_position_embeddings",
)  # fmt: skip
_COUNTS = ("num_hash_layers", "num_nextn_predict_layers")
_POSITIVE_NUMBERS = ("routed_scaling_factor", "rope_theta", "compress_rope_theta")
_EPSILONS = ("hc_eps", "rms_norm_eps")
_MAX_INT = 2**31 - 1
_MAX_LAYERS = 4096
_MAX_TENSORS = 200_000


def is_int(value: object) -> bool:
    """A plain integer that fits int32; True and False are not integers."""
    return type(value) is int and -_MAX_INT <= value <= _MAX_INT


def is_number(value: object) -> bool:
    """A finite int or float, which a float can hold; True and False are not numbers."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


def _is_size(value: object) -> bool:
    return is_int(value) and value > 0  # type: ignore[operator]


def _is_id(value: object) -> bool:
    return is_int(value) and value >= 0  # type: ignore[operator]


def _are_layers(value: object) -> bool:
    return value is None or (isinstance(value, tuple) and all(map(_is_id, value)))


_DRAFTER: dict[str, tuple[Callable[[object], bool], str]] = {
    "markov_rank": (_is_size, "a positive integer"),
    "targets": (_is_size, "a positive integer"),
    "target_layer_ids": (_are_layers, "layer numbers >= 0"),
    "block_size": (lambda v: v is None or _is_size(v), "a positive integer"),
    "noise_token_id": (lambda v: v is None or _is_id(v), "a token id >= 0"),
}
"""Field of DSpark -> what it accepts, and how a message says it."""


def wrong_drafter(values: Mapping[str, object]) -> dict[str, str]:
    """The fields of DSpark among `values` that cannot be, each with what is expected of it."""
    rules = ((name, *_DRAFTER[name]) for name in values)
    return {name: expected for name, accepts, expected in rules if not accepts(values[name])}


def contradictions(values: dict[str, Any]) -> list[str]:
    """Every reason why these field values are no V4 model;
    what fields say together is checked once all are there.
    """
    problems = list(_wrong_types(values))
    if problems or len(values) < len(fields(V4Config)):
        return problems
    return [
        *_wrong_sizes(values),
        *_wrong_layers(values),
        *_wrong_rope(values),
        *_wrong_quantisation(values),
    ]


def _wrong_types(values: dict[str, Any]) -> Iterator[str]:
    checks = (
        (_POSITIVE_INTS, lambda v: is_int(v) and v > 0, "a positive integer"),
        (_COUNTS, lambda v: is_int(v) and v >= 0, "an integer >= 0"),
        (_POSITIVE_NUMBERS, lambda v: is_number(v) and v > 0, "a positive number"),
        (
            ("swiglu_limit",),
            lambda v: v == math.inf or (is_number(v) and v > 0),
            "a positive number or infinity",
        ),
        (_EPSILONS, lambda v: is_number(v) and v >= 0, "a number >= 0"),
        (("quantized",), lambda v: type(v) is bool, "True or False"),
        (
            ("expert_dtype",),
            lambda v: v is None or v in EXPERT_DTYPES,
            f"None or one of {EXPERT_DTYPES}",
        ),
        (
            ("compress_ratios",),
            lambda v: isinstance(v, tuple) and all(map(is_int, v)),
            "a tuple of integers",
        ),
        (
            ("layer_kinds",),
            lambda v: isinstance(v, tuple) and set(v) <= {"swa", "csa", "hca"},
            "swa, csa or hca",
        ),
        (
            ("rope_scaling",),
            lambda v: v is None or isinstance(v, RopeScaling),
            "None or RopeScaling",
        ),
        (("dspark",), lambda v: v is None or isinstance(v, DSpark), "None or DSpark"),
        (("bos_token_id",), lambda v: v is None or is_int(v), "None or an integer"),
        (
            ("eos_token_ids",),
            lambda v: isinstance(v, tuple) and all(map(is_int, v)),
            "a tuple of integers",
        ),
    )
    for names, accepts, expected in checks:
        present = (name for name in names if name in values)
        yield from (
            found(name, values[name], expected) for name in present if not accepts(values[name])
        )
    dspark = values.get("dspark")
    drafter = vars(dspark) if isinstance(dspark, DSpark) else {}
    wrong = wrong_drafter(drafter).items()
    yield from (found(f"dspark.{name}", drafter[name], expected) for name, expected in wrong)


def _wrong_sizes(values: dict[str, Any]) -> Iterator[str]:
    heads, groups = values["num_attention_heads"], values["o_groups"]
    rope, vocab = values["qk_rope_head_dim"], values["vocab_size"]
    if heads % groups:
        yield found("o_groups", groups, f"a divisor of num_attention_heads {heads}")
    if values["num_experts_per_tok"] > values["n_routed_experts"]:
        yield found(
            "num_experts_per_tok",
            values["num_experts_per_tok"],
            f"<= n_routed_experts {values['n_routed_experts']}",
        )
    if rope % 2 or rope > values["head_dim"]:
        yield found("qk_rope_head_dim", rope, f"an even number <= head_dim {values['head_dim']}")
    if "csa" in values["layer_kinds"] and rope > values["index_head_dim"]:
        yield found("qk_rope_head_dim", rope, f"<= index_head_dim {values['index_head_dim']}")
    tokens = [
        ("bos_token_id", values["bos_token_id"]),
        *(("eos_token_id", token) for token in values["eos_token_ids"]),
    ]
    for name, token in tokens:
        if token is not None and not 0 <= token < vocab:
            yield found(name, token, f"an id in [0, vocab_size {vocab})")


def _wrong_layers(values: dict[str, Any]) -> Iterator[str]:
    layers, mtp = values["num_hidden_layers"], values["num_nextn_predict_layers"]
    ratios, kinds = values["compress_ratios"], values["layer_kinds"]
    if layers + mtp > _MAX_LAYERS:
        yield found("num_hidden_layers", layers, f"at most {_MAX_LAYERS} layers")
    if (layers + mtp) * values["n_routed_experts"] * 3 > _MAX_TENSORS:
        yield found(
            "n_routed_experts",
            values["n_routed_experts"],
            f"at most {_MAX_TENSORS} tensors in all layers",
        )
    if values["num_hash_layers"] > layers:
        yield found("num_hash_layers", values["num_hash_layers"], f"<= num_hidden_layers {layers}")
    if len(ratios) != len(kinds):
        yield found("layer_kinds", len(kinds), f"as many entries as compress_ratios, {len(ratios)}")
    if len(ratios) != layers + mtp:
        expected = (
            f"{layers + mtp} entries (num_hidden_layers {layers} + num_nextn_predict_layers {mtp})"
        )
        yield found("compress_ratios", f"{len(ratios)} entries", expected)
        return
    for layer, (ratio, kind) in enumerate(zip(ratios, kinds, strict=False)):
        if (ratio == 0) != (kind == "swa") or ratio < 0 or ratio == 1:
            yield found(
                f"compress_ratios[{layer}]",
                ratio,
                "0" if kind == "swa" else f">= 2 for kind {kind}",
            )
        if layer >= layers and kind != "swa":
            yield found(f"compress_ratios[{layer}]", ratio, "0 for an MTP layer")


def _wrong_rope(values: dict[str, Any]) -> Iterator[str]:
    scaling = values["rope_scaling"]
    if scaling is None:
        return
    if not (is_number(scaling.factor) and scaling.factor >= 1):
        yield found("rope_scaling.factor", scaling.factor, "a number >= 1")
    if not (
        is_int(scaling.original_max_position_embeddings)
        and scaling.original_max_position_embeddings > 0
    ):
        original = scaling.original_max_position_embeddings
        yield found("rope_scaling.original_max_position_embeddings", original, "a positive integer")
    betas = (scaling.beta_fast, scaling.beta_slow)
    if not (all(map(is_number, betas)) and betas[0] >= betas[1] > 0):
        yield found(
            "rope_scaling.beta_fast, beta_slow", betas, "numbers with beta_fast >= beta_slow > 0"
        )


def _wrong_quantisation(values: dict[str, Any]) -> Iterator[str]:
    if values["expert_dtype"] and not values["quantized"]:
        yield found("expert_dtype", values["expert_dtype"], "None, as the model is not quantised")
    if values["expert_dtype"] == "fp4":
        for name in ("hidden_size", "moe_intermediate_size"):
            if values[name] % 32:
                yield found(
                    name, values[name], "a multiple of 32 for FP4 experts (one scale per 32 inputs)"
                )
