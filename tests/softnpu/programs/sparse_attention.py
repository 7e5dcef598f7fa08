"""Attention over chosen keys, as a masked dense product, and data for it. Nothing is gathered."""

import numpy as np
from fused_check import Steps, array, rng
from sparse_layouts import PLACE_FAULTS, PLACES, int32, places

WIDTH, ROPE = 512, 64


def only_written(query, ends, results):
    """Rows of TND behind the last sequence are not written."""
    if query.dim() == 4:
        return results
    rows = int(ends[-1])
    return [results[0][:rows], *[x[:, :rows] for x in results[1:]]]


def used(entries, keys, visible, block, steps):
    """How often a query attends to each of its keys."""
    times = np.zeros(keys)
    for entry in entries[: steps.entries(-(-visible // block))]:
        if entry < 0:
            break
        end = entry * block + steps.block(block)
        times[entry * block : min(end, steps.last(visible, keys))] += 1
    return times


def visible_keys(i, queries, keys, mode):
    return max(keys - queries + i + 1, 0) if mode == 3 else keys


STEPS = Steps(
    **vars(PLACES),
    visible=visible_keys,
    used=used,
    entries=lambda blocks: blocks,  # None: all
    block=lambda block: block,
    last=lambda visible, keys: visible,
    logits=lambda q, k, scale: q @ k.T * scale,
    sinks=lambda sinks: sinks,
    largest=np.maximum,
    counted=lambda sink: sink,
    values=lambda k: k[:, :WIDTH],
    normalised=lambda y, total: y / total[:, None],
)
FAULTS = {
    "no scale": dict(logits=lambda q, k, scale: q @ k.T),
    "no rope part": dict(logits=lambda q, k, scale: q[:, :WIDTH] @ k[:, :WIDTH].T * scale),
    "no causal mask": dict(visible=lambda i, queries, keys, mode: keys),
    "every key": dict(
        used=lambda entries, keys, visible, block, steps: 1.0 * (np.arange(keys) < visible)
    ),
    "all entries": dict(entries=lambda blocks: None),
    "values shifted": dict(values=lambda k: k[:, -WIDTH:]),
    "not normalised": dict(normalised=lambda y, total: y),
    **PLACE_FAULTS,
}
SINK_FAULTS = {
    "no sinks": dict(sinks=lambda sinks: -np.inf),
    "sinks counted for every head": dict(counted=lambda sink: len(sink) * sink),
    "largest without the sink": dict(largest=lambda scores, sink: scores),
}
BLOCK_FAULTS = {
    "first key of a block": dict(block=lambda block: 1),
    "blocks over the diagonal": dict(last=lambda visible, keys: keys),
}


def attended(query, k, layouts, indices, block, mode, scale, steps, sinks=None):
    """Output, largest score and sum for queries [..., N, 576];
    k: the flattened keys [., 576], V their first 512.
    """
    q = array(query).reshape(-1, *query.shape[-2:])
    heads = q.shape[1]
    out, largest, total = (
        np.zeros((len(q), heads, WIDTH)),
        np.zeros((len(q), heads)),
        np.zeros((len(q), heads)),
    )
    for rows, keys in places(query, *layouts, steps):
        for i, row in enumerate(rows):
            visible = steps.visible(i, len(rows), len(keys), mode)
            times = steps.used(indices[row], len(keys), visible, block, steps)
            live = np.flatnonzero(times)
            mine = k[keys[live]]
            if not live.size:
                largest[row], total[row] = (0, 0) if sinks is None else (sinks, 1)
                continue
            logits = steps.logits(q[row], mine, scale)
            bottom = -np.inf if sinks is None else steps.sinks(sinks)
            largest[row] = steps.largest(logits.max(-1), bottom)
            p = times[live] * np.exp(logits - largest[row][:, None])
            total[row] = p.sum(-1) + steps.counted(np.exp(np.full(heads, bottom) - largest[row]))
            out[row] = steps.normalised(p @ steps.values(mine), total[row])
    return out, largest, total


def entries(shape, layouts, query, key, size, block, mode, empty=False):
    """Random blocks that each query may see, in random order, -1 behind them;
    every other row names the last block first.

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
