"""Layouts of the sparse operators: random page tables, and where the rows of each sequence lie."""

import numpy as np
import torch
from fused_check import Steps, rng

ALL = (1 << 63) - 1


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def whole(*shape, most=3, dtype=torch.bfloat16):
    """Small integers: sums are exact in any order, and equal scores are frequent."""
    return torch.tensor(rng.integers(-most, most + 1, shape)).to(dtype)


def on_npu(x):
    return x.npu() if isinstance(x, torch.Tensor) else x


def with_gaps(x):
    """The same values with unused room behind every entry of the first axis."""
    room = torch.zeros(len(x), x[0].numel() + 10, dtype=x.dtype).npu()
    view = room[:, : x[0].numel()].view(x.shape)
    view.copy_(x.npu())
    return view


def turned(x):
    """The same values, the first two axes swapped in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def page_table(lengths, block, spare=1):
    """Shuffled pages for sequences of these lengths;
    -1 where no page is needed. Also the number of pages.
    """
    need = [-(-n // block) for n in lengths]
    total = sum(need) + spare
    pages = iter(rng.permutation(total))
    table = np.full((len(lengths), max(need) + 1), -1)
    for row, n in zip(table, need, strict=True):
        row[:n] = [next(pages) for _ in range(n)]
    return int32(table), total


def paged(lengths, keys, page):
    """Page table (None without pages) and leading axes of the keys."""
    if not page:
        return None, keys
    table, pages = page_table(lengths, page)
    return table, (pages, page)


PLACES = Steps(
    lengths=lambda x: x, start=lambda ends, b: ends[b - 1] if b else 0, pages=lambda row: row
)
PLACE_FAULTS = {
    "lengths ignored": dict(lengths=lambda x: None),
    "keys from the start": dict(start=lambda ends, b: 0),
    "pages in order": dict(pages=lambda row: np.arange(len(row))),
}


def places(query, key, query_lengths, key_lengths, table, layout_query, layout_key, steps=PLACES):
    """For each sequence: rows of the flattened query, and rows of the flattened keys."""
    ql, kl, table = (
        None if x is None else x.cpu().numpy() for x in (query_lengths, key_lengths, table)
    )
    ql = steps.lengths(ql) if layout_query == "BSND" else ql
    kl = steps.lengths(kl) if layout_key == "BSND" else kl
    for b in range(len(ql) if layout_query == "TND" else len(query)):
        if layout_query == "TND":
            rows = np.arange(ql[b - 1] if b else 0, ql[b])
        else:
            rows = b * query.shape[1] + np.arange(query.shape[1] if ql is None else ql[b])
        if layout_key == "TND":
            keys = np.arange(steps.start(kl, b), kl[b])
        elif layout_key == "BSND":
            keys = b * key.shape[1] + np.arange(key.shape[1] if kl is None else kl[b])
        else:
            block, at = key.shape[1], np.arange(kl[b])
            keys = steps.pages(table[b])[at // block] * block + at % block
        yield rows, keys
