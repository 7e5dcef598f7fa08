"""What adapters of engines share: cache parts as engines are told of them, a step from the tables
that they give back, and the weights of a share of the model. Needs no engine.

An engine groups parts by its own rules and finds common prefixes at multiples of the least common
multiple of all groups' blocks: 256 tokens with `BLOCKS`. In packed layouts a block is as wide as
its widest group; with `BLOCKS` that is the entries' one, so that windows and states cost nothing
per token (docs/serving.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from dsv4_ascend.checkpoint.config import V4Config
from dsv4_ascend.checkpoint.folder import Checkpoint, open_checkpoint
from dsv4_ascend.model.batch import Batch, build_batch
from dsv4_ascend.model.cache import PagedCache
from dsv4_ascend.model.cache_parts import layer_parts
from dsv4_ascend.model.paged import BytePaged, ByteRows, LayerCache, Paged
from dsv4_ascend.model.parallel import Parallel
from dsv4_ascend.model.profile import Profile
from dsv4_ascend.model.sharding import Sharding
from dsv4_ascend.model.step import Step, make_step
from dsv4_ascend.model.transformer import Transformer
from dsv4_ascend.model.weights import assign_all
from dsv4_backend.errors import EnvironmentFault


class Blocks(NamedTuple):
    """Tokens per block: of entries (and index keys) and of states by kind of layer, of windows."""

    entries: Mapping[str, int]
    states: Mapping[str, int]
    window: int

    def of(self, kind: str, name: str) -> int:
        """Tokens per block of the part `name` of a layer of this kind."""
        if name == "window":
            return self.window
        return (self.states if name.endswith("state") else self.entries)[kind]


BLOCKS = Blocks({"csa": 256, "hca": 256}, {"csa": 4, "hca": 8}, 64)


def ascend_blocks(rows: int) -> Blocks:
    """Those that vllm-ascend's planning of memory takes: entries in pages of so many rows, the same
    for both kinds of layers, states in pages that are no larger, on any chip.

    Common prefixes are found every 128 * rows tokens, as with vllm-ascend's own class.
    """
    return Blocks({"csa": 4 * rows, "hca": 128 * rows}, {"csa": rows // 16, "hca": rows // 8}, rows)


class CachePart(NamedTuple):
    """One part of one layer's cache, as an engine has to be told of it.

    layer: number of the block, MTP blocks behind the layers. name: the field of `LayerCache`.
    width, dtype: of a row of the tensor. tokens: per row. window: how many tokens it keeps, those
    of a step's first query among them; None: all. block: tokens per block. rows: what its bytes
    hold, None for floats.
    """

    layer: int
    name: str
    width: int
    dtype: torch.dtype
    tokens: int
    window: int | None
    block: int
    rows: ByteRows | None = None

    @property
    def key(self) -> str:
        """A name for engines, with the layer as its only number."""
        return f"layers.{self.layer}.attn.{self.name}"

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.width * self.dtype.itemsize

    def paged(self, pages: torch.Tensor, table: torch.Tensor) -> Paged:
        """Pages [num_blocks, rows per block, width], of any stride between blocks, and block ids
        int32 [R, columns], as the network takes them.
        """
        if self.rows is None:
            return Paged(pages, table)
        return BytePaged(pages.flatten(1), table, self.rows._replace(block_size=pages.shape[1]))


def cache_parts(config: V4Config, profile: Profile, blocks: Blocks = BLOCKS) -> list[CachePart]:
    """Every part of every layer, layer by layer, those of MTP blocks last.

    config: as this rank's attention has it; caches are whole on every rank.
    """
    kinds = zip(config.layer_kinds, config.compress_ratios, strict=True)
    return [
        CachePart(
            layer, p.name, p.width, p.dtype, p.tokens, p.kept, blocks.of(kind, p.name), p.rows
        )
        for layer, (kind, ratio) in enumerate(kinds)
        for p in layer_parts(kind, ratio, config, profile.caches, profile.dtype)
    ]


def entry_block_bytes(parts: Iterable[CachePart]) -> int:
    """Bytes that a block of entries leaves behind for good: the least that any engine can use."""
    lasting = (part for part in parts if part.window is None)
    return sum(part.block // part.tokens * part.row_bytes for part in lasting)


class StepTables(NamedTuple):
    """A step as an engine describes it; see `build_batch`."""

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    num_actual_tokens: int | None = None
    max_query_len: int | None = None
    max_seq_len: int | None = None

    def batch(self, input_ids: torch.Tensor) -> Batch:
        """The batch of int ids [rows], rows behind the tokens among them."""
        return build_batch(
            input_ids,
            self.query_start_loc,
            self.seq_lens,
            num_actual_tokens=self.num_actual_tokens,
            max_query_len=self.max_query_len,
            max_seq_len=self.max_seq_len,
        )


def layer_caches(
    parts: Iterable[CachePart],
    pages: Mapping[CachePart, torch.Tensor],
    tables: Mapping[CachePart, torch.Tensor],
) -> list[LayerCache]:
    """The caches of the layers of `parts`, in their order; see `CachePart.paged`."""
    layers: dict[int, dict[str, Paged]] = {}
    for part in parts:
        layers.setdefault(part.layer, {})[part.name] = part.paged(pages[part], tables[part])
    return [LayerCache(**layers[number]) for number in sorted(layers)]


def scratch_step(network: Transformer, input_ids: torch.Tensor) -> Step:
    """A step of one sequence over a cache of its own, of which nothing is kept: for an engine that
    runs the network for its memory or for ranks that wait, without any request.
    """
    rows = len(input_ids)
    cache = PagedCache(
        network.share,
        max_sequences=1,
        max_tokens=max(1, rows),
        max_step_tokens=max(1, rows),
        dtype=network.profile.dtype,
        device=input_ids.device,
        formats=network.profile.caches,
        joined=network.profile.latents.joined,
    )
    return make_step(cache, [cache.new_sequence()], [torch.zeros(rows, dtype=torch.int64)])


class Share:
    """The part of a checkpoint that a process runs: opened at once, read by `load`.

    folder: official or transformers layout. drafts: whether MTP blocks are wanted, without the
    layers, or the layers without them. Errors as `model.load`'s.
    """

    def __init__(
        self, folder: Path, profile: Profile, parallel: Parallel, chip: str, drafts: bool
    ) -> None:
        self._sharding = Sharding(parallel.layout, parallel.rank, profile, chip)
        left_out = "layers." if drafts else "mtp."

        def owner(config: V4Config) -> Callable[[str], bool]:
            owns = self._sharding.owner(config)
            return lambda name: not name.startswith(left_out) and owns(name)

        self._checkpoint: Checkpoint | None = open_checkpoint(folder, owner=owner)
        self.notes = self._checkpoint.notes
        self.network = Transformer(self._checkpoint.config, profile, parallel)
        if drafts:
            self.network.layers = torch.nn.ModuleList()
        else:
            self.network.mtp = torch.nn.ModuleList()

    def load(self, device: torch.device) -> Transformer:
        """Read the weights, once; the network is then ready to run on the device."""
        if self._checkpoint is None:
            raise EnvironmentFault("weights: found them loaded already, expected one load a start")
        tensors = self._sharding.tensors(self._checkpoint, None)
        assign_all(self.network, tensors, device, self._checkpoint.kinds)
        self._checkpoint = None
        return self.network


def parts_here(parts: Sequence[CachePart], network: Transformer) -> list[CachePart]:
    """Those of the blocks that this network has: of the layers, or of the MTP blocks."""
    first = network.config.num_hidden_layers
    return [p for p in parts if (p.layer < first if len(network.layers) else p.layer >= first)]
