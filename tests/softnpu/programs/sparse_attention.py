"""Attention over chosen keys, as a masked dense product, and data for it. Nothing is gathered."""

import numpy as np
from fused_check import array, rng
from sparse_layouts import int32, places

WIDTH, ROPE = 512, 64


def only_written(query, ends, results):
    """Rows of TND behind the last sequence are not written."""
    if query.dim() == 4:
        return results
    rows = int(ends[-1])
    return [results[0][:rows], *[x[:, :rows] for x in results[1:]]]


def used(entries, keys, visible, block, fault):
    """How often a query attends to each of its keys."""
    times = np.zeros(keys)
    limit = -(-visible // block) if fault != "all entries" else len(entries)
    for entry in entries[:limit]:
        if entry < 0:
            break
        end = entry * block + (1 if fault == "first key of a block" else block)
        times[entry * block : min(end, keys if fault == "blocks over the diagonal" else visible)] += 1
    return np.ones(keys) * (np.arange(keys) < visible) if fault == "every key" else times


def attended(query, fault, k, layouts, indices, block, mode, scale, sinks=None):
    """Output, largest score and sum for queries [..., N, 576]; k: the flattened keys [., 576], V their first 512."""
    q = array(query).reshape(-1, *query.shape[-2:])
    heads = q.shape[1]
    out, largest, total = np.zeros((len(q), heads, WIDTH)), np.zeros((len(q), heads)), np.zeros((len(q), heads))
    for rows, keys in places(query, *layouts, fault):
        for i, row in enumerate(rows):
            visible = max(len(keys) - len(rows) + i + 1, 0) if mode == 3 else len(keys)
            if fault == "no causal mask":
                visible = len(keys)
            times = used(indices[row], len(keys), visible, block, fault)
            live = np.flatnonzero(times)
            logits = q[row] @ k[keys[live]].T * (1 if fault == "no scale" else scale)
            if fault == "no rope part":
                logits = q[row][:, :WIDTH] @ k[keys[live], :WIDTH].T * scale
            bottom = -np.inf if sinks is None or fault == "no sinks" else sinks
            if not live.size:
                largest[row], total[row] = (0, 0) if sinks is None else (sinks, 1)
                continue
            largest[row] = np.maximum(logits.max(-1), bottom if fault != "largest without the sink" else -np.inf)
            p = times[live] * np.exp(logits - largest[row][:, None])
            extra = np.exp(np.full(heads, bottom) - largest[row])
            total[row] = p.sum(-1) + (heads * extra if fault == "sinks counted for every head" else extra)
            values = k[keys[live]][:, -WIDTH:] if fault == "values shifted" else k[keys[live]][:, :WIDTH]
            out[row] = p @ values / (1 if fault == "not normalised" else total[row][:, None])
    return out, largest, total


def entries(shape, layouts, query, key, size, block, mode, empty=False):
    """Random blocks that each query may see, in random order, -1 behind them; every other row names the last block first.

    Rows of no sequence name block 0, which must have no effect.
    """
    result = np.full((int(np.prod(shape)), size), -1)
    result[:, 0] = 0
    for rows, keys in places(query, key, *layouts):
        for i, row in enumerate(rows):
            visible = max(len(keys) - len(rows) + i + 1, 0) if mode == 3 else len(keys)
            blocks, last = rng.permutation(-(-visible // block)), -(-len(keys) // block) - 1
            blocks = [last, *blocks[blocks != last]] if row % 2 else blocks
            count = 0 if empty and i == 0 else min(size, len(blocks))
            result[row] = [*blocks[:count], *[-1] * (size - count)]
    return int32(result.reshape(*shape, 1, size))
