"""The attention function "dsv4" of transformers' registry: it takes the dense mask of eager."""

from __future__ import annotations

from typing import Any

import torch

from dsv4_ascend.integrations.transformers.keys import listed
from dsv4_ascend.integrations.transformers.seams import NAME, SPARSE
from dsv4_backend.errors import ArgumentError, UnsupportedError


def refuse_options(name: str, module: Any, options: dict[str, object]) -> None:
    """UnsupportedError for what only eager attention gives: probabilities, and their dropout."""
    config = module.config
    if options.get("output_attentions") or config.output_attentions:
        raise UnsupportedError(
            f"attention {name!r}: output_attentions=True needs probabilities, which are never in "
            'memory; use attn_implementation="eager", outside sparse()'
        )
    if module.training and config.attention_dropout:
        raise UnsupportedError(
            f"attention {name!r}: attention_dropout={config.attention_dropout} while training; "
            'set it to 0, or use attn_implementation="eager", outside sparse()'
        )


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    s_aux: torch.Tensor | None = None,
    **options: object,
) -> tuple[torch.Tensor, None]:
    """V4's attention over the keys that the mask shows: ([B, S, H, D], None).

    query: [B, H, S, D]; key, value: [B, 1, K, D], the same; attention_mask: float
    [B or 1, 1, S, K], 0 or the least value; scaling: D^-0.5; s_aux: sinks [H]. Cost of the mask
    stays S x K, as with eager; `sparse()` is for sparse cost. ArgumentError or UnsupportedError for
    anything else.
    """
    refuse_options(NAME, module, options)
    if s_aux is None or scaling != query.shape[-1] ** -0.5 or key.shape[1] != 1:
        raise UnsupportedError(
            f"attention {NAME!r} is DeepSeek V4's: one key head, a sink per head, scaling D^-0.5; "
            f"{type(module).__name__} has {key.shape[1]} key heads, scaling {scaling:.4g} and "
            f"{'no sinks' if s_aux is None else 'sinks'}"
        )
    batch, _, new, _ = query.shape
    seen = visible(attention_mask, (batch, new, key.shape[2]))
    out = listed(query.transpose(1, 2), s_aux, key[:, 0], lists_of(seen))
    return out, None


def visible(mask: torch.Tensor | None, sizes: tuple[int, int, int]) -> torch.Tensor:
    """Bool [B, S, K] of an additive mask; ArgumentError for one that says anything else."""
    batch, new, keys = sizes
    if mask is None:
        raise ArgumentError(
            f"attention {NAME!r}: attention_mask is None, but the mask says which keys a token "
            "sees; call register() before the model runs, it adds the mask of that name"
        )
    expected = f"float [{batch} or 1, 1, {new}, {keys}] as transformers.masking_utils.eager_mask"
    if not mask.is_floating_point():
        raise ArgumentError(
            f"attention {NAME!r}: attention_mask is {mask.dtype}, as sdpa_mask makes it; "
            f"expected {expected} makes it"
        )
    if mask.dim() != 4 or mask.shape[1:] != (1, new, keys) or mask.shape[0] not in (1, batch):
        raise ArgumentError(
            f"attention {NAME!r}: attention_mask {list(mask.shape)}; expected {expected}"
        )
    seen = mask[:, 0] == 0
    if bool((~seen & (mask[:, 0] > torch.finfo(mask.dtype).min / 2)).any()):
        raise ArgumentError(
            f"attention {NAME!r}: attention_mask adds to scores; expected 0 where a key is seen, "
            "and -inf or the dtype's least value elsewhere"
        )
    return seen.expand(batch, new, keys)


def lists_of(seen: torch.Tensor) -> torch.Tensor:
    """Int32 [B, S, N]: where each row of bool [B, S, K] is true, ascending, then -1."""
    flat = seen.flatten(0, 1)
    counts = flat.sum(1)
    rows, columns = flat.nonzero(as_tuple=True)
    rank = torch.arange(len(rows), device=seen.device) - (counts.cumsum(0) - counts)[rows]
    longest = int(counts.max()) if counts.numel() else 0
    lists = torch.full((flat.shape[0], longest), -1, dtype=torch.int32, device=seen.device)
    lists[rows, rank] = columns.int()
    return lists.view(*seen.shape[:2], longest)


def not_sparse(module: Any, *_: object, **__: object) -> None:
    """The attention function of models that were not built inside `sparse()`: UnsupportedError."""
    raise UnsupportedError(
        f"attention {SPARSE!r}: {type(module).__name__} was built outside "
        "dsv4_ascend.integrations.transformers.sparse(), perhaps with the configuration object of "
        f"a model that was: give each its own, build inside it, or use attention {NAME!r}"
    )
