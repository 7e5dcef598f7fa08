"""The mask of sparse attention: of each token, its window alone, so that it grows with the tokens.

A band is bool [B, S, W]: column j of token s says whether it sees the key W - 1 - j places before
its own. Where every token sees all of its window that there is, the band has no columns: [B, S, 0].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers.masking_utils import padding_mask_function, prepare_padding_mask

from dsv4_ascend.integrations.transformers.seams import NAME, SPARSE
from dsv4_backend.errors import ArgumentError, UnsupportedError


def band(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int,
    kv_offset: int,
    mask_function: Callable[..., torch.Tensor],
    attention_mask: torch.Tensor | None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: object,
) -> torch.Tensor:
    """What transformers calls for the mask of a step; arguments as of its `eager_mask`,
    local_size: W. UnsupportedError for masks that are not functions of indices, or without window.
    """
    if use_vmap:
        raise UnsupportedError(
            f"{SPARSE}: or_mask_function and and_mask_function are not supported; build the model "
            f"outside sparse() and use attention {NAME!r}, which takes any mask"
        )
    if local_size is None:
        raise UnsupportedError(f"{SPARSE}: a mask without window, which no layer of V4 has")
    queries = torch.arange(q_length, device=device) + q_offset
    keys = queries[:, None] + torch.arange(1 - local_size, 1, device=device)
    there = keys >= kv_offset
    at = keys.clamp(min=kv_offset) - kv_offset
    rows = torch.arange(batch_size, device=device).view(-1, 1, 1, 1)
    head = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device)
    seen = mask_function(rows, head, queries.view(1, 1, -1, 1), at[None, None] + kv_offset)
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        seen = seen & padding_mask_function(padding)(rows, head, None, at[None, None] + kv_offset)
    seen = seen.expand(batch_size, 1, q_length, local_size)[:, 0]
    if bool((seen | ~there).all()):
        return seen[..., :0]
    return seen & there


def check_band(mask: torch.Tensor | None, sizes: tuple[int, int, int]) -> torch.Tensor:
    """The mask if it is a band of sizes [B, S, W]; ArgumentError says what it is otherwise."""
    batch, new, window = sizes
    expected = f"the band [{batch}, {new}, {window} or 0] made of a mask [{batch}, tokens] or none"
    if mask is None:
        raise ArgumentError(
            f"attention {SPARSE!r}: attention_mask is None; expected {expected}: "
            f"set_attn_implementation({SPARSE!r}), as the model was built"
        )
    if mask.dtype != torch.bool or mask.shape not in ((batch, new, window), (batch, new, 0)):
        raise ArgumentError(
            f"attention {SPARSE!r}: attention_mask {mask.dtype} {list(mask.shape)}; expected "
            f"{expected}. For masks of four dimensions, of eager and sdpa too, build the model "
            f"outside sparse() and use attention {NAME!r}"
        )
    return mask
