"""Sparse shared-KV attention with sink (spec/v4.md 4.6)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from dsv4_backend import ragged, ragged_cases
from dsv4_backend.contract import Case, Draw, Tolerance, compute, operator
from dsv4_backend.mutants import add_output_faults
from dsv4_backend.ops.output_projection import grouped_output_projection as grouped_output_projection

Step = Callable[..., Any]


class Keys(NamedTuple):
    """Keys that are also values: rows [T, n, D] per token or [n, D] for all, accumulation dtype; valid: bool [T, n]."""

    rows: torch.Tensor
    valid: torch.Tensor


class _Call(NamedTuple):
    """The arguments of `sparse_attention`."""

    q: torch.Tensor
    sink: torch.Tensor
    window_cache: torch.Tensor
    window_block_table: torch.Tensor
    cmp_cache: torch.Tensor | None
    cmp_block_table: torch.Tensor | None
    cmp_indices: torch.Tensor | None
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    window: int
    ratio: int

    def owners(self) -> torch.Tensor:
        """Sequence of every token: int64 [T]."""
        return ragged.token_sequences(self.query_start_loc, self.q.shape[0])

    def positions(self) -> torch.Tensor:
        """Position of every token: int64 [T]."""
        return ragged.token_positions(self.query_start_loc, self.seq_lens, self.q.shape[0])


def _near(positions: torch.Tensor, window: int) -> torch.Tensor:
    """Positions of each token's window keys, negative before the sequence starts: [T, window]."""
    return positions[:, None] + torch.arange(1 - window, 1, device=positions.device)


def _visible(positions: torch.Tensor, ratio: int) -> torch.Tensor:
    return (positions + 1) // ratio


def _chosen(cache: torch.Tensor, table: torch.Tensor, owners: torch.Tensor, index: torch.Tensor) -> Keys:
    """The rows `index` [T, n] of each token's sequence; negative indices are no keys."""
    flat = ragged.slots(table, owners[:, None], index, cache.shape[1])
    valid = flat >= 0
    return Keys(compute(ragged.gather_rows(cache, flat)).masked_fill(~valid[..., None], 0), valid)


def _window_keys(call: _Call, near: Step = _near) -> Keys:
    index = near(call.positions(), call.window)
    return _chosen(call.window_cache, call.window_block_table, call.owners(), index)


def _compressed_keys(call: _Call, visible: Step = _visible) -> Keys | None:
    cache, table = call.cmp_cache, call.cmp_block_table
    if cache is None or table is None:
        return None
    if call.cmp_indices is not None:
        return _chosen(cache, table, call.owners(), call.cmp_indices.long())
    rows = compute(ragged.table_rows(cache, table, call.seq_lens // call.ratio))
    valid = torch.arange(rows.shape[1], device=rows.device) < visible(call.positions(), call.ratio)[:, None]
    return Keys(rows[0] if rows.shape[0] == 1 else rows[call.owners()], valid)  # one sequence: no copy per token


def _scores(q: torch.Tensor, keys: Keys) -> torch.Tensor:
    """Scaled dot products [T, H, n], -inf where there is no key."""
    scaled = (q @ keys.rows.transpose(-1, -2)) / float(q.shape[-1]) ** 0.5
    return scaled.masked_fill(~keys.valid[:, None], -torch.inf)


def _peak(scores: torch.Tensor) -> torch.Tensor:
    """Largest score of a row, 0 if it has no key. It cancels in the result, so it needs no gradient."""
    peak = scores.amax(-1, keepdim=True).detach()
    return peak.masked_fill(peak == -torch.inf, 0)


def _share(peak: torch.Tensor, total: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
    """Total / (total + exp(sink - peak)), without overflow."""
    return torch.sigmoid(peak + total.log() - sink[:, None])


def _attend(
    q: torch.Tensor,
    sink: torch.Tensor,
    parts: list[Keys],
    scores: Step = _scores,
    peak: Step = _peak,
    share: Step = _share,
) -> torch.Tensor:
    """One softmax over all parts and the sink: [T, H, D] in q's dtype."""
    wide = compute(q)
    logits = torch.cat([scores(wide, keys) for keys in parts], -1)
    largest = peak(logits)
    weights = (logits - largest).exp()
    total = weights.sum(-1, keepdim=True)
    total = total.masked_fill(total == 0, 1)
    rounded = weights.to(q.dtype).to(wide.dtype).split([keys.valid.shape[1] for keys in parts], -1)
    # A key is its own value: what is not finite shows in its score. Where it is hidden it must not leak as 0 * NaN.
    mixed = sum(w @ keys.rows.nan_to_num(0, 0, 0) for w, keys in zip(rounded, parts, strict=True))
    return (mixed / total * share(largest, total, sink.to(wide.dtype))).to(q.dtype)


def _sparse_attention(
    call: _Call, window_keys: Step = _window_keys, compressed_keys: Step = _compressed_keys, attend: Step = _attend
) -> torch.Tensor:
    """`sparse_attention` with steps that faults replace."""
    parts = [window_keys(call), compressed_keys(call)]
    return attend(call.q, call.sink, [keys for keys in parts if keys is not None])  # type: ignore[no-any-return]


@operator(
    "sparse_attention(Tensor q, Tensor sink, Tensor window_cache, Tensor window_block_table, Tensor? cmp_cache, "
    "Tensor? cmp_block_table, Tensor? cmp_indices, Tensor query_start_loc, Tensor seq_lens, int window, int ratio) "
    "-> Tensor",
    rows=(16,),
    arguments={
        "q": "float [T, H, D]",
        "sink": "f32 [H]",
        "window_cache": "float [num_blocks, block_size, D]",
        "window_block_table": "i32 [R, columns]",
        "cmp_cache": "float [cmp_blocks, cmp_block_size, D]",
        "cmp_block_table": "i32 [R, cmp_columns]",
        "cmp_indices": "i32 [T, N]",
        "query_start_loc": "i32 [S]",
        "seq_lens": "i32 [R]",
    },
    tolerance=Tolerance(
        reason="fp32 sums in any order; bf16 probabilities are rounded relative to a running maximum that depends on "
        "the tiling (2^-9 of each), and the result once (2^-8)",
        ideal=(4e-6, 2e-5),
        official=(2**-6, 2**-7),
    ),
)
def sparse_attention(
    q: torch.Tensor,
    sink: torch.Tensor,
    window_cache: torch.Tensor,
    window_block_table: torch.Tensor,
    cmp_cache: torch.Tensor | None,
    cmp_block_table: torch.Tensor | None,
    cmp_indices: torch.Tensor | None,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    window: int,
    ratio: int,
) -> torch.Tensor:
    """Multi-query attention over window keys and compressed entries, one softmax together with a sink per head.

    q: [T, H, D]; sink: fp32 [H], -inf for none; caches: paged [num_blocks, block_size, D] in q's dtype with this
    call's rows already in them; a row is key and value of all heads. The token at position t sees window keys
    t - window + 1 .. t (the window's table may be a ring) and, if ratio > 0, compressed entries: those named by
    cmp_indices (int32 [T, N], each < (t + 1) // ratio, -1 = none, a repeated one counts twice), or all
    i < (t + 1) // ratio when cmp_indices is None. ratio 0: the three cmp_ arguments are None. window 0 means no window
    keys and needs ratio > 0.
    Returns [T, H, D] in q's dtype: a = (q . k) * D^-0.5 in fp32; p = exp(a - max a), the sink outside the max; p is
    cast to q's dtype for the product with the values only; o = sum p k / (sum p + exp(sink - max a)), fp32, one cast.
    A row with no key is 0. T = 0 gives an empty result. NaN in hidden rows does not matter. ArgumentError for dtypes,
    offsets, lengths, blocks, or indices that do not fit. Source: spec/v4.md 4.2, 4.6 [OFF-K sparse_attn].
    """
    caches = (window_cache, window_block_table, cmp_cache, cmp_block_table, cmp_indices)
    return _sparse_attention(_Call(q, sink, *caches, query_start_loc, seq_lens, window, ratio))


@sparse_attention.shapes
def _(*arguments: Any) -> None:
    call = _Call(*arguments)
    if call.ratio < 0:
        raise sparse_attention.reject("ratio", call.ratio, "at least 0")
    if call.window < (0 if call.ratio else 1):
        raise sparse_attention.reject("window", call.window, "at least 1, or 0 beside compressed entries")
    if 0 in call.q.shape[1:]:
        raise sparse_attention.reject("q", f"shape {tuple(call.q.shape)}", "at least one head and one channel")
    for name in ("cmp_cache", "cmp_block_table"):
        given = getattr(call, name) is not None
        if given != (call.ratio > 0):
            expected = "a tensor" if call.ratio else "None"
            raise sparse_attention.reject(name, "a tensor" if given else "None", f"{expected} for ratio {call.ratio}")
    if call.cmp_indices is not None and call.ratio == 0:
        raise sparse_attention.reject("cmp_indices", "a tensor", "None for ratio 0")
    for name, cache, table in (
        ("window_cache", call.window_cache, call.window_block_table),
        ("cmp_cache", call.cmp_cache, call.cmp_block_table),
    ):
        if cache is None or table is None:
            continue
        if cache.dtype != call.q.dtype:
            raise sparse_attention.reject(name, str(cache.dtype), f"{call.q.dtype} like q")
        ragged.check_layout("sparse_attention", name, cache, table, call.query_start_loc)


@sparse_attention.contents
def _(*arguments: Any) -> None:
    call = _Call(*arguments)
    name, new = "sparse_attention", call.query_start_loc.diff()
    ragged.check_batch(name, call.query_start_loc, call.seq_lens, call.q.shape[0])
    after = torch.where(new > 0, call.seq_lens, 0)
    if call.window:
        first = (call.seq_lens - new + 1 - call.window).clamp(min=0)
        num_blocks, block_size = call.window_cache.shape[:2]
        ragged.check_table(name, "window_block_table", call.window_block_table, first, after, block_size, num_blocks)
    if call.cmp_cache is not None and call.cmp_block_table is not None:
        num_blocks, block_size = call.cmp_cache.shape[:2]
        first, after = torch.zeros_like(after), after // call.ratio
        ragged.check_table(name, "cmp_block_table", call.cmp_block_table, first, after, block_size, num_blocks)
    if call.cmp_indices is not None:
        visible = _visible(call.positions(), call.ratio)[:, None]
        outside = ((call.cmp_indices < -1) | (call.cmp_indices >= visible)).nonzero()
        if len(outside):
            t, j = outside[0].tolist()
            found = f"{int(call.cmp_indices[t, j])} at [{t}, {j}]"
            raise sparse_attention.reject("cmp_indices", found, f"-1 or one of the {int(visible[t])} visible entries")


_WINDOW, _RATIO = 7, 4
_EDGES = [(0, s) for s in (1, 3, 4, 5, 6, 7, 8, 9, 13, 14, 15)]
_DECODE = [(before, 1) for before in (0, 2, 3, 5, 6, 7, 8, 11, 15, 16, 19)]
_MIXED = [(0, 9), (5, 1), (3, 0), (6, 7), (7, 1), (0, 0), (13, 12)]
_RINGS = [(61, 3), (64, 1), (55, 1), (71, 3), (5, 2)]
_KINDS = ("window", "all", "chosen")


def _caches(
    draw: Draw, kind: str, sequences: list[ragged_cases.Sequence], dtype: torch.dtype, dim: int, ring: int
) -> tuple[Any, ...]:
    """window_cache, window_block_table, cmp_cache, cmp_block_table: random rows everywhere."""
    longest = max((before + new for before, new in sequences), default=0)
    window = ragged_cases.shuffled_table(draw, sequences, ring or longest, 3)
    entries = ragged_cases.shuffled_table(draw, sequences, longest // _RATIO, 5)
    near = draw.normal(ragged_cases.blocks_of(window), 3, dim, dtype=dtype)
    far = draw.normal(ragged_cases.blocks_of(entries), 5, dim, dtype=dtype)
    return (near, window, None, None) if kind == "window" else (near, window, far, entries)


def _call(
    draw: Draw,
    kind: str,
    sequences: list[ragged_cases.Sequence],
    dtype: torch.dtype,
    ring: int = 0,
    heads: int = 3,
    dim: int = 10,
    window: int = _WINDOW,
) -> _Call:
    tokens = ragged_cases.tokens_of(sequences)
    call = _Call(
        draw.normal(tokens, heads, dim, dtype=dtype),
        draw.normal(heads),
        *_caches(draw, kind, sequences, dtype, dim, ring),
        None,
        *ragged_cases.offsets(sequences),
        window,
        0 if kind == "window" else _RATIO,
    )
    return call._replace(cmp_indices=_choice(draw, call, 3)) if kind == "chosen" else call


def _choice(draw: Draw, call: _Call, k: int) -> torch.Tensor:
    """K random visible entries per token in random order, -1 where there are fewer: int32 [T, k]."""
    visible = _visible(call.positions(), call.ratio)[:, None]
    order = draw.uniform(visible.shape[0], max(k, int(visible.max()) if len(visible) else 0))
    order = order.masked_fill(torch.arange(order.shape[1]) >= visible, 2.0).argsort(1)
    return torch.where(order < visible, order, -1)[:, torch.tensor([1, 0, 2])[:k]].int()


def _needles(call: _Call) -> _Call:
    """Aim head h of each token at one boundary key: first and last of the window, one before, one after, and the same
    for compressed entries. A hidden target that is seen takes over the row.
    """
    t, owners = call.positions()[:, None], call.owners()[:, None]
    steps = torch.tensor([0, 1 - call.window, -call.window, 1])
    flat = ragged.slots(call.window_block_table, owners, t + steps, call.window_cache.shape[1])
    targets = ragged.gather_rows(call.window_cache, flat)
    if call.cmp_cache is not None and call.cmp_block_table is not None:
        last = _visible(t, call.ratio)
        flat = ragged.slots(
            call.cmp_block_table, owners, torch.cat((last - 1, last, last * 0), 1), call.cmp_cache.shape[1]
        )
        targets = torch.cat((targets, ragged.gather_rows(call.cmp_cache, flat)), 1)
    rows = targets.float()
    aimed = rows * (16 * rows.shape[-1] ** 0.5 / rows.square().sum(-1, keepdim=True))
    return call._replace(q=aimed.to(call.q.dtype), sink=torch.zeros(aimed.shape[1]))


def _stale(call: _Call) -> _Call:
    """NaN in every row that no token of the call may see."""
    first = (call.seq_lens - call.query_start_loc.diff() + 1 - call.window).clamp(min=0)
    near = ragged_cases.only_rows(call.window_cache, call.window_block_table, first, call.seq_lens)
    call = call._replace(window_cache=near)
    if call.cmp_cache is None or call.cmp_block_table is None:
        return call
    entries = call.seq_lens // call.ratio
    return call._replace(cmp_cache=ragged_cases.only_rows(call.cmp_cache, call.cmp_block_table, entries * 0, entries))


def _newest_nan(call: _Call) -> _Call:
    """NaN in the newest rows of the only sequence: earlier tokens do not notice."""
    newest = call.seq_lens - 1
    near = ragged_cases.only_rows(call.window_cache, call.window_block_table, newest * 0, newest)
    call = call._replace(window_cache=near)
    if call.cmp_cache is None or call.cmp_block_table is None:
        return call
    newest = call.seq_lens // call.ratio - 1
    return call._replace(cmp_cache=ragged_cases.only_rows(call.cmp_cache, call.cmp_block_table, newest * 0, newest))


def _strided(draw: Draw, call: _Call) -> _Call:
    wide = draw.normal(*call.window_cache.shape[:2], call.window_cache.shape[2] + 3, dtype=call.q.dtype)
    return call._replace(q=call.q.transpose(0, 1).contiguous().transpose(0, 1), window_cache=wide[..., 2:-1])


@sparse_attention.cases
def _(draw: Draw) -> Iterator[Case]:
    for profile, dtype in (("ideal", torch.float32), ("official", torch.bfloat16)):
        for kind in _KINDS:
            for name, sequences, ring in (
                ("no sequences", [], 0),
                ("zero tokens", [(0, 0), (9, 0)], 0),
                ("one token", [(0, 1)], 0),
                ("one sequence", [(0, 23)], 0),
                ("edges", _EDGES, 0),
                ("decode", _DECODE, 0),
                ("mixed", _MIXED, 0),
                ("ring", _RINGS, _WINDOW + 2),
            ):
                yield Case(f"{kind}, {name}", profile, _call(draw, kind, sequences, dtype, ring))
                if sequences:
                    needles = _needles(_call(draw, kind, sequences, dtype, ring))
                    yield Case(f"{kind}, {name}, needles", profile, needles)
            yield Case(f"{kind}, stale NaN", profile, _stale(_call(draw, kind, _RINGS, dtype, _WINDOW + 2)))
            yield Case(f"{kind}, newest NaN", profile, _newest_nan(_call(draw, kind, [(0, 24)], dtype)))
            yield Case(f"{kind}, strided", profile, _strided(draw, _call(draw, kind, _MIXED, dtype)))
            call = _call(draw, kind, _EDGES, dtype)
            yield Case(f"{kind}, large scores", profile, call._replace(q=call.q * 100, sink=call.sink * 100))
            sink = torch.tensor([-torch.inf, 6.0, torch.inf])
            yield Case(f"{kind}, extreme sinks", profile, call._replace(sink=sink))
        yield Case("no window", profile, _call(draw, "all", _EDGES, dtype, window=0))
        call = _call(draw, "chosen", [(0, 13)], dtype)
        repeated = torch.where(_visible(call.positions(), _RATIO)[:, None] > 0, 0, -1).expand(-1, 2).int()
        yield Case("an entry chosen twice", profile, call._replace(cmp_indices=repeated))
        yield Case("nothing chosen", profile, call._replace(cmp_indices=torch.full((13, 0), -1, dtype=torch.int32)))
        real = _call(draw, "all", [(125, 6), (515, 1)], dtype, ring=134, heads=4, dim=512, window=128)
        yield Case("window 128, 512 channels", profile, real)


add_output_faults(sparse_attention, "last token zero", "stale tail of channels", "one NaN", "tokens shifted by one")


def _fault(name: str, **steps: Step) -> None:
    sparse_attention.fault(name)(lambda *arguments: _sparse_attention(_Call(*arguments), **steps))


def _fault_near(name: str, near: Step) -> None:
    _fault(name, window_keys=partial(_window_keys, near=near))


def _fault_visible(name: str, visible: Step) -> None:
    _fault(name, compressed_keys=partial(_compressed_keys, visible=visible))


def _fault_choice(name: str, edit: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    def edited(call: _Call) -> _Call:
        return call if call.cmp_indices is None else call._replace(cmp_indices=edit(call.cmp_indices))

    _fault(name, compressed_keys=lambda call: _compressed_keys(edited(call)))


def _fault_attend(name: str, **steps: Step) -> None:
    _fault(name, attend=partial(_attend, **steps))


def _apart(q: torch.Tensor, sink: torch.Tensor, parts: list[Keys]) -> torch.Tensor:
    return torch.stack([_attend(q, sink, [keys]) for keys in parts]).mean(0)


def _scored_zero(q: torch.Tensor, keys: Keys) -> torch.Tensor:
    return _scores(q, keys).masked_fill(~keys.valid[:, None], 0)


def _unordered(table: torch.Tensor | None) -> torch.Tensor | None:
    return None if table is None else table.sort(1).values


_fault_near("window one key short", lambda t, window: _near(t, window)[:, 1:])
_fault_near("window one key long", lambda t, window: _near(t, window + 1))
_fault_near("current token not seen", lambda t, window: _near(t - 1, window))
_fault_near("next token seen", lambda t, window: _near(t + 1, window))
_fault("window left out", window_keys=lambda call: _window_keys(call, lambda t, window: _near(t, window) * 0 - 1))
_fault("compressed entries left out", compressed_keys=lambda call: None)
_fault_visible("entry seen before its block closes", lambda t, ratio: _visible(t + 1, ratio))
_fault_visible("newest entry one token late", lambda t, ratio: _visible(t - 1, ratio))
_fault_choice("-1 taken for entry 0", lambda choice: choice.clamp(min=0))
_fault_choice("choice ignored", lambda choice: None)
_fault_choice("last choice dropped", lambda choice: choice[:, :-1])
_fault_attend("scale left out", scores=lambda q, keys: _scores(q * q.shape[-1] ** 0.5, keys))
_fault_attend("scale of the channels without RoPE", scores=lambda q, keys: _scores(q * (8 / 7) ** 0.5, keys))
_fault_attend("hidden keys score 0", scores=_scored_zero)
_fault_attend("sink left out", share=lambda peak, total, sink: torch.ones_like(total))
_fault_attend("sink counted twice", share=lambda peak, total, sink: _share(peak, total, sink + math.log(2)))
_fault_attend("sink not relative to the maximum", share=lambda peak, total, sink: _share(peak * 0, total, sink))
_fault_attend("sink of the next head", share=lambda peak, total, sink: _share(peak, total, sink.roll(1)))
_fault_attend("softmax without maximum", peak=lambda scores: torch.zeros_like(scores[..., :1]))
_fault("two separate softmaxes", attend=_apart)


@sparse_attention.fault("window table not followed")
def _(*arguments: Any) -> torch.Tensor:
    call = _Call(*arguments)
    return _sparse_attention(call._replace(window_block_table=call.window_block_table.sort(1).values))


@sparse_attention.fault("entry table not followed")
def _(*arguments: Any) -> torch.Tensor:
    call = _Call(*arguments)
    return _sparse_attention(call._replace(cmp_block_table=_unordered(call.cmp_block_table)))


@sparse_attention.fault("positions counted from the call")
def _(*arguments: Any) -> torch.Tensor:
    call = _Call(*arguments)
    return _sparse_attention(call._replace(seq_lens=call.query_start_loc.diff()))


@sparse_attention.fault("keys rounded to bf16")
def _(*arguments: Any) -> torch.Tensor:
    call = _Call(*arguments)
    return _sparse_attention(call._replace(window_cache=call.window_cache.bfloat16().to(call.q.dtype)))
