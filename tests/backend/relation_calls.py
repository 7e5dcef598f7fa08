"""Small calls that every relation of their operators allows: what tests change one argument of."""

import torch

from dsv4_backend import _C, OPERATORS


def ints(*rows):
    return torch.tensor(rows, dtype=torch.int32)


def longs(*rows):
    return torch.tensor(rows, dtype=torch.int64)


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


def codes(*shape):
    return ones(*shape).to(torch.float8_e4m3fn)


def scales(*shape):
    return torch.full(shape, 127, dtype=torch.uint8).view(torch.float8_e8m0fnu)


def spaced(tensor):
    """The same values, every other element of memory that holds 99."""
    wide = tensor.new_full([2 * n + 1 for n in tensor.shape], 99)
    return wide[tuple(slice(1, 2 * n + 1, 2) for n in tensor.shape)].copy_(tensor)


# Two sequences: two new tokens of four, and one of three.
BATCH = {"query_start_loc": ints(0, 2, 3), "seq_lens": ints(4, 3)}
ATTENTION = {
    "q": ones(3, 2, 4), "sink": ones(2), "window_cache": ones(4, 2, 4),
    "window_block_table": ints([0, 1], [2, 3]), "cmp_cache": ones(3, 2, 4),
    "cmp_block_table": ints([2, 9], [1, 9]), "cmp_indices": ints([0, -1], [1, 0], [0, -1]),
    **BATCH, "window": 3, "ratio": 2,
}  # fmt: skip
INDEXER = {
    "q": ones(3, 2, 4), "k_cache": ones(3, 2, 4), "weights": ones(3, 2),
    "block_table": ints([2, 9], [1, 9]), **BATCH, "ratio": 2,
}  # fmt: skip
ROWS_OF_CODES = {
    "q": codes(3, 2, 4), "q_scale": ones(3, 2), "k_cache": codes(3, 2, 4), "k_scale": ones(3, 2),
}  # fmt: skip
EXPERTS = {"expert_offsets": ints(0, 1, 3)}
WEIGHT_FP8 = {"weight": codes(2, 4, 128), "weight_scale": scales(2, 1, 1)}
WEIGHT_FP4 = {"weight": ones(2, 4, 32).to(torch.int8), "weight_scale": scales(2, 4, 2)}
LATENTS = {"slots": longs(2, -1, 0), "block_size": 2, "rope": 64}
KEYS = {"slots": longs(2, -1, 0), "block_size": 2}
_PAGES = {
    "fp8_ds_mla": 1728, "a5": 1280, "indexer_fp8": 264, "indexer_token_fp8": 264,
    "indexer_mxfp4": 136, "indexer_int8": 260,
}  # fmt: skip


def _cached(form, page):
    latent = form in ("fp8_ds_mla", "a5")
    cache = {"cache": torch.zeros(2, page, dtype=torch.uint8), **(LATENTS if latent else KEYS)}
    channels = 512 if latent else 128
    return {
        f"write_cache_{form}": cache | {"rows": ones(3, channels)},
        f"read_cache_{form}": cache | {"channels": channels},
    }


CALLS = {
    "sparse_attention": ATTENTION,
    "sparse_attention_p512": {
        name: value.bfloat16() if name in ("q", "window_cache", "cmp_cache") else value
        for name, value in ATTENTION.items()
    }
    | {"max_seq_len": 4},
    "compress": {
        "x": ones(3, 6), "wkv": ones(8, 6), "wgate": ones(8, 6), "ape": ones(2, 8),
        "norm_weight": ones(4), "inv_freq": ones(2), "state_cache": ones(5, 2, 16),
        "state_block_table": ints([1, 2], [3, 4]), **BATCH, "max_seq_len": 4, "eps": 1e-6,
    },
    "indexer_scores": INDEXER,
    "indexer_topk": INDEXER | {"k": 2},
    "lightning_indexer": INDEXER | {"max_seq_len": 8, "k": 2},
    "lightning_indexer_fp8": INDEXER | ROWS_OF_CODES | {"max_seq_len": 8, "k": 2},
    "topk_indices": {"scores": ones(3, 4), "visible": ints(0, 4, 2), "k": 2},
    "write_cache": {"cache": ones(2, 2, 3), "rows": ones(3, 3), "slots": longs(2, -1, 0)},
    "moe_dispatch": {"x": ones(3, 2), "ids": ints([0, 1], [1, 1], [2, 0]), "num_experts": 3},
    "moe_combine": {"y": ones(4, 2), "order": ints(3, 0, 2, 1), "k": 2},
    "gate_hash": {
        "x": ones(2, 3), "weight": ones(4, 3), "input_ids": longs(2, 0),
        "tid2eid": ints([0, 3], [-7, 99], [1, 1]), "route_scale": 1.0,
    },
    "sample": {"logits": ones(2, 3), "noise": ones(2, 3), "temperature": 1.0, "top_p": 0.9},
    "fp4_quant": {"x": ones(2, 64), "block_size": 32},
    "mx_swiglu_quant": {"x": ones(2, 64, dtype=torch.bfloat16), "limit": 10.0},
    "hadamard": {"x": ones(2, 8)},
    "swiglu": {"gate": ones(2, 3), "up": ones(2, 3), "weights": None, "limit": 10.0},
    "grouped_output_projection": {"o": ones(2, 4, 3), "wo_a": ones(2, 5, 6)},
    "rope": {"x": ones(3, 2, 6), "positions": ints(0, 5, 7), "inv_freq": ones(2), "inverse": False},
    "pack_mxfp4": {"weight": ones(2, 16, 32).to(torch.int8)},
    "int8_token_quant": {"x": ones(2, 3, dtype=torch.bfloat16)},
    "hc_pre": {
        "x": ones(2, 2, 3), "fn": ones(8, 6), "base": ones(8), "scale": ones(3),
        "sinkhorn_iters": 3, "norm_eps": 1e-6, "hc_eps": 1e-6,
    },
    "fp8_gemm": {
        "x": codes(2, 128), "x_scale": scales(2, 1), "weight": codes(4, 128),
        "weight_scale": scales(1, 1),
    },
    "fp8_grouped_gemm": {"x": codes(3, 128), "x_scale": scales(3, 1), **WEIGHT_FP8, **EXPERTS},
    "fp4_grouped_gemm": {"x": ones(3, 64), "x_scale": None, **WEIGHT_FP4, **EXPERTS},
    "grouped_gemm": {"x": ones(3, 5), "weight": ones(2, 4, 5), **EXPERTS},
    "mxfp4_grouped_gemm": {"x": codes(3, 64), "x_scale": scales(3, 2), **WEIGHT_FP4, **EXPERTS},
    "int8_grouped_gemm": {
        "x": ones(3, 5).to(torch.int8), "x_scale": ones(3),
        "weight": ones(2, 4, 5).to(torch.int8), "weight_scale": ones(2, 4), **EXPERTS,
    },
    "int8_swiglu_quant": {
        "sums": torch.ones(3, 4, dtype=torch.int32), "weight_scale": ones(2, 4),
        "x_scale": ones(3), **EXPERTS, "limit": 10.0,
    },
}  # fmt: skip
for _form, _page in _PAGES.items():
    CALLS |= _cached(_form, _page)


def check(name, **changed):
    """The checks of a call with some arguments changed."""
    arguments = CALLS[name] | changed
    _C.check(name, *(arguments[parameter] for parameter in OPERATORS[name]._parameters))
