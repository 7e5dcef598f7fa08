"""Which rows of which official tensor belong to a rank: the only place that knows.

Tensor parallel divides attention by whole o_groups (rows of wq_b and wo_a, columns of wo_b, the
sinks) and the vocabulary (rows of embed and head). Expert parallel divides the routed experts by
number. Everything else, the indexer and all caches among it, is whole on every rank: scores of an
indexer divided by heads would have to be summed over ranks for every entry before the top-k.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from dsv4_ascend.checkpoint.config import V4Config
from dsv4_ascend.checkpoint.experts import EXPERT
from dsv4_ascend.checkpoint.folder import Checkpoint, Progress
from dsv4_ascend.checkpoint.layout import FP8_TILE
from dsv4_ascend.model.profile import Profile
from dsv4_backend.errors import ArgumentError

_BLOCK = r"(layers|mtp)\.\d+\.attn"
_ROWS = re.compile(
    rf"(embed|head)\.weight|{_BLOCK}\.((wq_b|wo_a)\.(weight|scale)|attn_sink)", re.ASCII
)
_COLUMNS = re.compile(rf"{_BLOCK}\.wo_b\.(weight|scale)", re.ASCII)
A5_HEADS = 64, 128
"""Local query heads that A5's attention over FP8 caches takes (spec/ascend-operators.md 4.11)."""
_SHOWN = 6


@dataclass(frozen=True)
class DeviceLayout:
    """How `world` ranks divide the work.

    dp: data groups, each with prompts of its own; `width` ranks of one have the same tokens. tp:
    ranks that divide attention and vocabulary, within a data group. ep: ranks that divide the
    experts; more than `width` of them exchange rows of tokens. Groups are runs of consecutive
    ranks. ArgumentError for counts that do not divide, with the layouts that do.
    """

    world: int = 1
    tp: int = 1
    ep: int = 1
    dp: int = 1

    def __post_init__(self) -> None:
        wrong = self._miscounted()
        if wrong:
            raise ArgumentError(f"{wrong}; {working(self.world)}")

    def _miscounted(self) -> str | None:
        for name in ("tp", "ep", "dp"):
            count = getattr(self, name)
            if count < 1 or self.world % count:
                return f"--{name}: found {count}, expected a divisor of the {self.world} ranks"
        if self.width % self.tp:
            found = f"--tp: found {self.tp}, expected a divisor"
            return f"{found} of {self.width}, the ranks of each of {self.dp} data groups"
        if self.width % self.ep and self.ep % self.width:
            found = f"--ep: found {self.ep}, expected a divisor or a multiple"
            return f"{found} of {self.width}, the ranks of each of {self.dp} data groups"
        return None

    @property
    def width(self) -> int:
        """Ranks of a data group."""
        return self.world // self.dp

    @property
    def moves_tokens(self) -> bool:
        """Whether ranks that divide the experts have different tokens, and so exchange rows."""
        return self.ep > self.width

    def __str__(self) -> str:
        return f"--tp {self.tp} --ep {self.ep} --dp {self.dp}"


def layouts(world: int) -> Iterator[DeviceLayout]:
    """Every layout of so many ranks: those with most ranks per expert group, then per tensor group,
    first; none that computes attention twice.
    """
    divisors = [n for n in range(world, 0, -1) if world % n == 0]
    for ep in divisors:
        for tp in divisors:
            if tp % ep == 0 or ep % tp == 0:
                yield DeviceLayout(world, tp, ep, world // tp)


def misfits(
    layout: DeviceLayout, config: V4Config, profile: Profile, chip: str = ""
) -> Iterator[str]:
    """One line per reason why this model does not run in that layout on such a chip."""
    tp, groups, experts = layout.tp, config.o_groups, config.n_routed_experts
    if groups % tp:
        yield f"--tp: found {tp}, expected a divisor of o_groups {groups}"
    if config.vocab_size % tp:
        yield f"--tp: found {tp}, expected a divisor of vocab_size {config.vocab_size}"
    if experts % layout.ep:
        yield f"--ep: found {layout.ep}, expected a divisor of n_routed_experts {experts}"
    if groups % tp == 0 and tp > 1:
        yield from _cuts(tp, config)
        heads = config.num_attention_heads // tp
        if chip.startswith("Ascend950") and profile.caches.latent and heads not in A5_HEADS:
            yield (
                f"--tp: found {tp}, which leaves {heads} query heads per rank, expected "
                f"{' or '.join(map(str, A5_HEADS))}, which {chip}'s attention over FP8 caches takes"
            )


def _cuts(tp: int, config: V4Config) -> Iterator[str]:
    """Boundaries between ranks that cut tiles of FP8."""
    projected = config.o_groups * config.o_lora_rank // tp
    rows = {
        "rows of attn.wq_b": config.num_attention_heads * config.head_dim // tp,
        "rows of attn.wo_a": projected,
        "columns of attn.wo_b": projected,
    }
    for what, count in rows.items():
        if config.quantized and count % FP8_TILE:
            yield (
                f"--tp: found {tp}, which leaves {count} {what} per rank, "
                f"expected a multiple of {FP8_TILE}, the rows and columns of an FP8 tile"
            )


def working(
    world: int, config: V4Config | None = None, profile: Profile | None = None, chip: str = ""
) -> str:
    """A sentence that names layouts of so many ranks in which the model runs."""
    fitting = [
        layout
        for layout in layouts(world)
        if config is None or profile is None or not list(misfits(layout, config, profile, chip))
    ]
    if not fitting:
        return f"no layout of {world} ranks works"
    more = f" and {len(fitting) - _SHOWN} more" if len(fitting) > _SHOWN else ""
    shown = "; ".join(map(str, fitting[:_SHOWN]))
    return f"what works with {world} ranks: {shown}{more}"


class Cut(NamedTuple):
    """A run of a tensor along a dimension."""

    dim: int
    start: int
    length: int


class Sharding:
    """What of a checkpoint is a rank's. chip: where it runs, "" for none with limits of its own."""

    def __init__(self, layout: DeviceLayout, rank: int, profile: Profile, chip: str = "") -> None:
        self._layout, self._rank, self._profile, self._chip = layout, rank, profile, chip

    def owner(self, config: V4Config) -> Callable[[str], bool]:
        """Whether anything of the tensor of an official name is this rank's.

        ArgumentError for a model that does not run in this layout, with every reason and the
        layouts in which it does.
        """
        layout, rest = self._layout, (config, self._profile, self._chip)
        wrong = list(misfits(layout, *rest)) if layout.world > 1 else []
        if wrong:
            raise ArgumentError("; ".join([*wrong, working(layout.world, *rest)]))
        if layout.ep == 1:
            return lambda name: True
        count = config.n_routed_experts // layout.ep
        group = self._rank % layout.ep

        def owns(name: str) -> bool:
            expert = EXPERT.fullmatch(name)
            return expert is None or int(expert[2]) // count == group

        return owns

    def cut(self, name: str, shape: tuple[int, ...]) -> Cut | None:
        """Which part of a tensor that it owns is this rank's; None for all of it."""
        tp = self._layout.tp
        dim = None if tp == 1 else 0 if _ROWS.fullmatch(name) else 1 if self.copies(name) else None
        if dim is None or dim >= len(shape):  # scales of rows do not know of columns
            return None
        length = shape[dim] // tp
        return Cut(dim, self._rank % tp * length, length)

    def local(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The rank's part of a tensor that it owns: a view of rows, a copy of columns."""
        cut = self.cut(name, tuple(tensor.shape))
        return tensor if cut is None else tensor.narrow(*cut).contiguous()

    def tensors(
        self, checkpoint: Checkpoint, progress: Progress | None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The rank's parts of what the network runs, of a checkpoint opened with its `owner`."""
        drafts = checkpoint.config.dspark is None
        for name, tensor in checkpoint.network_tensors(progress, drafts):
            part = self.local(name, tensor)
            yield name, part
            if part.data_ptr() != tensor.data_ptr() and self.copies(name):
                checkpoint.release(name)

    @staticmethod
    def copies(name: str) -> bool:
        """Whether parts of this tensor are columns, which are copied."""
        return _COLUMNS.fullmatch(name) is not None


def attention_share(config: V4Config, layout: DeviceLayout) -> V4Config:
    """The configuration of a rank's attention and caches: its heads, in whole o_groups."""
    if layout.tp == 1:
        return config
    heads, groups = config.num_attention_heads // layout.tp, config.o_groups // layout.tp
    return replace(config, num_attention_heads=heads, o_groups=groups)
