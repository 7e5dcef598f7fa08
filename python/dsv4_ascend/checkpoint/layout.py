"""The tensors that a configuration implies: official name -> logical shape,
dtypes, scale (spec/v4.md section 7).
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from dsv4_ascend.checkpoint.config import DSpark, V4Config
from dsv4_ascend.checkpoint.kinds import Kind, Kinds

FLOAT = ("BF16", "F32")
INTEGER = ("I64", "I32")
FP8 = "F8_E4M3"
FP4 = ("I8", "U8", "F4")
"""Packed e2m1: two per byte along the last dimension as I8 or U8,
or safetensors' own F4 with the logical shape.
"""
SCALE = ("F8_E8M0", "F32")
FP32_NAMES = ("attn_sink", ".ape", "gate.bias", "_fn", "_base", "_scale")
"""Endings of the names that releases store as F32, because they are used in fp32."""
FP8_TILE = 128
FP4_BLOCK = 32


class Entry(NamedTuple):
    """One weight. `shape` is logical; `dtypes` are the safetensors dtypes allowed on disk.

    `scale_name` names the scale of a weight that may be quantised, else None. Float weights
    have no scale. `kind` is how a converted folder stores the weight, None for official forms.
    """

    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = FLOAT
    scale_name: str | None = None
    kind: Kind | None = None

    def form(self, dtype: str) -> str:
        """What to call its form when it is stored as a safetensors dtype."""
        return self.kind.name if self.kind else "FP4" if dtype in FP4 else dtype

    @property
    def scale_dtypes(self) -> tuple[str, ...]:
        """The safetensors dtypes that its scale may have."""
        return SCALE if self.kind is None else self.kind.scales

    def stored_shape(self, dtype: str) -> tuple[int, ...]:
        """The shape in the file for a stored dtype: packed FP4 halves the last dimension,
        `F4` does not.
        """
        if self.kind is not None:
            return self.kind.stored_shape(self.shape)
        return (
            (*self.shape[:-1], self.shape[-1] // 2)
            if self.scale_name and dtype in ("I8", "U8")
            else self.shape
        )

    def scale_shape(self, dtype: str) -> tuple[int, ...] | None:
        """Shape of the scale for a stored dtype: FP8 tiles of 128x128,
        FP4 blocks of 32 inputs, None for floats.
        """
        if self.scale_name is None or dtype in FLOAT:
            return None
        if self.kind is not None:
            return self.kind.scale_shape(self.shape)
        rows, columns = self.shape
        if dtype == FP8:
            return (-(-rows // FP8_TILE), -(-columns // FP8_TILE))
        return (rows, columns // FP4_BLOCK)


Layout = dict[str, Entry]


def layout(config: V4Config) -> Layout:
    """Every weight of the model by official name, `mtp.N.*` included,
    scales not (see `Entry.scale_name`).
    """
    return dict(_all(config))


def declared(entries: Layout, kinds: Kinds) -> Layout:
    """The layout of a folder that declares its quantised weights: all others are floats."""
    return {
        name: entry
        if entry.scale_name is None
        else entry._replace(dtypes=kinds[name].dtypes, kind=kinds[name])
        if name in kinds
        else entry._replace(dtypes=FLOAT)
        for name, entry in entries.items()
    }


def parameter_count(entries: Layout) -> int:
    """Number of parameters;
    packed FP4 counts its values, scales and `tid2eid` tables do not count (spec 1.4).
    """
    return sum(prod(entry.shape) for name, entry in entries.items() if not name.endswith("tid2eid"))


def _all(config: V4Config) -> Iterator[tuple[str, Entry]]:
    d = config.hidden_size
    yield "embed.weight", Entry((config.vocab_size, d))
    for layer in range(config.num_hidden_layers):
        yield from _block(config, f"layers.{layer}", layer)
    yield "norm.weight", Entry((d,))
    yield from _head_collapse(config, "")
    yield "head.weight", Entry((config.vocab_size, d))
    for index in range(config.num_nextn_predict_layers):
        yield from _block(config, f"mtp.{index}", config.num_hidden_layers + index)
        if config.dspark is None:
            yield from _mtp_parts(config, f"mtp.{index}.")
        else:
            yield from _dspark_parts(config, config.dspark, index)


def _mtp_parts(config: V4Config, prefix: str) -> Iterator[tuple[str, Entry]]:
    d = config.hidden_size
    yield from (_linear(config, f"{prefix}{name}", d, d) for name in ("e_proj", "h_proj"))
    yield from ((f"{prefix}{name}.weight", Entry((d,))) for name in ("enorm", "hnorm", "norm"))
    yield from _head_collapse(config, prefix)


def _dspark_parts(config: V4Config, dspark: DSpark, stage: int) -> Iterator[tuple[str, Entry]]:
    """What a drafter adds to the blocks of its first and of its last stage (spec/v41.md 1.1)."""
    d, vocab = config.hidden_size, config.vocab_size
    rank, prefix = dspark.markov_rank, f"mtp.{stage}."
    if stage == 0:
        yield _linear(config, f"{prefix}main_proj", d, dspark.targets * d)
        yield f"{prefix}main_norm.weight", Entry((d,))
    if stage == config.num_nextn_predict_layers - 1:
        yield f"{prefix}norm.weight", Entry((d,))
        yield from _head_collapse(config, prefix)
        yield from (
            (f"{prefix}markov_head.markov_{w}.weight", Entry((vocab, rank))) for w in ("w1", "w2")
        )
        yield f"{prefix}confidence_head.proj.weight", Entry((1, d + rank))


def _block(config: V4Config, prefix: str, layer: int) -> Iterator[tuple[str, Entry]]:
    d, n = config.hidden_size, config.hc_mult
    for part in ("attn", "ffn"):
        yield f"{prefix}.{part}_norm.weight", Entry((d,))
        yield f"{prefix}.hc_{part}_fn", Entry(((2 + n) * n, n * d))
        yield f"{prefix}.hc_{part}_base", Entry(((2 + n) * n,))
        yield f"{prefix}.hc_{part}_scale", Entry((3,))
    yield from _attention(config, f"{prefix}.attn", layer)
    yield from _moe(config, f"{prefix}.ffn", layer)


def _attention(config: V4Config, prefix: str, layer: int) -> Iterator[tuple[str, Entry]]:
    d, width = config.hidden_size, config.num_attention_heads * config.head_dim
    projected = config.o_groups * config.o_lora_rank
    yield _linear(config, f"{prefix}.wq_a", config.q_lora_rank, d)
    yield f"{prefix}.q_norm.weight", Entry((config.q_lora_rank,))
    yield _linear(config, f"{prefix}.wq_b", width, config.q_lora_rank)
    yield _linear(config, f"{prefix}.wkv", config.head_dim, d)
    yield f"{prefix}.kv_norm.weight", Entry((config.head_dim,))
    yield _linear(config, f"{prefix}.wo_a", projected, width // config.o_groups)
    yield _linear(config, f"{prefix}.wo_b", d, projected)
    yield f"{prefix}.attn_sink", Entry((config.num_attention_heads,))
    if config.kind(layer) == "swa":
        return
    yield from _compressor(config, f"{prefix}.compressor", layer, config.head_dim)
    if config.kind(layer) == "csa":
        indexer = f"{prefix}.indexer"
        yield _linear(
            config,
            f"{indexer}.wq_b",
            config.index_n_heads * config.index_head_dim,
            config.q_lora_rank,
        )
        yield f"{indexer}.weights_proj.weight", Entry((config.index_n_heads, d))
        yield from _compressor(config, f"{indexer}.compressor", layer, config.index_head_dim)


def _compressor(
    config: V4Config, prefix: str, layer: int, head_dim: int
) -> Iterator[tuple[str, Entry]]:
    channels = head_dim * (2 if config.kind(layer) == "csa" else 1)
    yield f"{prefix}.ape", Entry((config.ratio(layer), channels))
    yield f"{prefix}.wkv.weight", Entry((channels, config.hidden_size))
    yield f"{prefix}.wgate.weight", Entry((channels, config.hidden_size))
    yield f"{prefix}.norm.weight", Entry((head_dim,))


def _moe(config: V4Config, prefix: str, layer: int) -> Iterator[tuple[str, Entry]]:
    d, m, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    yield f"{prefix}.gate.weight", Entry((experts, d))
    if config.is_hash_layer(layer):
        yield (
            f"{prefix}.gate.tid2eid",
            Entry((config.vocab_size, config.num_experts_per_tok), INTEGER),
        )
    else:
        yield f"{prefix}.gate.bias", Entry((experts,))
    shapes = {"w1": (m, d), "w2": (d, m), "w3": (m, d)}
    dtypes = _expert_dtypes(config)
    for expert in range(experts):
        for name, shape in shapes.items():
            stem = f"{prefix}.experts.{expert}.{name}"
            yield f"{stem}.weight", Entry(shape, dtypes, f"{stem}.scale")
    for name, (rows, columns) in shapes.items():
        yield _linear(config, f"{prefix}.shared_experts.{name}", rows, columns)


def _head_collapse(config: V4Config, prefix: str) -> Iterator[tuple[str, Entry]]:
    n = config.hc_mult
    yield f"{prefix}hc_head_fn", Entry((n, n * config.hidden_size))
    yield f"{prefix}hc_head_base", Entry((n,))
    yield f"{prefix}hc_head_scale", Entry((1,))


def _linear(config: V4Config, stem: str, rows: int, columns: int) -> tuple[str, Entry]:
    dtypes = (FP8, *FLOAT) if config.quantized else FLOAT
    return f"{stem}.weight", Entry((rows, columns), dtypes, f"{stem}.scale")


def _expert_dtypes(config: V4Config) -> tuple[str, ...]:
    if not config.quantized:
        return FLOAT
    if (
        config.expert_dtype == "fp8"
        or config.hidden_size % FP4_BLOCK
        or config.moe_intermediate_size % FP4_BLOCK
    ):
        return (FP8, *FLOAT)
    return (*FP4, *FLOAT) if config.expert_dtype == "fp4" else (*FP4, FP8, *FLOAT)
