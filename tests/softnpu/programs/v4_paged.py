"""Pools of pages for the V4 family's programs: what no call may read is NaN, or a page that does
not exist.
"""

import numpy as np
import torch
from fused_check import rng


def int32(values):
    return torch.tensor(np.asarray(values), dtype=torch.int32)


def cumulative(counts):
    return int32(np.concatenate([[0], np.cumsum(counts)]))


def poison(shape, dtype):
    if dtype in (torch.float32, torch.float16, torch.bfloat16):
        return torch.full(shape, float("nan"), dtype=dtype)
    bytes_of = torch.empty((), dtype=dtype).element_size()
    raw = torch.full((*shape[:-1], shape[-1] * bytes_of), 0x7F, dtype=torch.uint8)
    return raw.view(dtype)


def pool_of(sequences, size, *, unread=None, spare=2):
    """(pool [pages, size, ...], table [B, columns]) of the rows of each sequence.

    `unread[b]`: so many rows at its front are never read, their whole pages do not exist.
    """
    counts = [-(-len(rows) // size) for rows in sequences]
    pages = sum(counts) + spare
    order = iter(rng.permutation(pages))
    pool = poison((pages, size, *sequences[0].shape[1:]), sequences[0].dtype)
    table = np.zeros((len(sequences), max(counts) + 1), np.int32)
    for b, rows in enumerate(sequences):
        for column in range(counts[b]):
            page = next(order)
            part = rows[column * size : (column + 1) * size]
            gone = unread is not None and (column + 1) * size <= unread[b]
            table[b, column] = pages + 7 if gone else page
            if not gone:
                pool.view(torch.uint8)[page, : len(part)] = part.view(torch.uint8)
    return pool, torch.tensor(table)


def with_gaps(x):
    """On npu: the same values with unused room behind every page."""
    width = x[0].numel()
    room = torch.zeros(len(x), width + 64, dtype=x.dtype).npu()
    view = room[:, :width].view(x.shape)
    view.view(torch.uint8).copy_(x.npu().view(torch.uint8))
    return view


def on_npu(values):
    return {k: v.npu() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
